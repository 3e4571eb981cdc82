"""Tensor maps: what `cuTensorMapEncodeTiled` describes, as plain data.

The emulator makes its own 128-byte stand-ins (an id into the launch's table), so no driver structure is imitated. The
one opaque form that it must read is the map that the CuTe DSL's host code never sees either: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ELEMENT_BYTES = {"u8": 1, "u16": 2, "f16": 2, "bf16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8,
                 "tf32": 4}  # fmt: skip

MAP_BYTES = 128
_MAGIC = b"emulated tensor map"


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map. Dimension 0 is the innermost, as in PTX coordinates.

    address: host address of element 0. dims: sizes in elements. strides: bytes from one index to the next, of
    dimensions 1 and up. box: tile in elements. swizzle: span in bytes, 0, 32, 64 or 128. element: a key of
    `ELEMENT_BYTES`.
    """

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    element: str
    nan_fill: bool = False

    def __post_init__(self) -> None:
        size = ELEMENT_BYTES[self.element]
        if not len(self.dims) == len(self.box) == len(self.strides) + 1 or not 1 <= len(self.dims) <= 5:
            raise ValueError(f"tensor map: ranks differ: {self}")
        if self.address % 16 or any(s % 16 for s in self.strides):
            raise ValueError(f"tensor map: address and strides must be multiples of 16 bytes: {self}")
        if not all(1 <= b <= 256 for b in self.box) or self.box[0] * size % 16:
            raise ValueError(f"tensor map: box {self.box} of {self.element}")
        if self.swizzle and self.box[0] * size > self.swizzle:
            raise ValueError(
                f"tensor map: inner box of {self.box[0] * size} bytes exceeds the swizzle of {self.swizzle}"
            )

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.element]

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bytes

    def window(self, coordinates: list[int]) -> tuple[tuple[slice, ...], int, tuple[int, ...], tuple[int, ...]] | None:
        """The part of a box that lies inside the tensor.

        Returns (slices of the box, address of its first element, shape, byte strides), outermost dimension first, or
        None if the box lies wholly outside.
        """
        low = [max(0, -c) for c in coordinates]
        high = [min(b, d - c) for b, d, c in zip(self.box, self.dims, coordinates)]
        if any(h <= n for n, h in zip(low, high)):
            return None
        strides = (self.element_bytes, *self.strides)
        first = self.address + sum((c + n) * s for c, n, s in zip(coordinates, low, strides))
        shape = tuple(h - n for n, h in zip(low, high))[::-1]
        return tuple(slice(n, h) for n, h in zip(low, high))[::-1], first, shape, strides[::-1]


def encode(index: int) -> bytes:
    """The 128 bytes that stand for map `index` in a launch's parameters or in global memory."""
    return (_MAGIC + b"\0" * 13 + index.to_bytes(4, "little")).ljust(MAP_BYTES, b"\0")


def decode(raw: bytes) -> int | None:
    """The index of a stand-in, or None if the bytes are no stand-in."""
    return int.from_bytes(raw[32:36], "little") if raw.startswith(_MAGIC) else None


def row_major(array, box: tuple[int, ...], swizzle: int, element: str, address: int) -> TensorMap:
    """The map of an array (numpy or torch) whose last axis is contiguous; `box` in the array's own axis order."""
    size = ELEMENT_BYTES[element]
    if isinstance(array, np.ndarray):
        strides = array.strides
    else:
        strides = tuple(s * array.element_size() for s in array.stride())
    if strides[-1] != size:
        raise ValueError("tensor map: the last axis must be contiguous")
    return TensorMap(address, tuple(array.shape)[::-1], tuple(strides[:-1])[::-1], tuple(box)[::-1], swizzle, element)
