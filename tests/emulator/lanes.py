"""Arithmetic of single PTX instructions on numpy arrays, one element a lane. Any shape broadcasts.

These are the functions that generated code calls where numpy has no ufunc with the PTX meaning. Bit patterns of bf16
and fp8 travel as unsigned integers, since numpy has no such types.
"""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

_TINY = np.finfo(np.float32).tiny


# Floating point (PTX ISA 9.7.3 and 9.7.4) ------------------------------------------------------------------------


def flush(x):
    """Subnormal float32 to zero of the same sign: the `.ftz` modifier."""
    return np.where(np.abs(x) < _TINY, np.copysign(f4(0), x), x)


def fma(a, b, c):
    """Fused multiply-add of float32. The product is exact in float64; the sum is rounded there and again to float32,
    which differs from one rounding in about one case in 2^29."""
    return (np.multiply(a, b, dtype=f8) + c).astype(f4)


def add_toward_minus(a, b):
    """add.rm.f32: rounds down. The exact float32 sum fits float64 unless exponents differ by more than 29 bits, where
    float64's own rounding can only be off by less than float32 resolves."""
    exact = np.add(a, b, dtype=f8)
    near = exact.astype(f4)
    return np.where(near.astype(f8) > exact, np.nextafter(near, f4(-np.inf)), near)


def fma_toward_minus(a, b, c):
    """fma.rm.f32."""
    exact = np.multiply(a, b, dtype=f8) + c
    near = exact.astype(f4)
    return np.where(near.astype(f8) > exact, np.nextafter(near, f4(-np.inf)), near)


def exp2(x):
    """ex2.approx. Float64 inside, as for the next: numpy's float32 results depend on how many lanes are at it."""
    return np.exp2(x, dtype=f8).astype(f4)


def log2(x):
    """lg2.approx."""
    return np.log2(x, dtype=f8).astype(f4)


def tanh(x):
    """tanh.approx, more exact than the hardware's 11 bits."""
    return np.tanh(x, dtype=f8).astype(f4)


def reciprocal(x):
    return f4(1) / x


def reciprocal_sqrt(x):
    return f4(1) / np.sqrt(x)


def is_number(a, b):
    """setp.num: neither is NaN."""
    return (a == a) & (b == b)


# Conversions (PTX ISA 9.7.9.21) ----------------------------------------------------------------------------------


def bf16_bits(x):
    """float32 to bf16 bits, round to nearest even; every NaN becomes the canonical 0x7fff."""
    bits = np.asarray(x, f4).view(u4)
    rounded = ((bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    nan = x != x
    return np.where(nan, u2(0x7FFF), rounded) if np.any(nan) else rounded


def bf16_bits_truncated(x):
    """float32 to bf16 bits, round toward zero (`.rz`)."""
    bits = (np.asarray(x, f4).view(u4) >> u4(16)).astype(u2)
    return np.where(x != x, u2(0x7FFF), bits)


def bf16_value(bits):
    """bf16 bits to float32, exact."""
    return (np.asarray(bits).astype(u4) << u4(16)).view(f4)


def pack_bf16(high, low):
    """cvt.rn.bf16x2.f32 d, high, low."""
    return bf16_bits(low).astype(u4) | (bf16_bits(high).astype(u4) << u4(16))


def pack_f16(high, low):
    """cvt.rn.f16x2.f32 d, high, low."""
    return (np.asarray(low, f4).astype(f2).view(u2).astype(u4)
            | (np.asarray(high, f4).astype(f2).view(u2).astype(u4) << u4(16)))  # fmt: skip


def round_tf32(x):
    """cvt.rna.tf32.f32: 10 mantissa bits, ties away from zero. Returns the float32 bit pattern."""
    bits = np.asarray(x, f4).view(u4)
    return np.where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def _fp8_positive(exponent_bits: int, mantissa_bits: int, count: int) -> np.ndarray:
    code = np.arange(count)
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / 2.0**mantissa_bits
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent.astype(f8) - bias))


_FP8_FINITE = {"e4m3": _fp8_positive(4, 3, 127), "e5m2": _fp8_positive(5, 2, 124)}


def fp8_bits(x, kind: str):
    """float32 to fp8 bits (`e4m3` or `e5m2`), round to nearest even, saturating to the largest finite value."""
    values = _FP8_FINITE[kind]
    middle = (values[1:] + values[:-1]) / 2
    magnitude = np.abs(np.asarray(x, f8))
    code = np.searchsorted(middle, magnitude, side="left")
    tie = (code < len(middle)) & (magnitude == middle[np.minimum(code, len(middle) - 1)]) & (code & 1 == 1)
    code = np.where(tie, code + 1, code)
    bits = (code | np.where(np.signbit(x), 128, 0)).astype(u1)
    return np.where(x != x, u1(0x7F), bits)


