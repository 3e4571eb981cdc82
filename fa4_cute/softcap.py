"""tanh(x) of a softcap, on the FMA units where |x| < 0.5, which scores in use nearly always keep to.

tanh by exponentials, 1 - 2 / (e^2x + 1), takes two special-function instructions beside the one of the softmax's own
weight, and those units give 16 results a clock where FMA units give 128. So where all scores of a warp are near, an odd
polynomial of degree 7 bends them. What then counts is instructions: the softmax's scale is in the coefficients, so a
score is bent as the matrix product left it, in five, and one finds the largest magnitude.

A score's result depends on that score alone: `bend` takes the same polynomial, to the bit, for each score that is near.

The polynomial has the smallest relative error on |x| <= 0.5 of all x (1 + c_1 x^2 + c_2 x^4 + c_3 x^6): weighted least
squares in x^2, whose weights were multiplied by the errors until these were level (Lawson). Without the 1 it would do
with a degree less, but err on the smallest scores as on the largest, where a large softcap has to bend nothing.

Source: Lawson, "Contributions to the Theory of Linear Least Maximum Approximation" (1961).
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from fa4_cute.softmax import LOG2_E, fold

REACH = 0.5
"""The |x| below which the polynomial serves."""
POLYNOMIAL = (1.0, -0.3332815925965529, 0.13205358468778483, -0.04475060104363683)
"""Coefficients of x, x^3, x^5 and x^7."""
MAX_RELATIVE_ERROR = 1e-6
"""Of either way to tanh(x), float32 rounding included."""
PLAIN = (2.0**-16, 1.0)
"""x over score where powers up to the seventh stay well within float32; elsewhere scores are turned into x first."""
PART = 8
"""Scores that are bent side by side where some are not near."""
LOWEST = -32.0
"""An x of which tanh is -1, to the bit: those below may be raised to it."""


class Cap(NamedTuple):
    """A softcap's constants, for scores s that `unit` was multiplied into; results are in log2 units.

    unit: 1 but for extreme softcaps (`PLAIN`). doubled: 2 log2 e x over s. coefficients: of s, s^3, s^5 and s^7. limit:
    what no bent score exceeds, softcap * log2 e. reach: the |s| below which the polynomial serves. lowest: LOWEST of s.
    """

    unit: Float32
    doubled: Float32
    coefficients: tuple[Float32, ...]
    limit: Float32
    reach: Float32
    lowest: Float32


@cute.jit
def cap_of(capped_scale: Float32, limit: Float32) -> Cap:
    """The constants of a softcap; arguments as `params.Values` has them."""
    plain = capped_scale >= PLAIN[0] and capped_scale <= PLAIN[1]
    unit = Float32(1.0) if plain else capped_scale
    scale = capped_scale if plain else Float32(1.0)
    square, power, coefficients = scale * scale, limit * scale, []
    for coefficient in POLYNOMIAL:
        coefficients.append(power * coefficient)
        power = power * square
    return Cap(unit, scale * (2 * LOG2_E), tuple(coefficients), limit, REACH / scale, LOWEST / scale)


def all_near(scores: list, cap: Cap) -> Boolean:
    """Whether the polynomial serves all scores of a warp; those that are NaN stay so in any case."""
    sizes = [cute.math.absf(s) for s in scores]
    return cute.arch.vote_all_sync(fold(sizes, cute.arch.fmax) < cap.reach)


def bend_near(scores: list, cap: Cap, shift: Float32) -> list:
    """limit * tanh(x) + shift of scores that are near."""
    return [_near(s, cap, shift) for s in scores]


@cute.jit
def bend(scores: list, cap: Cap, shift: Float32, hidden: bool) -> list:
    """limit * tanh(x) + shift of any scores; NaN stays. hidden: -inf stays too, and is no score.

    By parts, of which those that are all near are spared the exponentials; each part's are few enough for registers.
    """
    bent = []
    for at in cutlass.range_constexpr(0, len(scores), PART):
        part = scores[at : at + PART]
        result = [Float32(0.0) for _ in part]
        if all_near(part, cap):  # noqa: SIM108 (a ternary would compute both)
            result = bend_near(part, cap, shift)
        else:
            result = [_far(s, cap, shift, hidden) for s in part]
        bent += result
    return bent


def _near(score: Float32, cap: Cap, shift: Float32) -> Float32:
    square = score * score
    ratio = cap.coefficients[-1]
    for coefficient in reversed(cap.coefficients[:-1]):
        ratio = cute.math.fma(ratio, square, coefficient)
    return cute.math.fma(score, ratio, shift)


@cute.jit
def _far(score: Float32, cap: Cap, shift: Float32, hidden: bool) -> Float32:
    """The score bent by exponentials, or `_near` where that is right."""
    grown = cute.math.exp2(score * cap.doubled, fastmath=True)
    tanh = cute.math.fma(Float32(-2.0), cute.arch.rcp_approx(grown + Float32(1.0)), Float32(1.0))
    far = cute.math.fma(tanh, cap.limit, shift)
    if const_expr(hidden):
        far = -Float32.inf if score == -Float32.inf else far
    return _near(score, cap, shift) if cute.math.absf(score) < cap.reach else far
