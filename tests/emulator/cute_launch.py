"""Launching a CuTe DSL kernel from the artifacts that its compiler keeps: PTX and IR, nothing else.

`CUTE_DSL_KEEP=ptx,ir` leaves both. The IR ends with the host function, whose `cuda.launch_ex` lists the kernel's
operands with their types in the order of the PTX parameters. A type says how the operand is packed: a memref is a
pointer and its dynamic leaves, a coordinate tensor its dynamic leaves alone, a TMA atom 128 bytes, a static layout
nothing. So values are packed here from host arrays, without the DSL's run time. Grid, block, cluster and shared
memory come from the caller, who owns the scheduler. docs/emulator.md states the licence boundary that this module
keeps.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import EmulatorError
from .launcher import Launch, load_program
from .machine import Result
from .program import Program
from .tensor_map import TensorMap

MAX_DYNAMIC_SHARED = 232448
"""Dynamic shared memory of a block at most, 227 KiB."""

_ELEMENT = {"bf16": "bf16", "f16": "f16", "f32": "f32", "tf32": "tf32", "i32": "s32", "i8": "u8", "f8E4M3FN": "u8",
            "f8E5M2": "u8"}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """One operand of the launch that occupies parameter bytes.

    kind: "coordinates", "memref", "tma", "divmod", "opaque", "f32", "i32" or "i64". leaves: for memrefs and coordinates
    the static or dynamic (None) sizes, flattened; strides: likewise with a flag for 64-bit. box, modes, swizzle: of
    a TMA atom, innermost dimension first; `modes[i]` is the tensor mode of map dimension i.
    """

    kind: str
    name: str
    type: str
    leaves: tuple = ()
    strides: tuple = ()
    box: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    swizzle: int = 0
    element: str = ""


def read_operands(ir: str, kernel: str | None = None) -> list[Operand]:
    """Operands of the kernel launch in kept IR that take part in the PTX parameters, in order.

    Raises `EmulatorError` on a type that it does not know.
    """
    aliases = dict(re.findall(r"^(![\w.]+) = (.*)$", ir, re.M))
    launches = [line for line in ir.splitlines() if "cuda.launch_ex" in line and (kernel is None or kernel in line)]
    if len(launches) != 1:
        raise EmulatorError(f"{len(launches)} kernel launches in the IR, expected one; name the kernel")
    match = re.search(
        r"<%[\w#]+>\s*\((.*?)\)\s*(?:\{.*?\}\s*)?:\s*!cuda\.launch_cfg<[^>]*>,\s*\((.*)\)\s*->", launches[0]
    )
    if not match:
        raise EmulatorError("the IR's launch could not be read")
    names, types = _split(match[1]), _split(match[2])
    found = (_operand(name, _resolve(ty, aliases), ir, aliases) for name, ty in zip(names, types))
    return [operand for operand in found if operand is not None]


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes."""
    out, depth, quoted, start = [], 0, False, 0
    for at, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char in "(<[{":
            depth += 1
        elif char in ")>]}" and text[at - 1] != "-":
            depth -= 1
        elif char == "," and depth == 0:
            out.append(text[start:at].strip())
            start = at + 1
    out.append(text[start:].strip())
    return out


def _resolve(ty: str, aliases: dict[str, str]) -> str:
    return aliases.get(ty, ty)


def _leaves(text: str) -> tuple:
    """The leaves of a shape or stride such as `(?{i64 div=8},1,(?,128))`: ints, or ("?", is_i64)."""
    out = []
    for token in re.findall(r"\?(?:\{[^}]*\})?|-?\d+(?:@\d+)?", text):
        out.append(("?", "i64" in token) if token[0] == "?" else int(token.split("@")[0]))
    return tuple(out)


def _operand(name: str, ty: str, ir: str, aliases: dict[str, str]) -> Operand | None:
    if ty in ("f32", "i32", "i64"):
        return Operand(ty, name, ty)
    if ty.startswith("!cute.coord_tensor"):
        shape = re.findall(r'"([^"]*)"', ty)[1].split(":")[0]
        leaves = _leaves(shape)
        return Operand("coordinates", name, ty, leaves) if any(isinstance(x, tuple) for x in leaves) else None
    if ty.startswith("!cute.memref"):
        shape, _, stride = re.search(r'"([^"]*)"', ty).group(1).partition(":")  # type: ignore[union-attr]
        return Operand("memref", name, ty, _leaves(shape), _leaves(stride))
    if "tiled_tma_load" in ty or "tiled_tma_store" in ty or "tiled_tma_reduce" in ty:
        return _tma(name, ty, ir)
    if "fast_divmod_divisor" in ty:
        return Operand("divmod", name, ty)
    if ty.startswith("!cute.tiled_mma"):
        return Operand("opaque", name, ty)
    if ty.startswith("!cute.ptr"):
        return Operand("memref", name, ty)
    if ty.startswith(
        (
            "!cute.composed_layout",
            "!cute.layout",
            "!cute.tile",
            "!cute.shape",
            "!cute.stride",
            "!cute.int_tuple",
            "!cute.swizzle",
        )
    ):
        if "?" in ty:
            leaves = _leaves(ty)
            return Operand("coordinates", name, ty, tuple(x for x in leaves if isinstance(x, tuple)))
        return None
    raise EmulatorError(f"launch operand {name} of a type that is not packed yet: {ty[:120]}")