def fp8_table(kind: str) -> np.ndarray:
    """float32 value of each of the 256 codes."""
    finite = _FP8_FINITE[kind]
    positive = np.full(128, np.nan)
    positive[: len(finite)] = finite
    if kind == "e5m2":
        positive[124] = np.inf
    return np.concatenate((positive, -positive)).astype(f4)


FP8_VALUE = {kind: fp8_table(kind) for kind in ("e4m3", "e5m2")}


def pack_e4m3(high, low):
    return fp8_bits(low, "e4m3").astype(u2) | (fp8_bits(high, "e4m3").astype(u2) << u2(8))


def pack_e5m2(high, low):
    return fp8_bits(low, "e5m2").astype(u2) | (fp8_bits(high, "e5m2").astype(u2) << u2(8))


def unpack_fp8(bits, kind: str):
    """cvt.rn.f16x2.e4m3x2: two fp8 codes to two halves, packed."""
    low = FP8_VALUE[kind][bits & u2(0xFF)].astype(f2).view(u2).astype(u4)
    high = FP8_VALUE[kind][bits >> u2(8)].astype(f2).view(u2).astype(u4)
    return low | (high << u4(16))


_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_LIMITS = {i2: (-(2**15), 2**15 - 1), u2: (0, 2**16 - 1), i4: (-(2**31), 2**31 - 1), u4: (0, 2**32 - 1),
           i8: (-(2.0**63), 2.0**63 - 1024), u8: (0, 2.0**64 - 2048)}  # fmt: skip


def float_to_int(x, rounding: str, dtype):
    """cvt.rzi.s32.f32 and relatives: rounds, saturates, and turns NaN into 0."""
    low, high = _LIMITS[dtype]
    wide = _ROUND[rounding](np.asarray(x, f8))
    return np.clip(np.where(wide != wide, 0.0, wide), low, high).astype(dtype)


def round_float(x, rounding: str):
    """cvt.rni.f32.f32 and relatives: to an integral value, same type."""
    return _ROUND[rounding](x)


# Integers and bits (PTX ISA 9.7.1, 9.7.2, 9.7.8) -----------------------------------------------------------------


def mul_high(a, b, dtype):
    """Upper half of the full product of 16-, 32- or 64-bit integers."""
    bits = 8 * np.dtype(dtype).itemsize
    if bits <= 32:
        wide = i8 if np.dtype(dtype).kind == "i" else u8
        return ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(bits)).astype(dtype)
    a, b = np.asarray(a), np.asarray(b)
    low_mask, half = u8(0xFFFFFFFF), u8(32)
    ua, ub = a.view(u8) if a.ndim else u8(a), b.view(u8) if b.ndim else u8(int(b) & 0xFFFFFFFFFFFFFFFF)
    al, ah, bl, bh = ua & low_mask, ua >> half, ub & low_mask, ub >> half
    middle = ah * bl + ((al * bl) >> half)
    high = ah * bh + (middle >> half) + ((al * bh + (middle & low_mask)) >> half)
    if np.dtype(dtype).kind == "i":  # two's complement: subtract the other factor for every negative one
        high = high - np.where(a < 0, ub, u8(0)) - np.where(b < 0, ua, u8(0))
    return high.astype(u8).view(dtype)


def divide(a, b, dtype):
    """Integer division toward zero. A zero divisor gives all ones, as NVIDIA GPUs do."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if np.dtype(dtype).kind == "u":
        quotient = a // safe
    else:
        floor = a // safe
        quotient = floor + ((floor < 0) & (floor * safe != a)).astype(dtype)
    return np.where(b == 0, ~dtype(0), quotient).astype(dtype)


def remainder(a, b, dtype):
    """rem: the sign is the dividend's."""
    return (a - divide(a, b, dtype) * b).astype(dtype)


def shift_left(a, count, dtype):
    """shl: counts of the width or more give 0."""
    bits = 8 * np.dtype(dtype).itemsize
    count = np.asarray(count)
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(dtype), dtype(0))


def shift_right(a, count, dtype):
    """shr: counts are clamped, so that signed values fill with their sign and unsigned ones become 0."""
    bits = 8 * np.dtype(dtype).itemsize
    count = np.asarray(count)
    shifted = a >> np.minimum(count, bits - 1).astype(dtype)
    return shifted if np.dtype(dtype).kind == "i" else np.where(count < bits, shifted, dtype(0))


