"""Register-only PTX instructions as micro-operations: one numpy expression from sources to one destination.

`lower(instruction)` answers what the instruction computes; `runs.py` turns straight-line sequences of the answers into
Python functions. Anything that touches memory, barriers or other lanes is not lowered: it has a handler of its own
(package `instructions`), and `lower` says so by raising `NotSimple`.

A template is a Python expression with `{0}`, `{1}` for the sources, in the vocabulary of `lanes.py` plus numpy's
ufuncs. A template that is the bare name of a ufunc is called with `out=`, which saves a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .errors import Unsupported
from .ptx import FloatImm, Imm, Instruction, Pair, Param, Reg, Sink, Symbol, Vec

PARAM_WINDOW = 1 << 60
LOCAL_WINDOW = 1 << 58
SHARED_WINDOW = 1 << 56
"""Generic addresses: global ones are themselves, the other state spaces sit in windows far above (PTX ISA 6.4.1.1)."""

DTYPE = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f32x2": "x2", "pred": "b1",
}  # fmt: skip
"""PTX type to numpy type code; `x2` is a pair of float32 in a 64-bit register, `b1` a predicate."""


class NotSimple(Exception):
    """The instruction needs a handler: it is not a pure function of registers."""


class MicroOp(NamedTuple):
    """`destination[dtype] = template(sources)`, under `guard` if there is one."""

    template: str
    destination: Reg
    dtype: str
    sources: tuple
    instruction: Instruction


_FAMILIES: dict[str, Callable[[Instruction], list]] = {}


def _lowers(*names: str):
    def register(function):
        for name in names:
            _FAMILIES[name] = function
        return function

    return register


def lower(instruction: Instruction) -> list[MicroOp]:
    """The micro-operations of a register-only instruction.

    Raises `NotSimple` for the others, and `Unsupported` for a register-only form that is not modelled.
    """
    family = _FAMILIES.get(instruction.parts[0])
    if family is None:
        raise NotSimple(instruction.text)
    produced = family(instruction)
    if produced is None:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    return [MicroOp(t, d, ty, tuple(s), instruction) for t, d, ty, s in produced if not isinstance(d, Sink)]


def _one(instruction: Instruction, template: str, dtype: str, source_dtypes=None) -> list:
    """The common shape: operand 0 is the destination, the rest are sources."""
    operands = instruction.operands
    types = source_dtypes or [dtype] * (len(operands) - 1)
    return [(template, operands[0], dtype, list(zip(operands[1:], types)))]


_BINARY = {"add": "add", "sub": "subtract", "mul": "multiply"}
_SYMBOL = {"add": "+", "sub": "-", "mul": "*"}
_BITWISE = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}


def _float_template(i: Instruction, template: str) -> str:
    """With `.ftz`, subnormal sources and results are zero (PTX ISA 9.7.3)."""
    if not i.has("ftz"):
        return template
    for n in range(3):
        template = template.replace(f"{{{n}}}", f"flush({{{n}}})")
    return f"flush({template})"


@_lowers("add", "sub", "mul")
def _arithmetic(i: Instruction):
    """add, sub, mul (PTX ISA 9.7.1.1-3, 9.7.3.3-5, 9.7.4.1-3)."""
    name, ty = i.parts[0], i.type
    if i.has("cc") or i.has("sat"):
        return None
    if ty in ("f32", "f32x2", "f64"):
        if i.has("rm"):
            return _one(i, "add_toward_minus({0},{1})", DTYPE[ty]) if name == "add" and ty != "f64" else None
        if i.has("rz") or i.has("rp"):
            return None
        if i.has("ftz"):
            return _one(i, f"flush(flush({{0}}){_SYMBOL[name]}flush({{1}}))", DTYPE[ty])
        return _one(i, _BINARY[name], DTYPE[ty])
    if ty in ("f16x2", "bf16x2"):
        return _one(i, f"half_op({_BINARY[name]},{ty[:-2]!r},{{0}},{{1}})", "u4")
    if ty in ("f16", "bf16"):
        return _one(i, f"half_scalar({_BINARY[name]},{ty!r},{{0}},{{1}})", "u2")
    if ty not in DTYPE:
        return None
    dtype = DTYPE[ty]
    if name != "mul" or i.has("lo"):
        return _one(i, _BINARY[name], dtype)
    if i.has("hi"):
        return _one(i, f"mul_high({{0}},{{1}},{dtype})", dtype)
    if i.has("wide"):
        wide = dtype[0] + str(2 * int(dtype[1]))
        return [(f"as_type({{0}},{wide})*as_type({{1}},{wide})", i.operands[0], wide,
                 [(x, dtype) for x in i.operands[1:]])]  # fmt: skip
    return None


@_lowers("mad")
def _multiply_add(i: Instruction):
    """mad (PTX ISA 9.7.1.4)."""
    dtype = DTYPE[i.type]
    if i.type in ("f32", "f64"):
        return _fused(i)
    if i.has("lo"):
        return _one(i, "{0}*{1}+{2}", dtype)
    if i.has("wide"):
        wide = dtype[0] + str(2 * int(dtype[1]))
        return _one(i, f"as_type({{0}},{wide})*as_type({{1}},{wide})+{{2}}", wide, [dtype, dtype, wide])
    if i.has("hi"):
        return _one(i, f"mul_high({{0}},{{1}},{dtype})+{{2}}", dtype)
    return None


@_lowers("fma")
def _fused(i: Instruction):
    """fma (PTX ISA 9.7.3.6, 9.7.4.4; mixed precision 9.7.5)."""
    ty = i.type
    if i.parts[-2:] == ("f32", "bf16") or i.parts[-2:] == ("f32", "f16"):
        decode = "bf16_value({%d})" if ty == "bf16" else "as_type({%d}.view(f2),f4)"
        return _one(i, f"fma({decode % 0},{decode % 1},{{2}})", "f4", ["u2", "u2", "f4"])
    if i.has("sat") or i.has("relu") or i.has("rz") or i.has("rp"):
        return None
    if ty in ("f32", "f32x2"):
        template = "fma_toward_minus({0},{1},{2})" if i.has("rm") else "fma({0},{1},{2})"
        return _one(i, _float_template(i, template), DTYPE[ty])
    if ty == "f64":
        return _one(i, "{0}*{1}+{2}", "f8")
    if ty in ("f16x2", "bf16x2"):
        return _one(i, f"half_op(fma,{ty[:-2]!r},{{0}},{{1}},{{2}})", "u4")
    if ty in ("f16", "bf16"):
        return _one(i, f"half_scalar(fma,{ty!r},{{0}},{{1}},{{2}})", "u2")
    return None


@_lowers("div", "rem")
def _division(i: Instruction):
    """div, rem (PTX ISA 9.7.1.8-9, 9.7.3.8)."""
    dtype = DTYPE[i.type]
    if i.type in ("f32", "f64"):
        return _one(i, _float_template(i, "{0}/{1}"), dtype)
    return _one(i, f"{'divide' if i.parts[0] == 'div' else 'remainder'}({{0}},{{1}},{dtype})", dtype)


@_lowers("max", "min")
def _extremum(i: Instruction):
    """max, min: without `.NaN` a NaN operand is ignored (PTX ISA 9.7.1.10-11, 9.7.3.11-12, 9.7.4.7-8)."""
    name, ty = i.parts[0], i.type
    if i.has("xorsign") or i.has("abs") or (i.has("relu") and ty != "s32"):
        return None
    if i.has("relu"):
        return _one(i, f"maximum({name}imum({{0}},{{1}}),i4(0))", "i4")
    function = {("max", True): "maximum", ("max", False): "fmax", ("min", True): "minimum", ("min", False): "fmin"}
    if ty in ("f32", "f64", "f16x2", "bf16x2", "f16", "bf16"):
        ufunc = function[name, i.has("NaN")]
        if ty in ("f16x2", "bf16x2", "f16", "bf16"):
            helper = "half_op" if ty.endswith("x2") else "half_scalar"
            return _one(i, f"{helper}({ufunc},{ty.removesuffix('x2')!r},{{0}},{{1}})", DTYPE[ty])
        if len(i.operands) == 4:
            return _one(i, f"{ufunc}({ufunc}({{0}},{{1}}),{{2}})", DTYPE[ty])
        return _one(i, _float_template(i, f"{ufunc}({{0}},{{1}})") if i.has("ftz") else ufunc, DTYPE[ty])
    if DTYPE[ty][0] in "ui" and not ty.endswith("x2"):
        return _one(i, "maximum" if name == "max" else "minimum", DTYPE[ty])
    return None


@_lowers("and", "or", "xor")
def _logic(i: Instruction):
    """and, or, xor (PTX ISA 9.7.8.1-3)."""
    return _one(i, _BITWISE[i.parts[0]], DTYPE[i.type])


@_lowers("not", "neg", "abs", "cnot")
def _unary(i: Instruction):
    """not, neg, abs (PTX ISA 9.7.8.4, 9.7.1.12-13, 9.7.3.9-10)."""
    name, ty = i.parts[0], i.type
    if name == "cnot":
        return None
    if ty in ("f16x2", "bf16x2"):  # sign bits only, so the bits of a NaN survive
        return _one(i, "{0}^u4(0x80008000)" if name == "neg" else "{0}&u4(0x7FFF7FFF)", "u4")
    if ty in ("f16", "bf16"):
        return _one(i, "{0}^u2(0x8000)" if name == "neg" else "{0}&u2(0x7FFF)", "u2")
    function = {"not": "invert", "neg": "negative", "abs": "absolute"}[name]
    if i.has("ftz"):
        return _one(i, f"flush({function}({{0}}))", DTYPE[ty])
    return _one(i, function, DTYPE[ty])


@_lowers("shl", "shr")
def _shift(i: Instruction):
    """shl, shr (PTX ISA 9.7.8.6-7)."""
    dtype, left = DTYPE[i.type], i.parts[0] == "shl"
    if not left and i.type[0] == "b":
        dtype = "u" + dtype[1]
    count, bits = i.operands[2], 8 * int(dtype[1])
    if isinstance(count, Imm):
        if count.value < bits:
            operands = [(i.operands[1], dtype), (count, dtype)]
            return [("left_shift" if left else "right_shift", i.operands[0], dtype, operands)]
        if dtype[0] == "u" or left:
            return [(f"zeros_like({{0}},dtype={dtype})", i.operands[0], dtype, [(i.operands[1], dtype)])]
        return [("right_shift", i.operands[0], dtype, [(i.operands[1], dtype), (Imm(bits - 1), dtype)])]
    return _one(i, f"shift_{'left' if left else 'right'}({{0}},{{1}},{dtype})", dtype, [dtype, "u4"])


@_lowers("shf")
def _funnel(i: Instruction):
    """shf (PTX ISA 9.7.8.5)."""
    return _one(i, f"funnel_shift({{0}},{{1}},{{2}},{i.parts[1] == 'r'},{i.has('wrap')})", "u4")


@_lowers("bfe", "bfi", "prmt", "lop3", "popc", "brev", "clz", "bfind")
def _bits(i: Instruction):
    """bfe, bfi, prmt, lop3, popc, brev, clz, bfind (PTX ISA 9.7.1.14-20, 9.7.8.8, 9.7.9.7)."""
    name, ty = i.parts[0], i.type
    if name == "bfe":
        return _one(i, f"bit_extract({{0}},{{1}},{{2}},{DTYPE[ty]})", DTYPE[ty], [DTYPE[ty], "u4", "u4"])
    if name == "lop3" and len(i.operands) == 5 and isinstance(i.operands[4], Imm):
        sources = [(x, "u4") for x in i.operands[1:4]]
        return [(f"lop3({{0}},{{1}},{{2}},{i.operands[4].value})", i.operands[0], "u4", sources)]
    if name == "popc" and ty in ("b32", "b64"):
        return _one(i, "as_type(bitwise_count({0}),u4)", "u4", [DTYPE[ty]])
    if ty not in ("b32", "u32"):
        return None
    template = {"bfi": "bit_insert({0},{1},{2},{3})", "prmt": "permute({0},{1},{2})", "brev": "reverse_bits({0})",
                "clz": "leading_zeros({0})", "bfind": "find_top_bit({0})"}.get(name)  # fmt: skip
    if template is None or i.parts[1:] != (ty,):
        return None
    return _one(i, template, "u4")


@_lowers("selp")
def _select(i: Instruction):
    """selp (PTX ISA 9.7.6.3)."""
    dtype = DTYPE[i.type]
    return _one(i, "where({2},{0},{1})", dtype, [dtype, dtype, "b1"])


_COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
            "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal"}  # fmt: skip
_UNORDERED = {"ltu": "greater_equal", "leu": "greater", "gtu": "less_equal", "geu": "less"}


def _comparison(name: str, ty: str) -> str | None:
    """The template of a comparison; on floats the plain forms are false for NaN, the `u` forms true (9.7.6.2)."""
    if ty not in ("f32", "f64", "f16"):
        return f"{_COMPARE[name]}({{0}},{{1}})" if name in _COMPARE else None
    if name == "ne":
        return "(({0}<{1})|({0}>{1}))"
    if name == "neu":
        return "not_equal({0},{1})"
    if name == "equ":
        return "~(({0}<{1})|({0}>{1}))"
    if name in _UNORDERED:
        return f"~{_UNORDERED[name]}({{0}},{{1}})"
    if name in ("nan", "num"):
        return ("~" if name == "nan" else "") + "is_number({0},{1})"
    return f"{_COMPARE[name]}({{0}},{{1}})" if name in _COMPARE else None


@_lowers("setp")
def _set_predicate(i: Instruction):
    """setp, with its boolean combination and its second destination (PTX ISA 9.7.6.2, 9.7.7.2)."""
    ty, operands = i.type, i.operands
    if ty == "bf16":
        comparison = _comparison(i.parts[1], "f32")
        comparison = comparison and comparison.format("bf16_value({0})", "bf16_value({1})")
    else:
        comparison = _comparison(i.parts[1], ty)
    if comparison is None or ty not in DTYPE or ty.endswith("x2"):
        return None
    sources = [(operands[1], DTYPE[ty]), (operands[2], DTYPE[ty])]
    positive, negative = comparison, f"~{comparison}"
    if len(operands) == 4:
        combine = {"and": "&", "or": "|", "xor": "^"}[i.parts[2]]
        sources.append((operands[3], "b1"))
        positive, negative = (f"(({x}){combine}{{2}})" for x in (positive, negative))
    if isinstance(operands[0], Pair):
        return [(positive, operands[0].first, "b1", sources), (negative, operands[0].second, "b1", sources)]
    if len(operands) == 3 and comparison.split("(")[0] in _COMPARE.values() and ty != "bf16":
        positive = comparison.split("(")[0]
    return [(positive, operands[0], "b1", sources)]


@_lowers("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")
def _transcendental(i: Instruction):
    """The special functions (PTX ISA 9.7.3.13-22, 9.7.4.9-10), computed to float32 accuracy instead of the
    hardware's 2 ulp or so."""
    template = {"ex2": "exp2", "lg2": "log2", "rcp": "reciprocal({0})", "rsqrt": "reciprocal_sqrt({0})",
                "sqrt": "sqrt", "tanh": "tanh", "sin": "sin", "cos": "cos"}[i.parts[0]]  # fmt: skip
    if i.type == "f32":
        call = template if "{" in template else template + "({0})"
        return _one(i, f"flush({call.replace('{0}', 'flush({0})')})" if i.has("ftz") else call, "f4")
    if i.type == "f64" and i.parts[0] in ("rcp", "sqrt"):
        return _one(i, "f8(1)/{0}" if i.parts[0] == "rcp" else "sqrt", "f8")
    if i.type in ("f16x2", "bf16x2") and "{" not in template:
        return _one(i, f"half_op({template},{i.type[:-2]!r},{{0}})", "u4")
    if i.type in ("f16", "bf16") and "{" not in template:
        return _one(i, f"half_scalar({template},{i.type!r},{{0}})", "u2")
    return None


