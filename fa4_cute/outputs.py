"""What a forward writes by ordinary stores, the same for every architecture: unseen rows, and counts for tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_cute.ranges import Span
from fa4_cute.schedule import Extent, Lengths, Sequence, WorkItem, sequence_of


class Outputs(NamedTuple):
    """What the kernel writes by ordinary stores, and the counter that items are drawn from.

    out (S, Dv, H, B); lse (S, H, B); counts as the host gave it, or None.
    """

    out: cute.Tensor
    lse: cute.Tensor
    counter: cute.Tensor | None
    counts: cute.Tensor | None


@cute.jit
def write_unseen(
    outputs: Outputs,
    sink: cute.Tensor | None,
    work: WorkItem,
    batch: Int32,
    sequence: Sequence,
    first_row: Int32,
    tile_m: cutlass.Constexpr[int],
    head_dim_v: cutlass.Constexpr[int],
):
    """One warp writes the output and LSE of a query tile that sees no key: zeros, and -inf or the sink's logit.

    batch: the batch coordinate of the tensors, 0 where they are packed.
    """
    lane = cute.arch.lane_idx()
    empty = -Float32.inf
    if const_expr(sink is not None):
        empty = Float32(sink[work.head])
    rows = cutlass.min(first_row + tile_m, sequence.rows_q)
    for row in cutlass.range(first_row, rows, unroll=1):
        for column in cutlass.range(lane, head_dim_v, 32, unroll=1):
            outputs.out[sequence.offset_q + row, column, work.head, batch] = outputs.out.element_type(0.0)
    for row in cutlass.range(first_row + lane, rows, 32, unroll=1):
        outputs.lse[sequence.offset_q + row, work.head, batch] = empty if row < sequence.seqlen_q else -Float32.inf


@cute.jit
def write_past_the_end(
    outputs: Outputs,
    extent: Extent,
    lengths: Lengths,
    program: Int32,
    programs: Int32,
    head_dim_v: cutlass.Constexpr[int],
):
    """One warp writes its block's share of zeros and -inf in the rows after the last packed sequence; usually none."""
    lane = cute.arch.lane_idx()
    end = Int32(0)
    if extent.batch > 0:
        last = sequence_of(extent.batch - 1, lengths, extent)
        end = last.offset_q + last.rows_q
    for row in cutlass.range(end + program, extent.seqlen_q, programs, unroll=1):
        for head in cutlass.range(extent.heads, unroll=1):
            for column in cutlass.range(lane, head_dim_v, 32, unroll=1):
                outputs.out[row, column, head, 0] = outputs.out.element_type(0.0)
            if lane == 0:
                outputs.lse[row, head, 0] = -Float32.inf


@cute.jit
def write_counts(
    counts: cute.Tensor, work: WorkItem, row: Int32, span: Span, skips: Int32, varlen: cutlass.Constexpr[bool]
):
    """For tests: key tiles visited and rescales skipped of one query row, (B, H, S, 2) or (H, total, 2)."""
    if const_expr(varlen):
        counts[work.head, row, 0] = span.end - span.begin
        counts[work.head, row, 1] = skips
    else:
        counts[work.batch, work.head, row, 0] = span.end - span.begin
        counts[work.batch, work.head, row, 1] = skips


def pack(low: Float32, high: Float32, dtype: Any) -> Int32:
    """Two floats rounded to 16 bits in one word, the first in the low half."""
    name = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Int32], read_only_args=[low, high]
    )
