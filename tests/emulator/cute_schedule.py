"""A kernel that does nothing but walk `fa4_cute.schedule`: each block writes down the work items that it comes to."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa4_cute.schedule import Extent, Lengths, Schedule, start, take


class ScheduleProbe:
    """One warp a block. Writes (batch, head, tile) of block p's n-th item to `items[p, n]`.

    tile_m, longest_first: as in `Schedule`. packed, used: whether there are cu_seqlens and seqused tensors. drawn:
    whether `indices`, int32 (blocks, most), tells what each block draws, ending with an index past the last item.
    """

    def __init__(self, tile_m: int, longest_first: bool, packed: bool, used: bool, drawn: bool) -> None:
        self.tile_m, self.longest_first = tile_m, longest_first
        self.packed, self.used, self.drawn = packed, used, drawn

    def fake_arguments(self):
        def tensor(rank, wanted=True):
            shape = tuple(cute.sym_int32() for _ in range(rank))
            stride = (*(cute.sym_int64() for _ in range(rank - 1)), 1)
            return make_fake_tensor(Int32, shape, stride, assumed_align=4) if wanted else None

        bounds = [tensor(1, wanted) for wanted in (self.packed, self.packed, self.used, self.used)]
        return [tensor(3), tensor(2, self.drawn), *bounds, *(Int32(1) for _ in range(5)), make_fake_stream()]

    @cute.jit
    def __call__(
        self,
        items: cute.Tensor,
        indices: cute.Tensor | None,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        seqused_q: cute.Tensor | None,
        seqused_k: cute.Tensor | None,
        batch: Int32,
        heads: Int32,
        seqlen_q: Int32,
        seqlen_k: Int32,
        section: Int32,
        stream,
    ):
        self.kernel(
            items,
            indices,
            Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            Extent(batch, heads, seqlen_q, seqlen_k, section),
        ).launch(grid=[items.shape[0], 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, items: cute.Tensor, indices: cute.Tensor | None, lengths: Lengths, extent: Extent):
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        order = Schedule(lengths, extent, programs, self.tile_m, self.longest_first)
        n = Int32(0)
        valid, work, place = take(order, start(order), program, self.index(indices, program, n))
        while valid:
            if cute.arch.lane_idx() == 0:
                items[program, n, 0], items[program, n, 1], items[program, n, 2] = work.batch, work.head, work.tile
            n += 1
            valid, work, place = take(order, place, program, self.index(indices, program, n))

    @cute.jit
    def index(self, indices, program, n):
        if const_expr(indices is None):
            return None
        else:
            return indices[program, n]
