"""Barrier objects: mbarriers, named barriers, the cluster barrier. They hold clocks for the race check."""

from __future__ import annotations

import numpy as np

from .errors import BarrierMisuse


class Clocks:
    """A pair of vector clocks (generic and async proxy) that arrivals raise and waiters take over."""

    __slots__ = ("generic", "proxy")

    def __init__(self, count: int) -> None:
        self.generic = np.zeros(count, np.int32)
        self.proxy = np.zeros(count, np.int32)

    def raise_to(self, generic: np.ndarray, proxy: np.ndarray) -> None:
        np.maximum(self.generic, generic, out=self.generic)
        np.maximum(self.proxy, proxy, out=self.proxy)

    def copy_from(self, other: Clocks) -> None:
        self.raise_to(other.generic, other.proxy)


class MBarrier:
    """A 64-bit mbarrier object (PTX ISA 9.7.13.15): a phase completes when the pending arrivals and the transaction
    count are both zero. The count may be negative for a while, when bytes land before `expect_tx`."""

    def __init__(self, cta, offset: int, count: int, slots: int, slot: int, owner) -> None:
        self.cta, self.offset, self.count, self.slot, self.owner = cta, offset, count, slot, owner
        self.pending = count
        self.tx = 0
        self.phase = 0
        self.visible_to_async = False
        self.stamp_base = 0
        self.gathering = Clocks(slots)
        self.completed = Clocks(slots)

    def arrive(self, count: int, generic: np.ndarray, proxy: np.ndarray, line: int) -> None:
        """`count` arrivals that release the given clocks. Raises `BarrierMisuse` if more arrive than the phase
        expects."""
        if count > self.pending:
            raise BarrierMisuse(f"line {line}: {self} gets {count} arrivals, only {self.pending} are pending")
        self.gathering.raise_to(generic, proxy)
        self.pending -= count
        self.advance()

    def complete_tx(self, size: int, generic: np.ndarray, proxy: np.ndarray) -> None:
        """Bytes of a bulk copy have landed; the copy's issuer's clocks and the copy itself become visible."""
        self.tx -= size
        self.gathering.raise_to(generic, proxy)
        self.gathering.generic[self.slot] = self.stamp_base + self.phase + 1
        self.gathering.proxy[self.slot] = self.stamp_base + self.phase + 1
        self.advance()

    def advance(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            self.completed.copy_from(self.gathering)
            self.cta.machine.dirty = True

    def passes(self, parity: int) -> bool:
        """try_wait.parity: true when the phase of that parity has completed, so parity 1 passes when fresh."""
        return (self.phase & 1) != parity

    def __str__(self) -> str:
        return f"mbarrier 0x{self.offset:x} of CTA {self.cta.rank}"

    def state(self) -> str:
        return f"{self}: phase {self.phase}, pending {self.pending} of {self.count}, tx {self.tx}"


class Rendezvous:
    """A barrier of known size with generations: named barriers (`barrier.sync`) and the cluster barrier."""

    def __init__(self, machine, slots: int) -> None:
        self.machine, self.slots = machine, slots
        self.generation = 0
        self.arrived = 0
        self.expected: int | None = None
        self.gathering = Clocks(slots)
        self.completed: dict[int, Clocks] = {}

    def arrive(self, threads: int, expected: int, warps, line: int, name: str) -> int:
        """Counts arrivals of some warps; returns the generation whose completion they may wait for."""
        if self.expected is None:
            self.expected = expected
            self.gathering = Clocks(self.slots)
        elif self.expected != expected:
            raise BarrierMisuse(f"line {line}: {name} with {expected} threads, earlier arrivals said {self.expected}")
        for warp in warps:
            self.gathering.raise_to(warp.release(), warp.async_clock)
        self.arrived += threads
        if self.arrived > expected:
            raise BarrierMisuse(f"line {line}: {name} over-subscribed: {self.arrived} of {expected} threads")
        generation = self.generation + 1
        if self.arrived == expected:
            self.generation = generation
            self.completed[generation] = self.gathering
            self.completed.pop(generation - 64, None)
            self.arrived, self.expected = 0, None
            self.machine.dirty = True
        return generation
