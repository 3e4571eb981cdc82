"""A warp's view of tensor memory: 32 rows, one a thread, of 32-bit columns (PTX ISA 8.8, 9.7.16.2.3, shape 32x32b)."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import tcgen05

ROWS = 128


class TmemRows(NamedTuple):
    """The thread's row of a (128, columns) tile.

    warp: the warp's number in its warpgroup, uniform over the warp, so that addresses are computed once a warp.
    """

    tile: cute.Tensor
    warp: Int32

    def _columns(self, op, column: int, width: int):
        """The copy of `width` columns from `column` on, the tile's part, and the shape of a thread's registers."""
        part = cute.composition(self.tile.layout, cute.make_layout((ROWS, width)))
        part = cute.make_tensor(self.tile.iterator + column, part)  # pyright: ignore[reportOperatorIssue]
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), part).get_slice(self.warp * 32)
        return copy, part, cute.make_identity_tensor((ROWS, width))

    def load(self, column: int, width: int, at_once: int = 32) -> cute.Tensor:
        """Registers with the row's columns, `at_once` an instruction; ready when it returns."""
        copy, part, shape = self._columns(tcgen05.Ld32x32bOp(tcgen05.Repetition(at_once)), column, width)
        registers = cute.make_rmem_tensor(copy.partition_D(shape).shape, Float32)
        cute.copy(copy, copy.partition_S(part), registers)
        cute.arch.fence_view_async_tmem_load()
        return cute.make_tensor(registers.iterator, cute.make_layout(width))

    def store(self, column: int, registers: cute.Tensor) -> None:
        """Writes as many columns as there are registers; done after `fence_view_async_tmem_store`."""
        width = cute.size(registers)
        copy, part, shape = self._columns(tcgen05.St32x32bOp(tcgen05.Repetition(width)), column, width)
        shaped = cute.make_tensor(registers.iterator, cute.make_layout(copy.partition_S(shape).shape))
        cute.copy(copy, shaped, copy.partition_D(part))
