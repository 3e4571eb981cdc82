"""The host function of a CuTe DSL kernel, executed from its kept IR: from tensors and numbers to a launch.

`CUTE_DSL_KEEP=ir` leaves the IR, which ends with the function that a call would run: it views the tensors in the
kernel's mode order, makes TMA maps of the views, and launches. Its few operations on shapes, strides and pointers are
carried out here on host arrays, each only if the launch needs it. docs/emulator.md states the licence boundary.
"""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cute_launch import Operand, read_operands
from .errors import EmulatorError
from .launcher import Launch
from .machine import Result
from .program import Program
from .tensor_map import TensorMap


@dataclass(frozen=True)
class Layout:
    """Flattened sizes and strides, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Pointer:
    """An element of an array, counted from the array's first; it may lie outside as long as nothing reads there."""

    array: Any
    offset: int = 0


@dataclass(frozen=True)
class View:
    """An array seen through a layout."""

    pointer: Pointer
    layout: Layout


def _leaves(text: str) -> list[int | None]:
    """The leaves of a tuple type such as `(?{i64 div=8},1,(?,128))`; None where the IR leaves one open."""
    tokens = re.findall(r"\?(?:\{[^}]*\})?|-?\d+(?:@\d+)*", text)
    return [None if token[0] == "?" else int(token.split("@")[0]) for token in tokens]


def _filled(text: str, open_leaves: Sequence[int]) -> tuple[int, ...]:
    """The leaves of a type with the open ones in order of appearance."""
    values = iter(open_leaves)
    return tuple(next(values) if leaf is None else leaf for leaf in _leaves(text))


def _quoted(type_text: str) -> str:
    return re.findall(r'"([^"]*)"', type_text)[-1]


