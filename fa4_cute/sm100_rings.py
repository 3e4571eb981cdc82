"""What the tensor cores add to `pipelines.Ring`: barriers that complete when the MMAs issued so far have finished.

A commit arrives once, by one thread, when every earlier `tcgen05.mma` of that thread is done (PTX ISA 8.8, 9.7.16.12).

In most rings here each Q tile keeps a slot of its own, and visits it once a lap. `laps` is then a word whose bit i is
the parity of Q tile i's lap; Q tiles may be on different laps, since they may see different numbers of key tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import tcgen05

from fa4_cute.pipelines import Cursor, Ring


def slot_of(i: int | Int32, laps: Int32) -> Cursor:
    """Q tile i's slot, on its lap."""
    return Cursor(Int32(i), (laps >> i) & 1)


def lap_of(i: int, laps: Int32) -> Int32:
    """`laps` with Q tile i one lap on."""
    return laps ^ (1 << i)


def _commit(barrier: cute.Pointer, ctas: int) -> None:
    """Arrives, in both CTAs of a pair, when the MMAs issued so far have finished; a converged warp calls it."""
    with cute.arch.elect_one():
        if ctas == 2:
            tcgen05.commit(barrier, 0b11, tcgen05.CtaGroup.TWO)
        else:
            tcgen05.commit(barrier)


@cute.jit
def _arrive(barrier: cute.Pointer, ctas: cutlass.Constexpr[int]):
    """Every thread arrives; in a pair, a lane for its warp, at block 0, which issues the MMAs of both."""
    if const_expr(ctas == 2):
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier, 0)
    else:
        cute.arch.mbarrier_arrive(barrier)


@dataclass(frozen=True)
class MmaRing(Ring):
    """A ring whose producer or consumer is the MMA warp. The committing methods are for a converged warp.

    ctas: 2 if the MMAs belong to a pair of CTAs. Each CTA then has its own barriers; those that the MMA warp waits for
    are block 0's, where both report, and commits complete both.
    """

    ctas: cutlass.Constexpr[int] = 1

    def next(self, cursor: Cursor) -> Cursor:
        """As `Ring.next`, without a division: the MMA warp has little time between its MMAs."""
        index = cursor.index + 1
        same_lap = Int32(index != self.slots)
        return Cursor(index * same_lap, cursor.phase ^ same_lap ^ 1)

    def wait_parts(self, cursor: Cursor, parts: int) -> Cursor:
        """Consumer: waits until so many slots hold data; returns the place after them."""
        for _ in range(parts):
            self.wait(cursor)
            cursor = self.next(cursor)
        return cursor

    def release_parts(self, cursor: Cursor, parts: int) -> Cursor:
        """Consumer: lets go of so many slots when the MMAs issued so far have read them; returns the place after."""
        for _ in range(parts):
            self.release_by_mma(cursor.index)
            cursor = self.next(cursor)
        return cursor

    def publish_by_mma(self, index: int | Int32) -> None:
        """Producer: the slot holds what the MMAs issued so far leave there."""
        _commit(self.barriers + index, self.ctas)

    def release_by_mma(self, index: int | Int32) -> None:
        """Consumer: lets go of the slot when the MMAs issued so far have read it."""
        _commit(self.barriers + self.slots + index, self.ctas)

    def release(self, cursor: Cursor) -> None:
        """Consumer: lets go of a slot that the MMA warp waits for; whole warps call it."""
        _arrive(self.barriers + self.slots + cursor.index, self.ctas)

    def wait_released(self, cursor: Cursor) -> None:
        """Producer: waits until the consumers of this lap have let go of the slot."""
        cute.arch.mbarrier_wait(self.barriers + self.slots + cursor.index, cursor.phase)


@dataclass(frozen=True)
class Signal:
    """One barrier for each of `slots`: full barriers of a ring whose slots are let go of by way of another ring."""

    barriers: cute.Pointer
    slots: cutlass.Constexpr[int]
    arrivals: cutlass.Constexpr[int]
    ctas: cutlass.Constexpr[int] = 1

    def init(self) -> None:
        """Initialises the barriers; one thread calls it, before a fence and a barrier of the block."""
        for slot in range(self.slots):
            cute.arch.mbarrier_init(self.barriers + slot, self.arrivals)

    def publish(self, cursor: Cursor) -> None:
        """Each of the producer's threads arrives, or as `MmaRing` has it."""
        _arrive(self.barriers + cursor.index, self.ctas)

    def publish_by_mma(self, index: int) -> None:
        """As `MmaRing.publish_by_mma`."""
        _commit(self.barriers + index, self.ctas)

    def wait(self, cursor: Cursor) -> None:
        """Waits for this lap's arrivals."""
        cute.arch.mbarrier_wait(self.barriers + cursor.index, cursor.phase)
