"""A frame: the registers of a range of warps, as generated code and handlers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .lowering import PARAM_WINDOW
from .ptx import FloatImm, Imm, NotReg, Param, Reg, Sink, SpecialReg, Sum, Symbol

if TYPE_CHECKING:
    from .machine import Cta, Warp

SHARED_RANK_SHIFT = 24
"""A shared::cluster address carries its CTA's rank from this bit on, so `mapa` and the DSL's `& 0xFEFFFFFF` (own
address to the even CTA of a pair) work as on hardware."""


class Frame:
    """Columns `32*lo .. 32*hi` of a CTA's register banks: the registers of a contiguous range of warps.

    Attributes `W, WI, WF` (32 bit), `D, DI, DF, DX` (64 bit), `H, HI, HF` (16 bit), `P` (predicates) are the banks
    seen as unsigned, signed, float; `DX` interleaves the two float32 halves of each lane.
    """

    def __init__(self, cta: Cta, lo: int, hi: int) -> None:
        self.cta, self.machine, self.cluster = cta, cta.machine, cta.cluster
        self.lo, self.hi = lo, hi
        self.lanes = 32 * (hi - lo)
        self.columns = slice(32 * lo, 32 * hi)
        self.warps = cta.warps[lo:hi]
        self.P = cta.banks["pred"][:, self.columns]
        self.H = cta.banks[16][:, self.columns]
        self.W = cta.banks[32][:, self.columns]
        self.D = cta.banks[64][:, self.columns]
        self.Q = cta.banks[128][:, self.columns]
        self.HI, self.HF = self.H.view(np.int16), self.H.view(np.float16)
        self.WI, self.WF = self.W.view(np.int32), self.W.view(np.float32)
        self.DI, self.DF, self.DX = self.D.view(np.int64), self.D.view(np.float64), self.D.view(np.float32)
        self._unsigned = {16: self.H, 32: self.W, 64: self.D}
        self.shared_base = cta.rank << SHARED_RANK_SHIFT
        self.warp_ids = np.array([w.id for w in self.warps])
        self.clocks = cta.cluster.clocks[cta.first_warp + lo : cta.first_warp + hi]

    # Used by generated code
    def special(self, name: str) -> np.ndarray:
        return self.cta.special(name)[self.columns]

    def both(self, mask: np.ndarray) -> np.ndarray:
        """A lane mask for the two halves of `DX`."""
        return np.repeat(mask, 2, axis=-1)

    def pair(self, value: np.ndarray) -> np.ndarray:
        return np.tile(value, self.lanes)

    def pairs(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (len(values), self.lanes, 2)).reshape(len(values), 2 * self.lanes)

    # Used by handlers
    def read(self, operand, dtype=np.uint32) -> np.ndarray:
        """Lane values of an operand, as unsigned bits converted to `dtype` by value."""
        if isinstance(operand, Reg):
            if operand.bank == "pred":
                return self.P[operand.row]
            values = self._unsigned[operand.bank][operand.row]
            return values if values.dtype == dtype else values.astype(dtype)
        if isinstance(operand, NotReg):
            return ~self.P[operand.row]
        if isinstance(operand, Imm):
            bits = 8 * np.dtype(dtype).itemsize
            return np.full(self.lanes, operand.value & ((1 << bits) - 1), dtype)
        if isinstance(operand, FloatImm):
            return np.full(self.lanes, operand.bits, dtype)
        if isinstance(operand, Sum):
            base = self.read(operand.base, np.uint64)
            width = operand.base.bank
            return ((base + np.uint64(operand.offset & (2**64 - 1))) & np.uint64((1 << width) - 1)).astype(dtype)
        if isinstance(operand, SpecialReg):
            return self.special(operand.name).astype(dtype)
        if isinstance(operand, Symbol):
            base = self.shared_base if operand.space == "shared" else 0
            return np.full(self.lanes, base + operand.offset, dtype)
        if isinstance(operand, Param):
            return np.full(self.lanes, PARAM_WINDOW + operand.offset, np.uint64).astype(dtype)
        raise EmulatorError(f"operand {operand!r}")

    def write(self, operand, values, mask) -> None:
        """Writes lane values (unsigned bits, or bools for a predicate) where `mask` is set (None: everywhere)."""
        if isinstance(operand, Sink):
            return
        bank = self.P if operand.bank == "pred" else self._unsigned[operand.bank]
        if mask is None:
            bank[operand.row] = values
        else:
            np.copyto(bank[operand.row], values, where=mask, casting="unsafe")

    def scalar(self, operand, mask, line: int) -> int:
        """The value of an operand that must agree in all active lanes."""
        if isinstance(operand, Imm):
            return operand.value
        values = self.read(
            operand, np.uint64 if not isinstance(operand, (Reg, NotReg)) or operand.bank == 64 else np.uint32
        )
        if mask is not None:
            values = values[mask]
        first = values[0]
        if len(values) > 1 and not (values == first).all():
            raise EmulatorError(f"line {line}: lanes disagree on an operand that must be uniform")
        return int(first)

    def lane_scalar(self, operand, lane: int) -> int:
        """The value of an operand in one lane of the frame."""
        if isinstance(operand, Imm):
            return operand.value
        if isinstance(operand, Reg) and operand.bank != "pred":
            return int(self._unsigned[operand.bank][operand.row, lane])
        if isinstance(operand, Sum):
            width = operand.base.bank
            return (int(self._unsigned[width][operand.base.row, lane]) + operand.offset) & ((1 << width) - 1)
        if isinstance(operand, Symbol) and operand.space == "shared":
            return self.shared_base + operand.offset
        if isinstance(operand, Param):
            return PARAM_WINDOW + operand.offset
        return int(self.read(operand, np.uint64)[lane])

    def active(self, mask) -> list[tuple[Warp, int]]:
        """Warps with an active lane, each with its first active lane (index in the frame)."""
        if mask is None:
            return [(warp, 32 * i) for i, warp in enumerate(self.warps)]
        return [(self.warps[i], 32 * i + int(np.argmax(mask[32 * i : 32 * i + 32])))
                for i in range(self.hi - self.lo) if mask[32 * i : 32 * i + 32].any()]  # fmt: skip

    def active_lanes(self, mask) -> list[int]:
        return list(range(self.lanes)) if mask is None else np.flatnonzero(mask).tolist()

    def lane_warp(self, lane: int) -> Warp:
        return self.warps[lane // 32]
