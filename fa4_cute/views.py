"""Tensors as TMA and tensor cores take them."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

RAGGED_ROWS = 1 << 30
"""Rows of a ragged view, see `ragged`."""


def opaque(value: Int32) -> Int32:
    """The value, by an instruction that compilers do not move or see through."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def fixed(pointer: cute.Pointer) -> cute.Pointer:
    """The pointer, its address computed here: compilers would do that where it is used, which may be a loop."""
    address = opaque(Int32(pointer.toint()))
    return cute.make_ptr(pointer.dtype, address, pointer.memspace, assumed_align=pointer.alignment)


def ragged(tensor: cute.Tensor) -> cute.Tensor:
    """A (S, D, H, B) tensor as (2^30, D, H, B, end), in which TMA sees one sequence end.

    Row 2^30 - length + r of `end` = offset + length is row offset + r of the tensor, and rows from 2^30 on do not
    exist: TMA reads zeros there and writes nothing. The base is moved 2^30 rows down, which no access ever reaches.
    """
    shape, stride = tensor.layout.shape, tensor.layout.stride
    layout = cute.make_layout((RAGGED_ROWS, *shape[1:], RAGGED_ROWS), stride=(*stride, stride[0]))
    moved = cute.domain_offset((-RAGGED_ROWS, 0, 0, 0), tensor)
    return cute.make_tensor(moved.iterator, layout)


def heads_packed(tensor: cute.Tensor, packed: int) -> cute.Tensor:
    """A (S, D, H, ...) tensor as ((packed, S), D, H / packed, ...): a row for each head of a group at a position."""
    if packed == 1:
        return tensor
    (seqlen, dim, heads, *others), (row, column, head, *apart) = tensor.layout.shape, tensor.layout.stride
    shape = ((packed, seqlen), dim, heads // packed, *others)
    return cute.make_tensor(
        tensor.iterator, cute.make_layout(shape, stride=((head, row), column, head * packed, *apart))
    )


def from_position(tensor: cute.Tensor, n: Int32, packed: int) -> cute.Tensor:
    """The rows of position n and after it, of a (S, D) slice of `heads_packed`."""
    return cute.domain_offset(((0, n) if packed > 1 else n, 0), tensor)


def slots_apart(layout, slots: int, apart: int):
    """A tile layout with its slots, the last mode, `apart` elements from each other."""
    tile = cute.select(layout.outer, list(range(cute.rank(layout.outer) - 1)))
    spread = cute.append(tile, cute.make_layout(slots, stride=apart))
    return cute.make_composed_layout(layout.inner, 0, spread)


def boxes(atom: cute.CopyAtom, shared: cute.Tensor, tiles: cute.Tensor, modes: int):
    """Both sides of a TMA copy: (box, slot) in shared memory and (box, tile) in global memory."""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, modes), cute.group_modes(tiles, 0, modes)
    )
