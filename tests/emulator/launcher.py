"""From a compiled kernel and host arrays to a finished run: parameter packing, registration, verdicts.

`launch` takes any PTX; `launch_triton` takes what `triton.compile` returns. Arrays are numpy arrays or CPU torch
tensors and are read and written in place. What a GPU would fault or hang on raises an `EmulatorError`; data races raise
`RaceError` after the run, unless `check=False`.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import RaceError
from .hazards import UNFENCED
from .instructions.mbarrier import INITIALISED_AGAIN
from .machine import Machine, Result, Schedule
from .memory import Allocation, GlobalMemory
from .program import Program
from .ptx import parse
from .tensor_map import MAP_BYTES, TensorMap, encode

SWIZZLE_SPAN = {0: 0, 1: 32, 2: 64, 3: 128}


@lru_cache(maxsize=64)
def load_program(text: str, kernel: str | None = None) -> Program:
    """The executable form of one kernel of a PTX text (the only one, if `kernel` is None). Cached by text."""
    kernels = parse(text)
    if kernel is None and len(kernels) != 1:
        raise ValueError(f"kernel: name one of {sorted(kernels)}")
    return Program(kernels[kernel] if kernel is not None else next(iter(kernels.values())))


class Launch:
    """The parameters and memory of one launch.

    Add parameters in the order of the PTX; each `add_*` packs one. `memory(array)` registers an array that the kernel
    reaches through a pointer inside another parameter.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.global_memory = GlobalMemory()
        self.tensor_maps: dict[int, TensorMap] = {}
        self._values: list[bytes] = []

    def memory(self, array, name: str = "array") -> int:
        """Registers an array; returns its address."""
        return self.global_memory.add_array(array, name)

    def _next(self):
        if len(self._values) >= len(self.program.kernel.params):
            raise ValueError(
                f"more arguments than the {len(self.program.kernel.params)} parameters of {self.program.kernel.name}"
            )
        return self.program.kernel.params[len(self._values)]

    def add_bytes(self, raw: bytes) -> None:
        """The next parameter as it lies in memory; shorter values are padded with zeros."""
        param = self._next()
        if len(raw) > param.size:
            raise ValueError(f"parameter {param.name}: {len(raw)} bytes for {param.size}")
        self._values.append(raw.ljust(param.size, b"\0"))

    def add(self, value) -> None:
        """The next parameter: an array (its pointer), an int, a float, a `TensorMap`, or raw bytes."""
        param = self._next()
        if value is None:
            self.add_bytes(bytes(param.size))
        elif isinstance(value, (bytes, bytearray)):
            self.add_bytes(bytes(value))
        elif isinstance(value, TensorMap):
            index = len(self.tensor_maps) + 1
            self.tensor_maps[index] = value
            self.add_bytes(encode(index)[:MAP_BYTES])
        elif isinstance(value, float):
            self.add_bytes(struct.pack({4: "<f", 8: "<d"}[param.size], value))
        elif isinstance(value, (bool, int, np.integer)):
            self.add_bytes((int(value) & ((1 << (8 * param.size)) - 1)).to_bytes(param.size, "little"))
        else:
            self.add_bytes(self.memory(value, param.name).to_bytes(8, "little"))

    def packed(self) -> bytes:
        """The parameter block. Raises ValueError if parameters are missing."""
        params = self.program.kernel.params
        if len(self._values) != len(params):
            raise ValueError(f"{self.program.kernel.name} has {len(params)} parameters, got {len(self._values)}")
        block = bytearray(self.program.kernel.param_bytes)
        for param, raw in zip(params, self._values):
            block[param.offset : param.offset + param.size] = raw
        return bytes(block)

    def run(self, grid: Sequence[int], block: Sequence[int], *, seed: int = 0, check: bool = True, races: bool = True,
            **machine) -> Result:  # fmt: skip
        """Runs the grid under the schedule of `seed`. `machine` goes to `Machine` (cluster, dynamic_shared, ...).

        Raises `EmulatorError`, and `RaceError` if `check` and the race check reported anything.
        """
        schedule = machine.pop("schedule", None) or Schedule.from_seed(seed)
        if on_launch is not None:
            on_launch(Recording.of(self, _three(grid), _three(block), seed, machine))
        result = Machine(
            self.program,
            self.global_memory,
            self.packed(),
            _three(grid),
            _three(block),
            schedule=schedule,
            tensor_maps=self.tensor_maps,
            check_races=races,
            **machine,
        ).run()
        if check and result.races:
            raise RaceError(f"seed {seed}: {len(result.races)} reports\n  " + "\n  ".join(result.races[:20]))
        return result


