"""Arithmetic of one score row held by one thread, in the instructions that SM100 has for it.

A row is a register tensor of scores. Statistics are in log2 units, as in `softmax`.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir.dialects import nvvm

from fa4_cute.exp2 import exp2_pair
from fa4_cute.sm100_config import FRAGMENT, Exp2Share
from fa4_cute.softmax import pack


def _max3(a: Float32, b: Float32, c: Float32) -> Float32:
    """The largest of three, NaN if one is NaN: one instruction on SM100."""
    return Float32(nvvm.fmax(a.ir_value(), b.ir_value(), c=c.ir_value(), nan=True))


def row_max(row: cute.Tensor) -> Float32:
    """The largest score, in four chains; NaN if there is one."""
    chains = [row[0], row[1], row[2], row[3]]
    last = cute.size(row) - 4
    for at in range(4, last, 8):
        for j in range(4):
            chains[j] = _max3(chains[j], row[at + 2 * j], row[at + 2 * j + 1])
    chains[0] = _max3(chains[0], row[last], row[last + 1])
    chains[1] = _max3(chains[1], row[last + 2], row[last + 3])
    return cute.arch.fmax(_max3(chains[0], chains[1], chains[2]), chains[3], nan=True)


Pair = tuple[Float32, Float32]


def add_up(chains: list[Pair], row: cute.Tensor, fragment: int) -> list[Pair]:
    """Adds a fragment's elements to four chains of two sums; no chains yet start with the elements."""
    first, added = fragment * FRAGMENT, list(chains)
    for c in range(0, FRAGMENT, 2):
        pair = (row[first + c], row[first + c + 1])
        if len(added) < 4:
            added.append(pair)
        else:
            chain = c // 2 % 4
            added[chain] = cute.arch.add_packed_f32x2(added[chain], pair)
    return added


def total_of(chains: list[Pair]) -> Float32:
    """The sum of all chains."""
    add = cute.arch.add_packed_f32x2
    left, right = add(add(chains[0], chains[1]), add(chains[2], chains[3]))
    return left + right


@cute.jit
def follow(pivot: Float32, tile_max: Float32, threshold: Float32) -> tuple[Float32, Float32]:
    """The row's pivot after a tile, and the factor that O and the row sum take: exactly 1 if the pivot is kept.

    As `softmax.follow_max`, but a NaN is followed, so that it reaches the whole row: software exponentials lose NaNs.
    """
    highest = cute.arch.fmax(pivot, tile_max, nan=True)
    fall = pivot - (highest if highest != -Float32.inf else Float32(0.0))
    factor = cute.math.exp2(fall, fastmath=True)
    kept = fall >= -threshold
    return (pivot if kept else highest), (Float32(1.0) if kept else factor)


@cute.jit
def bias(pivot: Float32) -> Float32:
    """What is added to scores in exponents: minus the pivot; 0 if the row saw nothing; NaN if it is not finite."""
    safe = pivot if pivot != -Float32.inf else Float32(0.0)
    return safe * 0.0 - safe


def scale_and_shift(row: cute.Tensor, fragment: int, scale: Float32, shift: Float32) -> None:
    """Turns a fragment's scores into exponents in place."""
    for at in range(fragment * FRAGMENT, (fragment + 1) * FRAGMENT, 2):
        row[at], row[at + 1] = cute.arch.fma_packed_f32x2((row[at], row[at + 1]), (scale, scale), (shift, shift))


def exponentiate(row: cute.Tensor, fragment: int, share: Exp2Share, dtype: Any) -> cute.Tensor:
    """Turns a fragment's exponents into weights in place; returns them rounded to 16 bits, two a 32-bit register."""
    packed = cute.make_rmem_tensor(FRAGMENT // 2, Float32)
    words = cute.recast_tensor(packed, Int32)
    for c in range(0, FRAGMENT, 2):
        at = fragment * FRAGMENT + c
        if share.holds(fragment, c):
            row[at], row[at + 1] = exp2_pair(row[at], row[at + 1])
        else:
            row[at] = cute.math.exp2(row[at], fastmath=True)
            row[at + 1] = cute.math.exp2(row[at + 1], fastmath=True)
        words[c // 2] = pack(row[at], row[at + 1], dtype)
    return packed


@cute.jit
def hide(row: cute.Tensor, first: Int32 | None, end: Int32):
    """Scores of columns before `first` (None: no such bound) and from `end` on become -inf.

    By bit masks of 32 columns, which the hardware turns into predicates seven at a time.
    """
    for f in cutlass.range_constexpr(cute.size(row) // 32):
        visible = ~_ones_from(end - 32 * f)
        if const_expr(first is not None):
            visible = visible & _ones_from(first - 32 * f)
        for c in cutlass.range_constexpr(32):
            seen = (visible & (1 << c if c < 31 else -(1 << 31))) != 0
            row[32 * f + c] = row[32 * f + c] if seen else -Float32.inf


def _ones_from(bit: Int32) -> Int32:
    """A word whose bits from `bit` on are set; all of them for a negative `bit`, none from 32 on."""
    return cute.arch.inline_ptx(
        "shl.b32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[Int32(-1), cutlass.max(bit, 0)]
    )