def funnel_shift(low, high, count, right: bool, wrap: bool):
    """shf.l / shf.r: a 64-bit shift of high:low, returning its high (left) or low (right) word."""
    joined = (np.asarray(high).astype(u8) << u8(32)) | np.asarray(low).astype(u8)
    count = np.asarray(count).astype(u8)
    count = count & u8(31) if wrap else np.minimum(count, u8(32))
    return (joined >> count).astype(u4) if right else ((joined << count) >> u8(32)).astype(u4)


def bit_extract(a, position, length, dtype):
    """bfe: `length` bits from `position`; signed forms extend the field's top bit."""
    bits = 8 * np.dtype(dtype).itemsize
    wide = np.asarray(a).astype(u8) if bits == 64 else np.asarray(a).view(u4).astype(u8)
    position, length = np.asarray(position).astype(u8) & u8(255), np.asarray(length).astype(u8) & u8(255)
    inside = np.minimum(length, np.where(position < u8(bits), u8(bits) - position, u8(0)))
    mask = np.where(inside < u8(64), (u8(1) << np.minimum(inside, u8(63))) - u8(1), ~u8(0))
    value = (wide >> np.minimum(position, u8(63))) & mask
    if np.dtype(dtype).kind == "i":
        top = np.minimum(position + np.maximum(length, u8(1)) - u8(1), u8(bits - 1))
        negative = (length > 0) & ((wide >> top) & u8(1) == 1)
        value = np.where(negative, value | ~mask, value)
    return value.astype(f"u{bits // 8}").view(dtype)


def bit_insert(a, b, position, length):
    """bfi.b32: the low `length` bits of `a` replace those of `b` from `position`."""
    position, length = np.asarray(position).astype(u8) & u8(255), np.asarray(length).astype(u8) & u8(255)
    mask = (((u8(1) << np.minimum(length, u8(32))) - u8(1)) << np.minimum(position, u8(32))) & u8(0xFFFFFFFF)
    moved = (np.asarray(a).astype(u8) << np.minimum(position, u8(32))) & mask
    return ((np.asarray(b).astype(u8) & ~mask) | moved).astype(u4)


def permute(a, b, selector):
    """prmt.b32: each nibble of `selector` picks one of eight bytes; its top bit replicates the byte's sign."""
    a, b, selector = np.broadcast_arrays(np.asarray(a, u4), np.asarray(b, u4), np.asarray(selector, u4))
    joined = a.astype(u8) | (b.astype(u8) << u8(32))
    out = np.zeros(a.shape, u4)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(15)
        byte = ((joined >> (u8(8) * (nibble & u4(7)).astype(u8))) & u8(0xFF)).astype(u4)
        byte = np.where(nibble & u4(8), np.where(byte & u4(0x80), u4(0xFF), u4(0)), byte)
        out |= byte << u4(8 * i)
    return out


def lop3(a, b, c, table: int):
    """lop3.b32: any three-input bit function, `table` its truth table for (a, b, c) = 0..7."""
    out = u4(0)
    for row in range(8):
        if table >> row & 1:
            out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return out


def reverse_bits(a):
    """brev.b32."""
    out = np.zeros_like(a)
    for i in range(32):
        out |= ((a >> u4(i)) & u4(1)) << u4(31 - i)
    return out


def leading_zeros(a):
    """clz.b32."""
    return np.where(a == 0, u4(32), u4(31) - np.floor(np.log2(np.maximum(a, 1).astype(f8))).astype(u4))


def find_top_bit(a):
    """bfind.u32: index of the highest set bit, all ones if there is none."""
    return u4(31) - leading_zeros(a)


# Packed halves (PTX ISA 9.7.4, f16x2 and bf16x2) -----------------------------------------------------------------


def half_op(function, kind: str, *packed):
    """Applies a float32 function to both halves of packed `f16` or `bf16` pairs and rounds once."""
    halves = []
    for shift in (u4(0), u4(16)):
        values = [((np.asarray(x) >> shift) & u4(0xFFFF)).astype(u2) for x in packed]
        halves.append(half_scalar(function, kind, *values).astype(u4))
    return halves[0] | (halves[1] << u4(16))


def half_scalar(function, kind: str, *bits):
    """Applies a float32 function to `f16` or `bf16` bit patterns and rounds once."""
    decode = bf16_value if kind == "bf16" else (lambda x: np.ascontiguousarray(x).view(f2).astype(f4))
    out = np.asarray(function(*[decode(np.asarray(x, u2)) for x in bits]), f4)
    return bf16_bits(out) if kind == "bf16" else out.astype(f2).view(u2)