on_launch: Callable[[Recording], None] | None = None
"""Called with each launch before it runs; the test fixture keeps the last one, to replay a failure."""


@dataclass
class Recording:
    """Everything that a launch depends on, as plain data: run it again in another process."""

    kernel: str
    params: bytes
    memory: list[tuple[int, int, str, bytes]]
    tensor_maps: dict[int, TensorMap]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    seed: int
    options: dict
    text: str

    @classmethod
    def of(cls, setup: Launch, grid, block, seed: int, options: dict) -> Recording:
        memory = [(a.address, a.size, a.name, a.bytes(a.address, a.size).tobytes()) for a in setup.global_memory]
        return cls(setup.program.kernel.name, setup.packed(), memory, dict(setup.tensor_maps), grid, block, seed,
                   dict(options), setup.program.kernel.text)  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes plain data, so that it loads whatever name this package was imported under."""
        maps = {index: asdict(tensor_map) for index, tensor_map in self.tensor_maps.items()}
        path.write_bytes(pickle.dumps({**vars(self), "tensor_maps": maps}))

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Load only files that your own test run wrote: they are pickles."""
        fields = pickle.loads(path.read_bytes())
        fields["tensor_maps"] = {index: TensorMap(**each) for index, each in fields["tensor_maps"].items()}
        return cls(**fields)

    def run(self, seed: int | None = None) -> Result:
        """Runs the launch again, on copies of its arrays. Races are in the result."""
        return self.replay(seed)[0]

    def replay(self, seed: int | None = None, program: Program | None = None, **machine) -> tuple[Result, GlobalMemory]:
        """As `run`, with the memory after it. program: in place of the recorded text. machine: in place of the launch's
        options."""
        memory = GlobalMemory()
        for address, size, name, content in self.memory:
            memory.add(Allocation(address, size, name, content=content))
        schedule = Schedule.from_seed(self.seed if seed is None else seed)
        options = {**self.options, **machine}
        done = Machine(program or load_program(self.text, self.kernel), memory, self.params, self.grid, self.block,
                       schedule=schedule, tensor_maps=self.tensor_maps, **options).run()  # fmt: skip
        return done, memory


def _three(shape: Sequence[int] | int) -> tuple[int, int, int]:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return shape + (1,) * (3 - len(shape))  # type: ignore[return-value]


def launch(
    ptx: str | Program,
    grid,
    block,
    args: Sequence,
    *,
    kernel: str | None = None,
    memory: Sequence = (),
    seed: int = 0,
    check: bool = True,
    **machine,
) -> Result:
    """Runs a kernel given as PTX text.

    args: one value for each PTX parameter, see `Launch.add`. memory: further arrays that the kernel may touch.
    Returns a `Result`; raises an `EmulatorError` on whatever a GPU would fault or hang on, and on races if `check`.
    """
    program = load_program(ptx, kernel) if isinstance(ptx, str) else ptx
    setup = Launch(program)
    for value in args:
        setup.add(value)
    for array in memory:
        setup.memory(array)
    return setup.run(grid, block, seed=seed, check=check, **machine)


# Triton ------------------------------------------------------------------------------------------------------------

_TRITON_ELEMENT = {
    "fp16": "f16",
    "bf16": "bf16",
    "fp32": "f32",
    "fp8e4nv": "u8",
    "fp8e5": "u8",
    "i32": "s32",
    "i8": "u8",
    "fp64": "f64",
    "i64": "s64",
    "u8": "u8",
}


TRITON_TOLERATES = ("missing mbarrier init fence", INITIALISED_AGAIN, "uninitialised read", UNFENCED)
"""Kinds of race reports that are notes for Triton's output, by its own habits (docs/emulator.md): it fences the
initialisation of some mbarriers only; where it specialises warps it initialises some that nothing uses, several times
at one place; its pipeliner reads buffers of loop iterations that do not run and drops the
values (what is read then is NaN here, so a value that is not dropped shows); and its compiler moves arithmetic on A
fragments behind the wgmma.fence, which the assembler orders."""


