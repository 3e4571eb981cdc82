"""tanh(x) of a softcap, on the FMA units where |x| <= 0.75, which scores in use nearly always keep to.

tanh by exponentials, 1 - 2 / (e^2x + 1), takes two special-function instructions beside the one of the softmax's own
weight, and those units give 16 results a clock where FMA units give 128. So a score y, normalised to |y| < 2 where the
polynomial serves, is bent by an odd polynomial of degree 9; whether all scores of a warp are near is one bit of each.

A score's result depends on that score alone: `bend` takes the same polynomial, to the bit, for each score that is near.

The polynomial has the smallest relative error on |x| <= 0.75 of all x (1 + c_1 x^2 + ... + c_4 x^8): weighted least
squares in x^2, whose weights were multiplied by the errors until these were level (Lawson). Without the 1 it would do
with a degree less, but err on the smallest scores as on the largest, where a large softcap has to bend nothing. An even
degree in x^2 has a positive last coefficient: it keeps the -inf of hidden keys, where an odd one makes it +inf.

Source: Lawson, "Contributions to the Theory of Linear Least Maximum Approximation" (1961).
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_cute.softmax import LOG2_E

REACH = 0.75
"""The largest |x| that the polynomial serves."""
POLYNOMIAL = (1.0, -0.33329667651260475, 0.13268237036880104, -0.05027795350144842, 0.013105835849174192)
"""Coefficients of x, x^3, x^5, x^7 and x^9."""
MAX_RELATIVE_ERROR = 1e-6
"""Of either way to tanh(x), float32 rounding included."""
NORMALISED = 2.0
"""|y| of REACH: the least float whose highest exponent bit is set, as it is in those above, infinities and NaN."""
HIGHEST_EXPONENT_BIT = 0x40000000
PART = 8
"""Scores that are bent side by side where some are not near."""
LOWEST = -64.0
"""A score y of which tanh is -1, to the bit: those below may be raised to it."""


class Cap(NamedTuple):
    """A softcap's constants, for scores y = `scale` s; `coefficients` and `limit` are in log2 units.

    coefficients: limit * POLYNOMIAL, for y. limit: what no bent score exceeds, softcap * log2 e.
    """

    scale: Float32
    coefficients: tuple[Float32, ...]
    limit: Float32


def cap_of(capped_scale: Float32, limit: Float32) -> Cap:
    """The constants of a softcap; arguments as `params.Values` has them."""
    unit = REACH / NORMALISED
    coefficients = tuple(limit * (c * unit ** (2 * n + 1)) for n, c in enumerate(POLYNOMIAL))
    return Cap(capped_scale * (1 / unit), coefficients, limit)


def all_near(scores: list) -> Boolean:
    """Whether the polynomial serves all scores y of a warp."""
    bits = [y.bitcast(Int32) for y in scores]
    while len(bits) > 1:  # three at a time, which is one instruction
        bits = [_or(bits[at : at + 3]) for at in range(0, len(bits), 3)]
    return cute.arch.vote_all_sync((bits[0] & HIGHEST_EXPONENT_BIT) == 0)


def _or(bits: list) -> Int32:
    return functools.reduce(operator.or_, bits)


def bend_near(scores: list, cap: Cap, shift: Float32) -> list:
    """limit * tanh(x) + shift of scores with |y| < 2; -inf, a hidden key's, stays."""
    return [_near(y, cap, shift) for y in scores]


@cute.jit
def bend(scores: list, cap: Cap, shift: Float32, hidden: bool) -> list:
    """limit * tanh(x) + shift of any scores; NaN stays. hidden: -inf stays too, and is no score.

    By parts, of which those that are all near are spared the exponentials; each part's are few enough for registers.
    """
    bent = []
    for at in cutlass.range_constexpr(0, len(scores), PART):
        part = scores[at : at + PART]
        result = [Float32(0.0) for _ in part]
        if all_near(part):  # noqa: SIM108 (a ternary would compute both)
            result = bend_near(part, cap, shift)
        else:
            result = [_far(y, cap, shift, hidden) for y in part]
        bent += result
    return bent


def _near(y: Float32, cap: Cap, shift: Float32) -> Float32:
    square = y * y
    ratio = cap.coefficients[-1]
    for coefficient in reversed(cap.coefficients[:-1]):
        ratio = cute.math.fma(ratio, square, coefficient)
    return cute.math.fma(y, ratio, shift)


@cute.jit
def _far(y: Float32, cap: Cap, shift: Float32, hidden: bool) -> Float32:
    """The score bent by exponentials, or `near` where that is right."""
    grown = cute.math.exp2(y * (REACH * LOG2_E), fastmath=True)
    tanh = cute.math.fma(Float32(-2.0), cute.arch.rcp_approx(grown + Float32(1.0)), Float32(1.0))
    far = cute.math.fma(tanh, cap.limit, shift)
    if const_expr(hidden):
        far = -Float32.inf if y == -Float32.inf else far
    return _near(y, cap, shift) if cute.arch.fmax(y, -y, nan=True) < NORMALISED else far
