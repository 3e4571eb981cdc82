"""Rings of shared-memory slots between a producer and its consumers, on mbarriers.

A slot has two barriers. `full` completes when the slot holds data, `empty` when every consumer has let go of it. Both
sides walk the slots in the same order, each with a `Cursor` of its own: a slot's index and the parity of the lap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


class Cursor(NamedTuple):
    """A place in a ring: the slot, and the parity (0 or 1) of the lap that it is visited on."""

    index: Int32
    phase: Int32


@dataclass(frozen=True)
class Ring:
    """Barriers of `slots` slots: `full` at `barriers[0:slots]`, `empty` at `barriers[slots:2 * slots]`.

    producers, consumers: arrivals that complete a slot's `full` and its `empty`; data that arrives by TMA is
    announced by `expect` and counts as one producer.
    """

    barriers: cute.Pointer
    slots: cutlass.Constexpr[int]
    producers: cutlass.Constexpr[int]
    consumers: cutlass.Constexpr[int]

    def init(self) -> None:
        """Initialises the barriers; one thread calls it, before a fence and a barrier of the block."""
        for slot in range(self.slots):
            cute.arch.mbarrier_init(self.barriers + slot, self.producers)
            cute.arch.mbarrier_init(self.barriers + self.slots + slot, self.consumers)

    def start(self) -> Cursor:
        """Where both sides begin."""
        return Cursor(Int32(0), Int32(0))

    def next(self, cursor: Cursor) -> Cursor:
        """The place after `cursor`; to be reassigned, since loops carry values and not objects."""
        if const_expr(self.slots == 1):
            return Cursor(cursor.index, cursor.phase ^ 1)
        index = (cursor.index + 1) % self.slots
        return Cursor(index, cursor.phase ^ Int32(index == 0))

    def full_barrier(self, cursor: Cursor) -> cute.Pointer:
        """The barrier that a TMA load into the slot reports to."""
        return self.barriers + cursor.index

    def acquire(self, cursor: Cursor) -> None:
        """Producer: waits until the consumers of the previous lap have let go of the slot."""
        cute.arch.mbarrier_wait(self.barriers + self.slots + cursor.index, cursor.phase ^ 1)

    def expect(self, cursor: Cursor, size: int) -> None:
        """Producer: announces `size` bytes by TMA; one thread."""
        cute.arch.mbarrier_arrive_and_expect_tx(self.full_barrier(cursor), size)

    def publish(self, cursor: Cursor) -> None:
        """Producer: the slot holds data written by ordinary stores; each producer arrives."""
        cute.arch.mbarrier_arrive(self.full_barrier(cursor))

    def wait(self, cursor: Cursor) -> None:
        """Consumer: waits until the slot holds data."""
        cute.arch.mbarrier_wait(self.full_barrier(cursor), cursor.phase)

    def release(self, cursor: Cursor) -> None:
        """Consumer: lets go of the slot; as many threads as the ring has `consumers`."""
        cute.arch.mbarrier_arrive(self.barriers + self.slots + cursor.index)