class HostFunction:
    """The launching function of kept IR. `call` runs it on the emulator."""

    def __init__(self, ir: str, kernel: str) -> None:
        self.aliases = dict(re.findall(r"^(![\w.]+) = (.*)$", ir, re.M))
        lines = ir[ir.rindex("func.func @") :].splitlines()
        self.arguments = re.findall(r"(%\w+): ([^%]+?)(?:, (?=%)|\) ->)", lines[0])
        self.definitions: dict[str, tuple[int, str]] = {}
        for line in lines[1:]:
            names, equals, body = line.strip().partition(" = ")
            if equals and names.startswith("%"):
                for i, name in enumerate(names.split(", ")):
                    self.definitions[name] = (i, body)
        self.launch = next(line for line in lines if "cuda.launch_ex" in line)
        self.config = "\n".join(line for line in lines if re.search(r"cuda\.launch_cfg\.(create|cluster_dim)", line))
        self.operands = {operand.name: operand for operand in read_operands(ir, kernel)}

    def call(self, program: Program, arguments: Sequence[Any], *, seed: int = 0, **machine) -> Result:
        """Runs the kernel as a call with these arguments would: tensors, numbers and None in the order of the Python
        function, without the stream. Arrays are written in place. Raises as `launcher.launch`.
        """
        given = [value for value in arguments if value is not None]
        values: dict[str, Any] = {}
        for (name, type_text), value in zip(self.arguments, given):
            values[name] = _view_of(value) if "memref" in type_text else value
        setup = Launch(program)
        names = re.findall(r"%[\w#]+", self.launch.split("> (", 1)[1].split(")", 1)[0])
        for name in names:
            if name in self.operands:
                self._pack(setup, self.operands[name], self._value(name, values))
        grid, block = (self._dimensions(rf"{word} = \(([^)]*)\)", values) for word in ("gridDim", "blockDim"))
        cluster = self._dimensions(r"cluster_dim\[.*?\] \(([^)]*)\)", values)
        shared = machine.pop("dynamic_shared")
        return setup.run(grid, block, cluster=cluster, dynamic_shared=shared, seed=seed, **machine)

    def _dimensions(self, pattern: str, values: dict[str, Any]) -> tuple[int, int, int]:
        match = re.search(pattern, self.config)
        if match is None:
            return (1, 1, 1)
        x, y, z = (self._value(name, values) for name in match[1].split(", "))
        return x, y, z

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        if name not in values:
            index, body = self.definitions[name]
            op, rest = re.match(r"([\w.]+)(.*)", body).groups()  # type: ignore[union-attr]
            inputs = [self._value(x, values) for x in self._inputs(op, rest)]
            values[name] = self._run(op, rest, inputs, index)
        return values[name]

    @staticmethod
    def _inputs(op: str, rest: str) -> list[str]:
        if "make_non_exec_tiled_tma" in op:  # the rest describes shared memory, which the atom's type states
            return re.findall(r"%[\w#]+", rest)[:1]
        return re.findall(r"%[\w#]+", rest.split(" : ")[0])

    def _run(self, op: str, rest: str, inputs: list[Any], index: int) -> Any:
        type_text = rest.rsplit("-> ", 1)[-1] if "-> " in rest else rest.rsplit(" : ", 1)[-1]
        type_text = self.aliases.get(type_text, type_text)
        if op == "arith.constant":
            number = rest.split()[0]
            return np.float32(number) if type_text == "f32" else int(number)
        if op in _ARITHMETIC:
            return _ARITHMETIC[op](*inputs)
        if op == "arith.cmpf":
            return _COMPARISONS[rest.split(",")[0].strip()](*inputs)
        if op == "cute.get_iter":
            return inputs[0].pointer
        if op == "cute.get_layout":
            return inputs[0].layout
        if op in ("cute.get_shape", "cute.get_stride"):
            return inputs[0].shape if op.endswith("shape") else inputs[0].stride
        if op in ("cute.get_leaves", "cute.get_scalars"):
            return (inputs[0][index],) if op.endswith("leaves") else self._scalars(rest, inputs[0])[index]
        if op == "cute.to_int_tuple":
            return inputs[0]
        if op in ("cute.make_shape", "cute.make_stride", "cute.make_int_tuple", "cute.make_coord"):
            flat = [leaf for item in inputs for leaf in (item if isinstance(item, tuple) else (item,))]
            return _filled(_quoted(type_text), flat)
        if op == "cute.make_layout":
            return Layout(*inputs)
        if op == "cute.select":
            modes = [int(x) for x in re.match(r"<\[([^]]*)\]>", rest)[1].split(",")]  # type: ignore[index]
            (layout,) = inputs
            return Layout(tuple(layout.shape[m] for m in modes), tuple(layout.stride[m] for m in modes))
        if op == "cute.crd2idx":
            coordinate, layout = inputs
            return (sum(c * s for c, s in zip(coordinate, layout.stride)),)
        if op.startswith("cute.tuple_"):
            return tuple(_TUPLES[op](a, b) for a, b in zip(*inputs))
        if op == "cute.add_offset":
            pointer, offset = inputs
            return Pointer(pointer.array, pointer.offset + offset[0])
        if op == "cute.make_view":
            return View(*inputs)
        if "make_non_exec_tiled_tma" in op:
            return inputs[0]
        raise EmulatorError(f"host operation {op} is not carried out yet: {rest[:120]}")

    @staticmethod
    def _scalars(rest: str, leaves: tuple[int, ...]) -> list[int]:
        """The open leaves alone."""
        return [value for value, leaf in zip(leaves, _leaves(_quoted(rest))) if leaf is None]

    def _pack(self, setup: Launch, operand: Operand, value: Any) -> None:
        if operand.kind == "tma":
            setup.add(self._tensor_map(setup, operand, value))
        elif operand.kind == "coordinates":
            sizes = [s for s, leaf in zip(value.layout.shape, operand.leaves) if isinstance(leaf, tuple)]
            setup.add_bytes(struct.pack(f"<{len(sizes)}i", *sizes))
        elif operand.kind == "memref":
            raw = struct.pack("<Q", _address(setup, value.pointer, operand.name))
            sizes = [s for s, leaf in zip(value.layout.shape, operand.leaves) if isinstance(leaf, tuple)]
            raw += struct.pack(f"<{len(sizes)}i", *sizes)
            for stride, leaf in zip(value.layout.stride, operand.strides):
                if isinstance(leaf, tuple):
                    raw += bytes(-len(raw) % 8) if leaf[1] else b""
                    raw += struct.pack("<q" if leaf[1] else "<i", stride)
            setup.add_bytes(raw)
        elif operand.kind in ("f32", "i32", "i64"):
            setup.add(float(value) if operand.kind == "f32" else int(value))
        else:
            raise EmulatorError(f"launch operand {operand.name} of kind {operand.kind} is not packed here")

    def _tensor_map(self, setup: Launch, operand: Operand, view: View) -> TensorMap:
        # The coordinates made with the map say of each mode which of its dimensions that is; extents of 1 are none.
        bases = re.findall(r"\d+(?:@\d+)*", _quoted(self.definitions[operand.name][1]).split(":")[1])
        modes = sorted((i for i, basis in enumerate(bases) if "@" in basis), key=lambda i: int(bases[i].split("@")[1]))
        dims = tuple(view.layout.shape[mode] for mode in modes)
        size = view.pointer.array.element_size()
        strides = tuple(view.layout.stride[mode] * size for mode in modes)
        address = _address(setup, view.pointer, operand.name)
        return TensorMap(address, dims, strides[1:], operand.box, operand.swizzle, operand.element)


_ARITHMETIC = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.mulf": lambda a, b: np.float32(a) * np.float32(b),
    "arith.divf": lambda a, b: np.float32(a) / np.float32(b),
    "arith.select": lambda condition, a, b: a if condition else b,
    "arith.andi": lambda a, b: a & b,
    "arith.divsi": lambda a, b: math.trunc(a / b),
    "arith.floordivsi": lambda a, b: a // b,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.remsi": math.fmod,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.extsi": lambda a: a,
    "arith.trunci": lambda a: a,
}
_COMPARISONS = {"oge": operator.ge, "ole": operator.le}
_TUPLES = {
    "cute.tuple_add": lambda a, b: a + b,
    "cute.tuple_sub": lambda a, b: a - b,
    "cute.tuple_mul": lambda a, b: a * b,
    "cute.tuple_div": lambda a, b: a // b,
}


def _view_of(tensor) -> View:
    return View(Pointer(tensor), Layout(tuple(tensor.shape), tuple(tensor.stride())))


def _address(setup: Launch, pointer: Pointer, name: str) -> int:
    return setup.memory(pointer.array, name) + pointer.offset * pointer.array.element_size()