def _tma(name: str, ty: str, ir: str) -> Operand:
    box_text, _, basis_text = re.search(r'tma_gbasis = <"([^"]*)">', ty).group(1).partition(":")  # type: ignore[union-attr]
    box = tuple(int(x) for x in re.findall(r"\d+", box_text))
    # A basis element `1@1@0` is submode 1 of mode 0: the path reads from the right.
    paths = [tuple(int(x) for x in path.split("@")[:0:-1]) for path in re.findall(r"\d+(?:@\d+)+", basis_text)]
    modes = tuple(sorted(paths).index(path) for path in paths)
    made = re.search(rf"{re.escape(name)}, %[\w#]+ = cute_nvgpu\.atom\.make_non_exec_tiled_tma_\w+\([^)]*\).*", ir)
    if not made:
        raise EmulatorError(f"the IR does not say how TMA atom {name} is made")
    swizzle = re.search(r"S<(\d),4,3>", made.group(0))
    span = {0: 0, 1: 32, 2: 64, 3: 128}[int(swizzle.group(1))] if swizzle else 0
    element = re.search(r"non_exec_tiled_tma_\w+<(?:sm_\w+, )?(\w+)", ty).group(1)  # type: ignore[union-attr]
    return Operand("tma", name, ty, box=box, modes=modes, swizzle=span, element=_ELEMENT[element])


def fast_divmod(divisor: int) -> bytes:
    """The 12 bytes of a `fast_divmod_divisor`: divisor, multiplier, two shifts."""
    log = (divisor - 1).bit_length()
    multiplier = (1 << 32) * ((1 << log) - divisor) // divisor + 1
    return struct.pack("<IIBBxx", divisor, multiplier & 0xFFFFFFFF, min(log, 1), max(log - 1, 0))


def _strides(array) -> tuple[int, ...]:
    if hasattr(array, "stride"):
        return tuple(array.stride())
    return tuple(s // array.itemsize for s in array.strides)


def _itemsize(array) -> int:
    return array.element_size() if hasattr(array, "element_size") else array.itemsize


def _add(setup: Launch, operand: Operand, value) -> None:
    kind = operand.kind
    if kind == "opaque":
        setup.add_bytes(b"")
    elif kind == "divmod":
        setup.add_bytes(fast_divmod(value))
    elif kind == "tma":
        dims = tuple(int(value.shape[m]) for m in operand.modes)
        strides = tuple(_strides(value)[m] * _itemsize(value) for m in operand.modes)
        address = setup.memory(value, operand.name)
        setup.add(TensorMap(address, dims, strides[1:], operand.box, operand.swizzle, operand.element))
    elif kind == "coordinates":
        sizes = tuple(value.shape) if hasattr(value, "shape") else tuple(value)
        if len(sizes) == len(operand.leaves):
            sizes = tuple(s for s, leaf in zip(sizes, operand.leaves) if isinstance(leaf, tuple))
        setup.add_bytes(struct.pack(f"<{len(sizes)}i", *map(int, sizes)))
    elif kind == "memref":
        raw = struct.pack("<Q", setup.memory(value, operand.name))
        shape = [int(s) for s, leaf in zip(value.shape, operand.leaves) if isinstance(leaf, tuple)]
        raw += struct.pack(f"<{len(shape)}i", *shape)
        for stride, leaf in zip(_strides(value), operand.strides):
            if isinstance(leaf, tuple):
                if leaf[1]:
                    raw += bytes(-len(raw) % 8)
                raw += struct.pack("<q" if leaf[1] else "<i", int(stride))
        setup.add_bytes(raw)
    else:
        setup.add(float(value) if kind == "f32" else int(value))


def launch_cute(
    ptx: str | Program,
    ir: str,
    grid,
    block,
    values: Sequence,
    *,
    kernel: str | None = None,
    cluster=(1, 1, 1),
    dynamic_shared: int = MAX_DYNAMIC_SHARED,
    seed: int = 0,
    check: bool = True,
    **machine,
) -> Result:
    """Runs a kernel of the CuTe DSL from its kept PTX and IR.

    values: one for each operand of `read_operands`, in order. Arrays (numpy or CPU torch, viewed in the kernel's mode
    order) stand for memrefs, TMA atoms and, by their sizes, coordinate tensors; ints for i32 and divisors; None for
    what the kernel does not read (tiled MMAs).
    Raises ValueError if the values do not match the PTX parameters, else as `launcher.launch`.
    """
    program = load_program(ptx, kernel) if isinstance(ptx, str) else ptx
    operands = read_operands(ir, program.kernel.name)
    if len(operands) != len(program.kernel.params):
        raise ValueError(
            f"the IR names {len(operands)} packed operands, the PTX has {len(program.kernel.params)} parameters"
        )
    if len(values) != len(operands):
        raise ValueError(f"values: {len(values)} for operands {[(o.kind, o.name) for o in operands]}")
    setup = Launch(program)
    for operand, value in zip(operands, values):
        _add(setup, operand, value)
    return setup.run(grid, block, cluster=cluster, dynamic_shared=dynamic_shared, seed=seed, check=check, **machine)