@_lowers("copysign")
def _copysign(i: Instruction):
    """copysign d, a, b: b with the sign of a (PTX ISA 9.7.3.2)."""
    return _one(i, "copysign({1},{0})", DTYPE[i.type])


_PACKED_CVT = {("bf16x2", "f32"): "pack_bf16({0},{1})", ("f16x2", "f32"): "pack_f16({0},{1})",
               ("e4m3x2", "f32"): "pack_e4m3({0},{1})", ("e5m2x2", "f32"): "pack_e5m2({0},{1})"}  # fmt: skip


@_lowers("cvt")
def _convert(i: Instruction):
    """cvt (PTX ISA 9.7.9.21)."""
    to, source = i.parts[-2], i.parts[-1]
    if i.has("relu") or i.has("sat"):
        return None
    if (to, source) in _PACKED_CVT:
        if i.has("rz") or i.has("rs") or (to[0] == "e" and not i.has("satfinite")):
            return None
        return _one(i, _PACKED_CVT[to, source], "u2" if to[0] == "e" else "u4", ["f4", "f4"])
    if source in ("e4m3x2", "e5m2x2") and to == "f16x2":
        return _one(i, f"unpack_fp8({{0}},{source[:-2]!r})", "u4", ["u2"])
    if to == "bf16":
        if source == "f32":
            return _one(i, "bf16_bits_truncated({0})" if i.has("rz") else "bf16_bits({0})", "u2", ["f4"])
        if source == "f16":
            return _one(i, "bf16_bits(as_type({0},f4))", "u2", ["f2"])
        if source[0] in "us":
            return _one(i, "bf16_bits(as_type({0},f4))", "u2", [DTYPE[source]])
        return None
    if to == "tf32" and source == "f32":
        return _one(i, "round_tf32({0})", "u4", ["f4"])
    if source == "bf16":
        if to == "f32":
            return _one(i, "bf16_value({0})", "f4", ["u2"])
        if to == "f16":
            return _one(i, "as_type(bf16_value({0}),f2)", "f2", ["u2"])
        return None
    td, ts = DTYPE.get(to), DTYPE.get(source)
    if td is None or ts is None or "x2" in (to[-2:], source[-2:]):
        return None
    rounding = next((p for p in i.parts if p in ("rzi", "rni", "rmi", "rpi")), None)
    if ts[0] == "f" and td[0] in "ui":
        return _one(i, f"float_to_int({{0}},{rounding!r},{td})", td, [ts]) if rounding else None
    if ts == td and ts[0] == "f":
        if rounding is None:
            return _one(i, _float_template(i, "{0}"), td, [ts])
        return _one(i, _float_template(i, f"round_float({{0}},{rounding!r})"), td, [ts])
    if i.has("rz") or i.has("rm") or i.has("rp"):
        return None
    return _one(i, f"as_type({{0}},{td})", td, [ts])


