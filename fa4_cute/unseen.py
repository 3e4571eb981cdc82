"""Query rows that no role computes, written by a scheduler warp: those that see no key, and those of no sequence."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_core.problem import Kinds
from fa4_cute.schedule import Extent, Lengths, Sequence, WorkItem, sequence_of


@cute.jit
def write_unseen(
    outputs: Any,
    sink: cute.Tensor | None,
    kinds: cutlass.Constexpr[Kinds],
    packed: cutlass.Constexpr[int],
    work: WorkItem,
    sequence: Sequence,
    begin: Int32,
    end: Int32,
):
    """Output and LSE at the positions `[begin, end)` of a sequence: zeros, and -inf or the sink's logit.

    outputs: `out` (S, D, H, B) and `lse` (S, H, B). packed: query heads of a work item. One warp calls it.
    """
    lane = cute.arch.lane_idx()
    batch = Int32(0) if const_expr(kinds.varlen) else work.batch
    for n in cutlass.range(packed, unroll=1):
        head = work.head * packed + n
        empty = -Float32.inf
        if const_expr(sink is not None):
            empty = Float32(sink[head])
        for row in cutlass.range(begin, end, unroll=1):
            for column in cutlass.range(lane, kinds.head_dim_v, 32, unroll=1):
                outputs.out[sequence.offset_q + row, column, head, batch] = outputs.out.element_type(0.0)
        for row in cutlass.range(begin + lane, end, 32, unroll=1):
            outputs.lse[sequence.offset_q + row, head, batch] = empty if row < sequence.seqlen_q else -Float32.inf


@cute.jit
def write_past_the_end(
    outputs: Any,
    kinds: cutlass.Constexpr[Kinds],
    packed: cutlass.Constexpr[int],
    extent: Extent,
    lengths: Lengths,
    program: Int32,
    programs: Int32,
):
    """Zeros and -inf in the rows after the last sequence, which usually do not exist; the blocks share them.

    Arguments as those of `write_unseen`. One warp calls it.
    """
    lane = cute.arch.lane_idx()
    end = Int32(0)
    if extent.batch > 0:
        last = sequence_of(extent.batch - 1, lengths, extent)
        end = last.offset_q + last.rows_q
    for row in cutlass.range(end + program, extent.seqlen_q, programs, unroll=1):
        for head in cutlass.range(extent.heads * packed, unroll=1):
            for column in cutlass.range(lane, kinds.head_dim_v, 32, unroll=1):
                outputs.out[row, column, head, 0] = outputs.out.element_type(0.0)
            if lane == 0:
                outputs.lse[row, head, 0] = -Float32.inf
