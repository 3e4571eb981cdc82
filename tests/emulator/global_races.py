"""Races on global memory: accesses of different warps to the same bytes that no chain of synchronisation orders.

Inside a cluster the vector clocks of `races.py` decide. Between clusters only memory itself can order: a release (an
atomic or store with `.release`, or a weaker one behind a fence) publishes at its address what its warp has seen, an
acquire of that address takes it over (PTX ISA 8.7-8.9, release and acquire patterns). What a warp acquired holds for
all who synchronise with it afterwards, so it is kept as an event of the cluster: the acquiring warp, its clock, and the
clocks of other clusters that it then knows.

Atomics and other strong accesses do not race with each other. Of the readers of a cell only the last is remembered, so
one schedule may miss a write after a read; another order of the same pair, a read after a write, is always seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .frame import Frame
    from .machine import Warp
    from .memory import Allocation, GlobalMemory
    from .races import RaceLog

Knowledge = dict[int, np.ndarray]
"""By cluster: the vector clock of what is known to have happened there."""

KIND = "global memory race"


def merge(into: Knowledge, other: Knowledge) -> bool:
    """Adds `other`; whether that was news."""
    news = False
    for cluster, clock in other.items():
        known = into.get(cluster)
        if known is None:
            into[cluster] = clock.copy()
            news = True
        elif (clock > known).any():
            into[cluster] = np.maximum(clock, known)
            news = True
    return news


class _Accesses:
    """Who last did something to each cell of an array: cluster, slot, clock, line, and whether by a strong access."""

    def __init__(self, cells: int) -> None:
        self.cluster = np.full(cells, -1, np.int32)
        self.slot = np.zeros(cells, np.int32)
        self.clock = np.zeros(cells, np.int32)
        self.line = np.zeros(cells, np.int32)
        self.strong = np.zeros(cells, bool)

    def put(self, cells, cluster: int, slots, clocks, line: int, strong: bool) -> None:
        self.cluster[cells] = cluster
        self.slot[cells] = slots[:, None]
        self.clock[cells] = clocks[:, None]
        self.line[cells] = line
        self.strong[cells] = strong

    def unordered(self, cells, warps: list[Warp], rows: np.ndarray, slots: np.ndarray, strong: bool) -> np.ndarray:
        """Which of the cells, shape (n, k), were last accessed by somebody of whom warp `warps[rows[i]]` has not
        heard. Row i is accessed by actor `slots[i]`."""
        own = warps[0].cta.cluster
        cluster, slot, clock = self.cluster[cells], self.slot[cells], self.clock[cells]
        clocks = np.stack([warp.clock for warp in warps])
        bad = (cluster == own.index) & (clock > clocks[rows[:, None], slot]) & (slot != slots[:, None])
        for other in np.unique(cluster[(cluster >= 0) & (cluster != own.index)]):
            known = np.stack([known_of(warp, int(other)) for warp in warps])
            bad |= (cluster == other) & (clock > known[rows[:, None], slot])
        return bad & ~self.strong[cells] if strong else bad


def known_of(warp: Warp, cluster: int) -> np.ndarray:
    """The clock of another cluster as far as a warp knows it, by what its own cluster acquired."""
    own = warp.cta.cluster
    out = np.zeros_like(warp.clock)
    for slot, stamp, knowledge in own.acquired:
        if warp.clock[slot] >= stamp and cluster in knowledge:
            np.maximum(out, knowledge[cluster], out=out)
    return out


class _Shadow:
    def __init__(self, allocation: Allocation, cell_bytes: int) -> None:
        cells = -(-(allocation.end - allocation.aligned) // cell_bytes) + 1
        self.writes, self.reads = _Accesses(cells), _Accesses(cells)


class GlobalRaces:
    """The check for one launch."""

    def __init__(self, memory: GlobalMemory, cell_bytes: int, log: RaceLog) -> None:
        self.memory, self.cell_bytes, self.log = memory, cell_bytes, log
        self.shadows: dict[int, _Shadow] = {}
        self.published: dict[int, Knowledge] = {}

    # Synchronisation through memory
    def seen(self, warp: Warp) -> Knowledge:
        """All that a warp knows to have happened, to hand to others; what it does next is not covered."""
        own = warp.cta.cluster
        out: Knowledge = {}
        for slot, stamp, knowledge in own.acquired:
            if warp.clock[slot] >= stamp:
                merge(out, knowledge)
        out[own.index] = warp.release()
        return out

    def publish(self, warp: Warp, addresses: set[int], knowledge: Knowledge | None) -> None:
        if knowledge:
            for address in addresses:
                merge(self.published.setdefault(address, {}), knowledge)

    def acquire(self, warp: Warp, knowledge: Knowledge) -> None:
        own = warp.cta.cluster
        foreign = {cluster: clock for cluster, clock in knowledge.items() if cluster != own.index}
        mine = knowledge.get(own.index)
        if mine is not None:
            np.maximum(warp.clock, mine, out=warp.clock)
        known: Knowledge = {}
        for slot, stamp, each in own.acquired:
            if warp.clock[slot] >= stamp:
                merge(known, each)
        if merge(known, foreign):
            own.acquired.append((warp.id, int(warp.clock[warp.id]), known))

    def strong_read(self, warp: Warp, addresses: set[int], acquire: bool) -> None:
        """A relaxed read takes over what was published at its next fence, an acquiring one at once."""
        found: Knowledge = {}
        for address in addresses & self.published.keys():
            merge(found, self.published[address])
        if acquire:
            self.acquire(warp, found)
        else:
            merge(warp.read_since_fence, found)

    def strong_write(self, warp: Warp, addresses: set[int], release: bool) -> None:
        """A relaxed write publishes what its warp had seen at its last fence, a releasing one all that it has seen."""
        self.publish(warp, addresses, self.seen(warp) if release else warp.seen_at_fence)

    def fence(self, warp: Warp) -> None:
        self.acquire(warp, warp.read_since_fence)
        warp.read_since_fence = {}
        warp.seen_at_fence = self.seen(warp)

    # Accesses
    def access(self, frame: Frame, lanes, addresses: np.ndarray, size: int, line: int, what: str, *, write: bool,
               strong: bool = False, changes=None) -> None:  # fmt: skip
        """`size` bytes at `addresses` of the active `lanes` (None: all). changes: for stores, which lanes change
        anything: two warps that store one value to one place are no race."""
        rows = (np.arange(frame.lanes) if lanes is None else lanes) // 32
        self._access(frame.warps, rows, frame.warp_ids[rows], None, addresses, size, line, what, write, strong, changes)

    def bulk(self, warp: Warp, slot: int, clock: int | None, addresses: np.ndarray, size: int, line: int, what: str, *,
             write: bool, strong: bool = False) -> None:  # fmt: skip
        """A copy of rows of `size` bytes by an agent (`slot`, at `clock`) on behalf of a warp."""
        rows = np.zeros(len(addresses), np.intp)
        clocks = None if clock is None else np.full(len(addresses), clock, np.int32)
        self._access([warp], rows, np.full(len(addresses), slot), clocks, addresses, size, line, what, write, strong)

    def _access(self, warps, rows, slots, clocks, addresses, size, line, what, write, strong, changes=None) -> None:
        allocation = self.memory.lookup(int(addresses[0]))
        if allocation is None:
            return  # the access itself reports it
        shadow = self.shadows.get(allocation.address)
        if shadow is None:
            shadow = self.shadows[allocation.address] = _Shadow(allocation, self.cell_bytes)
        if int(addresses.min()) < allocation.address or int(addresses.max()) + size > allocation.end:
            return  # lanes reach several arrays: rare enough to leave out
        first = (addresses - np.uint64(allocation.aligned)).astype(np.int64)
        count = max(1, size // self.cell_bytes)
        cells = first[:, None] // self.cell_bytes + np.arange(count)
        if clocks is None:
            clocks = np.array([warp.clock[warp.id] for warp in warps], np.int32)[rows]
        cluster = warps[0].cta.cluster
        self._check(shadow.writes, allocation, cells, warps, rows, slots, strong, changes, line,
                    f"{what} {'overwrites' if write else 'reads'}", "written")  # fmt: skip
        if write:
            self._check(shadow.reads, allocation, cells, warps, rows, slots, strong, changes, line,
                        f"{what} overwrites", "read")  # fmt: skip
            shadow.writes.put(cells, cluster.index, slots, clocks, line, strong)
        else:
            shadow.reads.put(cells, cluster.index, slots, clocks, line, strong)

    def _check(
        self, before: _Accesses, allocation, cells, warps, rows, slots, strong, changes, line, doing, done
    ) -> None:
        bad = before.unordered(cells, warps, rows, slots, strong)
        if changes is not None:
            bad &= changes[:, None]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            cell = int(cells[row, column])
            other = int(before.line[cell])
            offset = allocation.aligned + cell * self.cell_bytes - allocation.address
            warp = warps[rows[row]]
            self.log.add(KIND, line, other,
                         f"line {line} {doing} byte {offset} of {allocation.name}, {done} at line {other} in cluster "
                         f"{before.cluster[cell]}, with which CTA {warp.cta.ctaid} warp {warp.index} has not "
                         "synchronised")  # fmt: skip
