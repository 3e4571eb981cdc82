"""Straight-line runs of register-only instructions, compiled to Python functions over whole register banks.

The machine keeps each register bank as a matrix: a row a register, a column a lane. Kernels are unrolled: a softmax
over 128 columns is 128 `fma`, 128 `ex2`, 64 `cvt`, each on another row. So a run is not executed one instruction at a
time. Its micro-operations are levelled by their dependences, and those of one level with the same template become one
numpy call on many rows: `exp2(WF[900:1028], WF[1100:1228])`. That is what makes a 128x128 tile take milliseconds.

A level may hold an operation that overwrites what a lower level reads, never one that conflicts within its level, so
the result equals the sequential one.
"""

from __future__ import annotations

import numpy as np

from . import lanes
from .lowering import PARAM_WINDOW, MicroOp
from .ptx import FloatImm, Imm, NotReg, Param, Reg, SpecialReg, Sum, Symbol

_VIEW = {
    ("pred", "b1"): "P", (16, "u2"): "H", (16, "i2"): "HI", (16, "f2"): "HF", (32, "u4"): "W", (32, "i4"): "WI",
    (32, "f4"): "WF", (64, "u8"): "D", (64, "i8"): "DI", (64, "f8"): "DF", (64, "x2"): "DX",
}  # fmt: skip
"""Name of a bank seen as a type: attributes of `machine.Frame`."""

_NUMPY = {"u1": np.uint8, "i1": np.int8, "u2": np.uint16, "i2": np.int16, "f2": np.float16, "u4": np.uint32,
          "i4": np.int32, "f4": np.float32, "u8": np.uint64, "i8": np.int64, "f8": np.float64}  # fmt: skip

_UFUNCS = ("add", "subtract", "multiply", "maximum", "minimum", "fmax", "fmin", "bitwise_and", "bitwise_or",
           "bitwise_xor", "invert", "negative", "absolute", "left_shift", "right_shift", "equal", "not_equal", "less",
           "less_equal", "greater", "greater_equal", "sqrt", "sin", "cos")  # fmt: skip


def as_type(x, dtype):
    """PTX register reinterpretation by value: integer widening and truncation, int to float, float width."""
    return np.asarray(x).astype(dtype)


ENVIRONMENT = {
    **{name: getattr(np, name) for name in _UFUNCS},
    **{name: getattr(lanes, name) for name in dir(lanes) if not name.startswith("_")},
    **_NUMPY,
    "where": np.where, "copyto": np.copyto, "zeros_like": np.zeros_like, "copysign": np.copysign,
    "bitwise_count": np.bitwise_count, "as_type": as_type,
}  # fmt: skip


def _width(dtype: str) -> int:
    return 64 if dtype == "x2" else 8 * int(dtype[1])


def _registers(operand) -> list:
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, NotReg):
        return [Reg("pred", operand.row)]
    if isinstance(operand, Sum):
        return [operand.base]
    return []


def _guard_register(op: MicroOp) -> Reg | None:
    return op.instruction.guard


def _source_key(operand, dtype: str):
    """What two operands must share to stand in one vectorised call; register rows and literals may differ."""
    if isinstance(operand, Reg):
        return ("reg", operand.bank)
    if isinstance(operand, NotReg):
        return ("not",)
    if isinstance(operand, Imm):
        return ("imm",)
    return operand


def schedule(ops: list[MicroOp]) -> list[list[MicroOp]]:
    """Groups of mutually independent operations of one form, in an order that keeps every dependence."""
    last_write: dict[Reg, int] = {}
    last_read: dict[Reg, int] = {}
    groups: dict[tuple, list[MicroOp]] = {}
    for op in ops:
        level = 0
        guard = _guard_register(op)
        reads = [r for operand, _ in op.sources for r in _registers(operand)] + ([guard] if guard else [])
        for register in reads:
            level = max(level, last_write.get(register, -1) + 1)
        level = max(level, last_write.get(op.destination, -1) + 1, last_read.get(op.destination, -1) + 1)
        for register in reads:
            last_read[register] = max(last_read.get(register, -1), level)
        last_write[op.destination] = level
        form = (op.template, op.dtype, op.destination.bank, guard is not None, op.instruction.guard_negated,
                tuple((dtype, _source_key(operand, dtype)) for operand, dtype in op.sources))  # fmt: skip
        groups.setdefault((level, form), []).append(op)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [members for _, members in ordered]


