"""2^x on the FMA units, for a part of the exponentials: special-function units give 16 a clock, FMA units 128.

x = n + f with n = floor(x): adding 1.5 * 2^23, rounding down, leaves n in the low bits of the sum; 2^f is, on [0, 1), a
polynomial; n goes into its exponent by one integer shift-and-add. Two elements at a time, in packed f32x2 instructions.

The polynomial has the smallest relative error on [0, 1] among those with p(0) = 1, which makes 2^n exact, and 2^-127
a zero. A degree of 3 would do for P, whose rounding is coarser than its 8.6e-5, but not for the LSE of a row that few
keys dominate; a degree of 4 errs by 2.9e-6.

A NaN is not kept: the exponent's addition makes it finite. Callers pass rows whose largest score is a number, and give
a row that holds a NaN or an infinity a NaN of its own (`sm100_rows.bias`); keeping it here would cost an
instruction a pair.

Source: Cody and Waite, "Software Manual for the Elementary Functions" (1980), chapter 6; Zadouri et al.,
"FlashAttention-4" (2026), section 3, for its use beside the special-function units.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32

ROUND_TO_INTEGER = float(2**23 + 2**22)
LOWEST = -127.0
POLYNOMIAL = (1.0, 0.6930448412895203, 0.241280198097229, 0.052242472767829895, 0.013426683843135834)
"""Coefficients of 1, f, f^2, f^3 and f^4."""
MAX_RELATIVE_ERROR = 3.1e-6
"""On [-126, 127], float32 rounding included."""


def exp2_pair(x: Float32, y: Float32) -> tuple[Float32, Float32]:
    """2^x and 2^y for x, y <= 127; below -126 the result falls to 0 less smoothly than it should, by at most 2^-126."""
    pair = (cute.arch.fmax(x, LOWEST), cute.arch.fmax(y, LOWEST))
    magic = (ROUND_TO_INTEGER, ROUND_TO_INTEGER)
    shifted = cute.arch.add_packed_f32x2(pair, magic, rnd="rm")
    whole = cute.arch.sub_packed_f32x2(shifted, magic)
    part = cute.arch.sub_packed_f32x2(pair, whole)
    power = (POLYNOMIAL[-1], POLYNOMIAL[-1])
    for coefficient in reversed(POLYNOMIAL[:-1]):
        power = cute.arch.fma_packed_f32x2(power, part, (coefficient, coefficient))
    return _scale(shifted[0], power[0]), _scale(shifted[1], power[1])


def _scale(shifted: Float32, power: Float32) -> Float32:
    """`power` times 2^n, with n in the low bits of `shifted`."""
    return ((shifted.bitcast(Int32) << 23) + power.bitcast(Int32)).bitcast(Float32)