def launch_triton(compiled, grid, args, *, seed: int = 0, check: bool = True, memory: Sequence = (),
                  program: Program | None = None, **machine) -> Result:  # fmt: skip
    """Runs what `triton.compile(ASTSource(...), target=GPUTarget("cuda", cc, 32))` returned.

    args: the kernel's arguments without its constexprs, as a mapping by name or a sequence in signature order;
    arrays for pointers, numbers, (nested) tuples for tuple parameters, and for a `tensordesc` any object with
    `base`, `shape`, `strides` (such as `triton.tools.tensor_descriptor.TensorDescriptor`). program: runs in place
    of the compiled text.
    """
    program = program or load_program(compiled.asm["ptx"])
    setup = Launch(program)
    metadata = compiled.metadata
    descriptors = iter(getattr(metadata, "tensordesc_meta", None) or ())
    has_maps = bool(getattr(metadata, "tensordesc_meta", None))
    # A constexpr is no parameter; a literal specialised at compile time (attrs, equal to 1) is listed as constexpr too.
    signature = compiled.src.signature
    names = [n for n, ty in signature.items() if ty != "constexpr"]
    values = [args[n] for n in names] if isinstance(args, Mapping) else list(args)
    if len(values) != len(names):
        raise ValueError(f"args: {len(values)} values for {names}")
    for name, value in zip(names, values):
        _add_triton(setup, signature[name], value, descriptors, has_maps)
    for array in memory:
        setup.memory(array)
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
    for size in scratch[: len(program.kernel.params) - len(setup._values)]:
        if size:
            shape = _three(grid)
            setup.add(np.zeros(size * shape[0] * shape[1] * shape[2] * metadata.num_ctas, np.uint8))
        else:
            setup.add(0)
    machine.setdefault("tolerate", TRITON_TOLERATES)
    cluster = getattr(metadata, "cluster_dims", None) or (metadata.num_ctas, 1, 1)
    shape = _three(grid)
    return setup.run((shape[0] * cluster[0], shape[1] * cluster[1], shape[2] * cluster[2]),
                     program.kernel.required_threads or (32 * metadata.num_warps, 1, 1), seed=seed, check=check,
                     cluster=tuple(cluster), dynamic_shared=metadata.shared, **machine)  # fmt: skip


def _add_triton(setup: Launch, ty, value, descriptors, has_maps: bool) -> None:
    if isinstance(ty, (tuple, list)):
        for sub_type, sub_value in zip(ty, value):
            if sub_type != "constexpr":
                _add_triton(setup, sub_type, sub_value, descriptors, has_maps)
    elif ty.startswith("tensordesc"):
        meta = next(descriptors) if has_maps else None
        _add_descriptor(setup, ty, value, meta)
    elif ty.startswith("fp") or ty == "bf16":
        setup.add(float(value))
    elif ty.startswith("*"):
        setup.add(value)
    else:
        setup.add(int(value))


def _add_descriptor(setup: Launch, ty: str, value, meta) -> None:
    """A host-side tensor descriptor: a tensor map where the compiler asked for one, else pointer, shape, strides,
    padding
    and rounding flags; either way followed by shape and strides for the kernel's own use."""
    shape, strides = list(value.shape), list(value.strides)
    nan_fill = getattr(value, "padding", "zero") == "nan"
    if meta is None:
        setup.add(value.base)
        for number in (*shape, *strides):
            setup.add(int(number))
        setup.add(int(nan_fill))
        setup.add(int(getattr(value, "round_f32_to_tf32", False)))
    else:
        element = _TRITON_ELEMENT[re.match(r"tensordesc<([^\[>]*)", ty).group(1)]  # type: ignore[union-attr]
        size = meta["elem_size"]
        address = setup.memory(value.base, "descriptor base")
        setup.add(
            TensorMap(
                address,
                tuple(int(s) for s in shape[::-1]),
                tuple(int(s) * size for s in strides[-2::-1]),
                tuple(meta["block_size"][::-1]),
                SWIZZLE_SPAN[meta["swizzle"]],
                element,
                nan_fill,
            )
        )
    for number in (*shape, *strides):
        setup.add(int(number))