class _Emitter:
    """Writes the body of one generated function."""

    def __init__(self, masked: bool) -> None:
        self.masked = masked
        self.lines: list[str] = []
        self.environment = dict(ENVIRONMENT)
        self.views: set[str] = set()
        self.constants = 0

    def constant(self, value) -> str:
        name = f"K{self.constants}"
        self.constants += 1
        self.environment[name] = value
        return name

    def rows(self, rows: list[int]) -> tuple[str, bool]:
        """Index text for some rows, and whether it is a view (a single row or an arithmetic progression)."""
        first = rows[0]
        if all(r == first for r in rows):
            return str(first), True
        step = rows[1] - first
        if step > 0 and all(b - a == step for a, b in zip(rows, rows[1:])):
            stop = rows[-1] + 1
            return (f"{first}:{stop}" if step == 1 else f"{first}:{stop}:{step}"), True
        return self.constant(np.array(rows, np.intp)), False

    def view(self, bank, dtype: str) -> str:
        name = _VIEW[bank, dtype]
        self.views.add(name)
        return name

    def literals(self, values: list, dtype: str) -> str:
        typed = [_literal_bits(v, dtype) for v in values]
        if dtype == "x2":
            column = np.array(typed, np.uint64).view(np.float32).reshape(len(typed), 1, 2)
            if len(set(typed)) == 1:
                return f"F.pair({self.constant(column[0, 0])})"
            return f"F.pairs({self.constant(column)})"
        array = np.array(typed, np.bool_ if dtype == "b1" else f"u{_width(dtype) // 8}")
        array = array if dtype == "b1" else array.view(_NUMPY[dtype])
        return self.constant(array[0] if len(set(typed)) == 1 else array.reshape(-1, 1))

    def source(self, members: list[MicroOp], position: int) -> str:
        operands = [op.sources[position][0] for op in members]
        dtype = members[0].sources[position][1]
        first = operands[0]
        if isinstance(first, Reg):
            index, _ = self.rows([o.row for o in operands])
            have = 1 if first.bank == "pred" else first.bank
            if dtype == "b1" or _width(dtype) == have:
                return f"{self.view(first.bank, dtype)}[{index}]"
            # A register wider than the type gives its low bits; a narrower one (8-bit types) is widened.
            unsigned = {16: "u2", 32: "u4", 64: "u8"}[first.bank]
            text = f"as_type({self.view(first.bank, unsigned)}[{index}],u{_width(dtype) // 8})"
            return text if dtype[0] == "u" else f"{text}.view({dtype})"
        if isinstance(first, NotReg):
            index, _ = self.rows([o.row for o in operands])
            return f"(~{self.view('pred', 'b1')}[{index}])"
        if isinstance(first, (Imm, FloatImm)):
            return self.literals(operands, dtype)
        if isinstance(first, SpecialReg):
            text = f"F.special({first.name!r})"
            return text if dtype == "u4" else f"as_type({text},{dtype})"
        if isinstance(first, Symbol):
            if first.space == "shared":
                return f"{dtype}(F.shared_base+{first.offset})"
            return f"{dtype}({first.offset})"
        if isinstance(first, Param):
            return self.literals([Imm(PARAM_WINDOW + first.offset)], dtype)
        if isinstance(first, Sum):
            base = self.source([op._replace(sources=((op.sources[position][0].base, dtype),)) for op in members], 0)
            return f"({base}+{self.literals([Imm(o.offset) for o in operands], dtype)})"
        raise AssertionError(first)

    def condition(self, members: list[MicroOp], dtype: str) -> str | None:
        parts = []
        if _guard_register(members[0]) is not None:
            index, _ = self.rows([_guard_register(op).row for op in members])
            negate = "~" if members[0].instruction.guard_negated else ""
            parts.append(f"{negate}{self.view('pred', 'b1')}[{index}]")
        if self.masked:
            parts.append("m")
        if not parts:
            return None
        text = "&".join(parts)
        return f"F.both({text})" if dtype == "x2" else f"({text})"

    def group(self, members: list[MicroOp]) -> None:
        op = members[0]
        bank = op.destination.bank
        dtype = op.dtype
        if dtype != "b1" and _width(dtype) != bank:  # cvt into a wider register: extended by the type's sign
            wide = dtype[0] + str(bank // 8) if dtype[0] in "ui" else None
            if wide is None:
                raise AssertionError(op.instruction.text)
            self.write(members, f"as_type({self.expression(members)},{wide})", wide, None)
            return
        if op.template.isidentifier():
            self.write(members, None, dtype, op.template)
        else:
            self.write(members, self.expression(members), dtype, None)

    def expression(self, members: list[MicroOp]) -> str:
        sources = [self.source(members, i) for i in range(len(members[0].sources))]
        template = members[0].template
        return f"{template}({','.join(sources)})" if template.isidentifier() else template.format(*sources)

    def write(self, members: list[MicroOp], expression: str | None, dtype: str, ufunc: str | None) -> None:
        index, is_view = self.rows([op.destination.row for op in members])
        target = f"{self.view(members[0].destination.bank, dtype)}[{index}]"
        condition = self.condition(members, dtype)
        if ufunc and is_view and condition is None:
            sources = ",".join(self.source(members, i) for i in range(len(members[0].sources)))
            self.lines.append(f"{ufunc}({sources},out={target})")
            return
        expression = expression or self.expression(members)
        if condition is None:
            self.lines.append(f"{target}={expression}")
        elif is_view:
            self.lines.append(f"copyto({target},{expression},where={condition})")
        else:
            self.lines.append(f"{target}=where({condition},{expression},{target})")

    def compile(self, name: str):
        head = [f"{v}=F.{v}" for v in sorted(self.views)]
        body = "\n ".join(head + self.lines + ["return"])
        exec(compile(f"def run(F,m):\n {body}\n", name, "exec"), self.environment)
        return self.environment["run"]


def _literal_bits(operand, dtype: str) -> int:
    width = 1 if dtype == "b1" else _width(dtype)
    if isinstance(operand, FloatImm):
        if operand.width != width:
            value = np.array([operand.bits], f"u{operand.width // 8}").view(f"f{operand.width // 8}")
            return int(value.astype(f"f{width // 8}").view(f"u{width // 8}")[0])
        return operand.bits
    if dtype == "b1":
        return int(operand.value != 0)
    return operand.value & ((1 << width) - 1)


class Run:
    """A compiled run. `full` executes it for every lane of a frame, `masked` for the lanes of a mask; the second is
    compiled when a warp first diverges here."""

    def __init__(self, ops: list[MicroOp], line: int) -> None:
        self.groups = schedule(ops)
        self.name = f"<ptx line {line}>"
        self.full = self._compile(masked=False)
        self._masked = None

    def _compile(self, masked: bool):
        emitter = _Emitter(masked)
        for members in self.groups:
            emitter.group(members)
        return emitter.compile(self.name)

    def masked(self, frame, mask) -> None:
        if self._masked is None:
            self._masked = self._compile(masked=True)
        self._masked(frame, mask)