@_lowers("mov")
def _move(i: Instruction):
    """mov, including packing and unpacking of vectors (PTX ISA 9.7.9.3-4)."""
    ty, (destination, source) = i.type, i.operands
    if ty == "b128":
        raise NotSimple(i.text)
    if isinstance(destination, Vec):
        return _unpack(destination.items, source, ty)
    if isinstance(source, Vec):
        return _pack(destination, source.items, ty)
    dtype = DTYPE[ty]
    if isinstance(source, (Param, Symbol)):
        return [("{0}", destination, dtype.replace("f", "u"), [(source, dtype.replace("f", "u"))])]
    if ty in ("f32", "f64") and isinstance(source, FloatImm):
        return [("{0}", destination, dtype, [(source, dtype)])]
    return [("{0}", destination, dtype if dtype == "b1" else "u" + dtype[-1], [(source, _bit_type(dtype))])]


def _bit_type(dtype: str) -> str:
    return dtype if dtype == "b1" else "u" + dtype[-1]


def _unpack(items: tuple, source, ty: str):
    if ty == "b64" and len(items) == 2:
        return [("as_type({0},u4)", items[0], "u4", [(source, "u8")]),
                ("as_type({0}>>u8(32),u4)", items[1], "u4", [(source, "u8")])]  # fmt: skip
    if ty == "b32" and len(items) == 2:
        return [("as_type({0},u2)", items[0], "u2", [(source, "u4")]),
                ("as_type({0}>>u4(16),u2)", items[1], "u2", [(source, "u4")])]  # fmt: skip
    if ty == "b64" and len(items) == 4:
        return [(f"as_type({{0}}>>u8({16 * n}),u2)", item, "u2", [(source, "u8")]) for n, item in enumerate(items)]
    if ty == "b32" and len(items) == 4:
        return [(f"as_type(({{0}}>>u4({8 * n}))&u4(255),u2)", item, "u2", [(source, "u4")])
                for n, item in enumerate(items)]  # fmt: skip
    if ty == "b16" and len(items) == 2:
        return [(f"({{0}}>>u2({8 * n}))&u2(255)", item, "u2", [(source, "u2")]) for n, item in enumerate(items)]
    return None


