"""The rescale-skipping online softmax of FlashAttention-4, per row and free of any layout.

Statistics are in log2 units: `score * scale_log2`. A row keeps its pivot as long as no score exceeds it by more than
the threshold, so the weights `2^(score - pivot)` stay at most `2^threshold` and neither O nor the row sum needs a
rescale; the pivot cancels in O / row_sum and in the LSE. See docs/semantics.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@cute.jit
def follow_max(pivot: Float32, tile_max: Float32, threshold: Float32) -> tuple[Float32, Boolean]:
    """The row's pivot after a tile whose largest score is `tile_max`, and whether it moved.

    A pivot of -inf (no visible key yet) counts as moved, to the maximum or to -inf again; a NaN moves it to NaN.
    """
    highest = cute.arch.fmax(pivot, tile_max, nan=True)
    kept = highest - pivot <= threshold
    return (pivot if kept else highest), not kept


@cute.jit
def rescale_factor(before: Float32, after: Float32) -> Float32:
    """What O and the row sum are multiplied by when the pivot moves; 0 for a row that had seen nothing."""
    return cute.math.exp2(before - subtrahend(after), fastmath=True)


@cute.jit
def subtrahend(pivot: Float32) -> Float32:
    """What exponents are taken against: the pivot, or 0 where the row saw nothing, as -inf - -inf would be NaN."""
    return Float32(0.0) if pivot == -Float32.inf else pivot


@cute.jit
def finish(pivot: Float32, row_sum: Float32, sink: Float32 | None) -> tuple[Float32, Float32]:
    """The factor that turns the accumulated O into the output, and the row's LSE in natural-log units.

    sink: the head's extra logit in log2 units, or None. A row that saw no key and has no sink gets 0 and -inf.
    """
    highest, weight, total = pivot, Float32(1.0), row_sum
    if const_expr(sink is not None):
        highest = cute.arch.fmax(pivot, sink)
        weight = cute.math.exp2(pivot - subtrahend(highest), fastmath=True)
        total = row_sum * weight + cute.math.exp2(sink - subtrahend(highest), fastmath=True)
    scale, lse = Float32(0.0), -Float32.inf
    if total != 0.0:
        scale = weight * cute.arch.rcp_approx(total)
        lse = (highest + cute.math.log2(total, fastmath=True)) * LN_2
    return scale, lse


@cute.jit
def tanh(x: Float32) -> Float32:
    """tanh(x) = 1 - 2 / (e^2x + 1), and its series near zero, where that cancels: a large softcap would show it.

    Relative error below 2e-6, where tanh.approx has 11 bits.
    """
    grown = cute.math.exp2(x * (2 * LOG2_E), fastmath=True)
    bent = Float32(1.0) - Float32(2.0) * cute.arch.rcp_approx(grown + Float32(1.0))
    square = x * x
    series = x * (square * (square * (2 / 15) - 1 / 3) + 1.0)
    return bent if square > 0.01 else series


def pack(low: Float32, high: Float32, dtype: Any) -> Int32:
    """Two weights, or elements of the output, rounded to 16 bits in one word, the first in the low half."""
    name = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Int32], read_only_args=[low, high]
    )


def fold(values: list, combine: Any) -> Any:
    """Combines values pairwise in four chains, short enough to hide an instruction's latency."""
    chains = values[:4]
    for at in range(4, len(values)):
        chains[at % 4] = combine(chains[at % 4], values[at])
    while len(chains) > 1:
        chains = [functools.reduce(combine, chains[at : at + 2]) for at in range(0, len(chains), 2)]
    return chains[0]
