"""Where matrix elements live: swizzles, shared-memory and instruction descriptors, register fragments, TMEM shapes.

Every function maps a logical index to a place and touches no state, so each has a property test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .errors import Unsupported

LANES = np.arange(32)

SWIZZLE_MASK = {0: 0, 32: 1, 64: 3, 128: 7}
"""XOR mask for the 16-byte chunk index of each swizzle span in bytes."""


def swizzle(address, span: int):
    """Byte address after the swizzle of `span` bytes (0, 32, 64, 128): bits 4.. are XORed with bits 7..

    It acts on absolute shared addresses, and TMA and MMA use one formula (PTX ISA 5.5.7, Swizzling modes).
    """
    return address ^ (((address >> 7) & SWIZZLE_MASK[span]) << 4)


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix descriptor: byte offsets `start`, `leading`, `stride`, and the swizzle span in bytes."""

    start: int
    leading: int
    stride: int
    span: int

    @classmethod
    def decode_sm100(cls, bits: int, line: int = 0) -> SharedDescriptor:
        """tcgen05 layout (PTX ISA 9.7.16.4.1): the swizzle in bits 61-63."""
        if bits >> 49 & 7:
            raise Unsupported(f"line {line}: shared-memory descriptor with a base offset")
        spans = {0: 0, 2: 128, 4: 64, 6: 32}
        mode = bits >> 61 & 7
        if mode not in spans:
            raise Unsupported(f"line {line}: shared-memory descriptor layout {mode}")
        return cls(*_descriptor_fields(bits), spans[mode])

    @classmethod
    def decode_sm90(cls, bits: int, line: int = 0) -> SharedDescriptor:
        """wgmma layout (PTX ISA 9.7.15.5.1.2.2): the swizzle in bits 62-63."""
        if bits >> 49 & 7:
            raise Unsupported(f"line {line}: matrix descriptor with a base offset")
        return cls(*_descriptor_fields(bits), {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62 & 3])

    def offsets(self, rows: int, depth: int, element_bytes: int, mn_major: bool) -> np.ndarray:
        """Byte offsets, shape (rows, depth), of an operand with `rows` along M or N and `depth` along K."""
        r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        span, size = self.span, element_bytes
        if not mn_major:
            if span == 0:
                at = r % 8 * 16 + r // 8 * self.stride + k * size // 16 * self.leading + k * size % 16
            else:
                at = r % 8 * span + r // 8 * self.stride + k * size
        elif span == 0:
            per = 16 // size
            at = r % per * size + r // per * self.stride + k % 8 * 16 + k // 8 * self.leading
        else:
            per = span // size
            at = r % per * size + r // per * self.leading + k % 8 * span + k // 8 * self.stride
        return swizzle(self.start + at, span)


def _descriptor_fields(bits: int) -> tuple[int, int, int]:
    return (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4


@dataclass(frozen=True)
class InstructionDescriptor:
    """The 32-bit instruction descriptor of tcgen05.mma (PTX ISA 9.7.16.4.2)."""

    m: int
    n: int
    d_format: int
    a_format: int
    b_format: int
    negate_a: bool
    negate_b: bool
    a_mn_major: bool
    b_mn_major: bool

    @classmethod
    def decode(cls, bits: int, line: int = 0) -> InstructionDescriptor:
        if bits & 0xF:
            raise Unsupported(f"line {line}: sparse or saturating tcgen05.mma (instruction descriptor 0x{bits:08x})")
        return cls(m=(bits >> 24 & 31) * 16, n=(bits >> 17 & 63) * 8, d_format=bits >> 4 & 3, a_format=bits >> 7 & 7,
                   b_format=bits >> 10 & 7, negate_a=bool(bits >> 13 & 1), negate_b=bool(bits >> 14 & 1),
                   a_mn_major=bool(bits >> 15 & 1), b_mn_major=bool(bits >> 16 & 1))  # fmt: skip


# Register fragments (PTX ISA 9.7.14.5, 9.7.15.5) -------------------------------------------------------------------


@cache
def fragment_a(k: int, element_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """A of mma.sync m16nNkK and of wgmma (one warp's 16 rows): (row, column) of each (register, lane, element).

    Registers hold 4 / element_bytes consecutive K elements; register pairs cover rows g and g + 8.
    """
    per = 4 // element_bytes
    registers = max(1, 16 * k // (32 * per))
    reg, lane, e = np.meshgrid(np.arange(registers), LANES, np.arange(per), indexing="ij")
    row = lane // 4 + 8 * (reg % 2)
    column = lane % 4 * per + e + 4 * per * (reg // 2)
    return row, column


@cache
def fragment_b(k: int, element_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """B of mma.sync m16n8kK: (k index, n index) of each (register, lane, element)."""
    per = 4 // element_bytes
    registers = max(1, 8 * k // (32 * per))
    reg, lane, e = np.meshgrid(np.arange(registers), LANES, np.arange(per), indexing="ij")
    return lane % 4 * per + e + 4 * per * reg, lane // 4


@cache
def fragment_c(n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """C and D in float32 of m16nN (N = 8 for mma.sync, up to 256 a warp of wgmma): (row, column) of (register,
    lane).
    """
    reg, lane = np.meshgrid(np.arange(n // 2), LANES, indexing="ij")
    return lane // 4 + 8 * (reg // 2 % 2), 8 * (reg // 4) + lane % 4 * 2 + reg % 2


# TMEM ------------------------------------------------------------------------------------------------------------


def tmem_cells(shape: str, registers: int, lane: int, column: int, split: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(lane, column) of TMEM for each (register, thread) of tcgen05.ld/st (PTX ISA 9.7.16.8, Data movement shapes)."""
    t, r = LANES[None, :], np.arange(registers)[:, None]
    if shape == "32x32b":
        return np.broadcast_to(lane + t, (registers, 32)), np.broadcast_to(column + r, (registers, 32))
    if shape == "16x64b":
        return np.broadcast_to(lane + t // 4 + 8 * (t % 2), (registers, 32)), column + 2 * r + t // 2 % 2
    if shape == "16x32bx2":
        return np.broadcast_to(lane + t % 16, (registers, 32)), column + r + split * (t // 16)
    if shape == "16x128b":
        return lane + t // 4 + 8 * (r % 2), column + 4 * (r // 2) + t % 4
    if shape == "16x256b":
        return lane + t // 4 + 8 * (r // 2 % 2), column + 8 * (r // 4) + 2 * (t % 4) + r % 2
    raise Unsupported(f"TMEM shape {shape}")


def accumulator_lanes(m: int, cta_pair: bool, first_lane: int) -> np.ndarray:
    """TMEM lanes that hold the rows of D in one CTA (PTX ISA 9.7.16.10.5, Data path layouts)."""
    if (m == 128 and not cta_pair) or m == 256:
        return np.arange(128)
    if m == 128:  # two CTAs of 64 rows: columns below N/2 in lanes 0-63, the others in lanes 64-127
        return np.arange(64)
    return np.concatenate([np.arange(16) + 32 * q for q in range(4)]) + first_lane