def _pack(destination, items: tuple, ty: str):
    if ty == "b64" and len(items) == 2:
        return [("as_type({0},u8)|(as_type({1},u8)<<u8(32))", destination, "u8", [(x, "u4") for x in items])]
    if ty == "b32" and len(items) == 2:
        return [("as_type({0},u4)|(as_type({1},u4)<<u4(16))", destination, "u4", [(x, "u2") for x in items])]
    if ty == "b64" and len(items) == 4:
        template = "|".join(f"(as_type({{{n}}},u8)<<u8({16 * n}))" for n in range(4))
        return [(template, destination, "u8", [(x, "u2") for x in items])]
    if ty == "b32" and len(items) == 4:
        template = "|".join(f"((as_type({{{n}}},u4)&u4(255))<<u4({8 * n}))" for n in range(4))
        return [(template, destination, "u4", [(x, "u2") for x in items])]
    if ty == "b16" and len(items) == 2:
        return [("({0}&u2(255))|({1}<<u2(8))", destination, "u2", [(x, "u2") for x in items])]
    return None


@_lowers("cvta")
def _generic_address(i: Instruction):
    """cvta: between a state space's addresses and generic ones (PTX ISA 9.7.9.20)."""
    to_space = i.parts[1] == "to"
    space = i.parts[2 if to_space else 1].split("::")[0]
    dtype = DTYPE[i.type]
    if space == "global":
        return _one(i, "{0}", dtype)
    if space == "param" and not to_space:  # a parameter's address is generic already, unless it came through 32 bits
        return _one(i, f"{{0}}|u8({PARAM_WINDOW})", dtype)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space)
    if window is None:
        return None
    return _one(i, f"{{0}}{'-' if to_space else '+'}u8({window})", dtype)
