"""Race detection: vector clocks for the actors, shadow cells for the memories.

Every *actor* of a cluster has a slot in the vector clocks: each warp, and for each warp the asynchronous agents that
work on its behalf (its tensor pipe, its bulk stores, its cp.async copies), and each mbarrier, which stands for the bulk
loads that complete on it. An access is ordered after an earlier one if the actor's clock has *seen* the earlier
access's stamp; synchronisation is what copies clocks (release on arrive, acquire on a successful wait).

Two clocks run side by side, since CUDA has two proxies (PTX ISA 8.2, Proxies): `clock` counts what generic accesses may
rely on; `async_clock` is raised to it only by `fence.proxy.async` (and `fence.mbarrier_init` for barriers), so an
asynchronous read of data that was written through the generic proxy without a fence is found though the barrier is
right.

This is the FastTrack scheme: exact for what ran, on one schedule. Values are not enough: a racy kernel can compute the
right answer on every schedule tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PENDING = 1 << 20
"""Added to the stamp of a `tcgen05.st` until `wait::st` and of an `ld` until `wait::ld`: nobody can have seen it."""


@dataclass
class RaceLog:
    """What the checks found. `reports` are errors, `tolerated` kinds go to `notes`; each pair of program places is
    reported once. `places` is for a check to remember where it has already looked for the words."""

    notes: list[str]
    tolerated: tuple[str, ...] = ()
    reports: list[str] = field(default_factory=list)
    places: set = field(default_factory=set)
    _seen: set = field(default_factory=set)

    def add(self, kind: str, line: int, other_line: int, text: str) -> None:
        key = (kind, line, other_line)
        if key not in self._seen:
            self._seen.add(key)
            (self.notes if kind in self.tolerated else self.reports).append(f"{kind}: {text}")


class Actors:
    """Slot numbers of a cluster's actors in the vector clocks, and their names."""

    KINDS = ("warp", "tensor pipe of warp", "bulk store of warp", "cp.async of warp", "bulk write of warp")
    MBARRIERS_PER_CTA = 128

    def __init__(self, warps: int, ctas: int) -> None:
        self.warps = warps
        self.first_mbarrier = warps * len(self.KINDS)
        self.count = self.first_mbarrier + self.MBARRIERS_PER_CTA * ctas
        self._names: dict[int, str] = {}

    def pipe(self, warp: int) -> int:
        return self.warps + warp

    def bulk(self, warp: int) -> int:
        return 2 * self.warps + warp

    def copy(self, warp: int) -> int:
        return 3 * self.warps + warp

    def bulk_write(self, warp: int) -> int:
        """A bulk store's writing of global memory, as opposed to its reading of shared memory (`bulk`)."""
        return 4 * self.warps + warp

    def new_mbarrier(self, name: str) -> int:
        slot = self.first_mbarrier + len(self._names)
        if slot >= self.count:
            raise OverflowError("more mbarriers than the race check has slots for")
        self._names[slot] = name
        return slot

    def name(self, slot: int) -> str:
        if slot in self._names:
            return f"the bulk load on {self._names[slot]}"
        return f"{self.KINDS[slot // self.warps]} {slot % self.warps}"


class Shadow:
    """Access history of one memory, by cell: who wrote last and when, and when each actor last read.

    `cells` arguments are integer arrays of shape (actors, k): row i lists the cells that actor i touches.
    """

    def __init__(self, cells: int, actors: Actors, log: RaceLog, name: str) -> None:
        self.actors, self.log, self.name = actors, log, name
        self.writer = np.full(cells, -1, np.int32)
        self.write_clock = np.zeros(cells, np.int32)
        self.write_line = np.zeros(cells, np.int32)
        self.generic = np.zeros(cells, bool)
        self.atomic = np.zeros(cells, bool)
        self.reads = np.zeros((actors.count, cells), np.int32)
        # Largest stamp of each actor anywhere in this memory: if an actor has seen those, nothing can race.
        self.last_write = np.zeros(actors.count, np.int32)
        self.last_read = np.zeros(actors.count, np.int32)

    def read(self, cells, slots, clocks, seen, line: int, what: str, async_seen=None) -> None:
        """Checks and records reads by actors `slots` with stamps `clocks`; `seen[i]` is actor i's vector clock.

        `async_seen` is given for accesses through the async proxy.
        """
        writer = self.writer[cells]
        if writer.min() < 0:
            cell = int(cells[writer < 0][0])
            self.log.add("uninitialised read", line, 0, f"line {line} {what} reads {self._at(cell)}, never written")
        if async_seen is not None or not (seen >= self.last_write).all():
            rows = np.arange(len(slots))[:, None]
            stamp = self.write_clock[cells]
            bad = (writer >= 0) & (stamp > seen[rows, writer]) & (writer != slots[:, None])
            if bad.any():
                self._report("read-after-write race", cells, bad, slots, line, what, "reads")
            elif async_seen is not None:
                bad = (writer >= 0) & self.generic[cells] & (stamp > async_seen[rows, writer])
                if bad.any():
                    self._report("missing proxy fence", cells, bad, slots, line, what, "reads through the async proxy")
        self.reads[slots[:, None], cells] = clocks[:, None]
        self.last_read[slots] = np.maximum(self.last_read[slots], clocks)

    def write(self, cells, slots, clocks, seen, line: int, what: str, generic: bool, same_value=None,
              atomic: bool = False) -> None:  # fmt: skip
        """Checks and records writes. `same_value()` tells which cells already hold what is being written: two warps
        that store one value to one place, as reductions do, are no race. Atomics do not race with each other."""
        if not (seen >= self.last_write).all():
            rows = np.arange(len(slots))[:, None]
            writer = self.writer[cells]
            bad = (writer >= 0) & (self.write_clock[cells] > seen[rows, writer]) & (writer != slots[:, None])
            if atomic:
                bad &= ~self.atomic[cells]
            if bad.any() and same_value is not None:
                bad &= ~same_value()
            if bad.any():
                self._report("write-after-write race", cells, bad, slots, line, what, "overwrites")
        for other in np.flatnonzero((seen < self.last_read).any(0)):
            bad = (self.reads[other][cells] > seen[:, other][:, None]) & (slots[:, None] != other)
            if bad.any() and same_value is not None:
                bad &= ~same_value()
            if bad.any():
                row, column = np.argwhere(bad)[0]
                self.log.add("write-after-read race", line, int(other),
                             f"line {line} {what} ({self.actors.name(int(slots[row]))}) overwrites "
                             f"{self._at(int(cells[row, column]))} while {self.actors.name(int(other))} may still "
                             f"read it")  # fmt: skip
        self.writer[cells] = slots[:, None]
        self.write_clock[cells] = clocks[:, None]
        self.write_line[cells] = line
        self.generic[cells] = generic
        self.atomic[cells] = atomic
        self.last_write[slots] = np.maximum(self.last_write[slots], clocks)

    def _report(self, kind, cells, bad, slots, line, what, verb) -> None:
        row, column = np.argwhere(bad)[0]
        cell = int(cells[row, column])
        written = int(self.write_line[cell])
        self.log.add(kind, line, written,
                     f"line {line} {what} ({self.actors.name(int(slots[row]))}) {verb} {self._at(cell)}, written at "
                     f"line {written} by {self.actors.name(int(self.writer[cell]))}")  # fmt: skip

    def _at(self, cell: int) -> str:
        return f"{self.name} cell {cell}"


class SharedShadow(Shadow):
    """Shadow of a CTA's shared memory; a cell is the smallest access of the program. `barriers` marks the cells of live
    mbarriers, which nothing but mbarrier operations may write before mbarrier.inval (PTX ISA 9.7.13.15)."""

    def __init__(self, size: int, cell_bytes: int, actors: Actors, log: RaceLog, name: str) -> None:
        super().__init__(-(-size // cell_bytes), actors, log, name)
        self.cell_bytes = cell_bytes
        self.barriers = np.zeros(len(self.writer), bool)

    def write(self, cells, slots, clocks, seen, line: int, what: str, generic: bool, same_value=None,
              atomic: bool = False) -> None:  # fmt: skip
        live = self.barriers[cells]
        if live.any():
            cell = int(cells[live][0])
            self.log.add("live mbarrier overwritten", line, cell,
                         f"line {line} {what} writes {self._at(cell)}, of an mbarrier not invalidated")  # fmt: skip
        super().write(cells, slots, clocks, seen, line, what, generic, same_value, atomic)

    def _at(self, cell: int) -> str:
        return f"{self.name} byte 0x{cell * self.cell_bytes:x}"

    def spans(self, starts: np.ndarray, size: int) -> np.ndarray:
        """Cells of `size` bytes from each of `starts`; shape `starts.shape[:-1] + (n,)`."""
        if size <= self.cell_bytes:
            return starts // self.cell_bytes
        per = size // self.cell_bytes
        cells = starts[..., None] // self.cell_bytes + np.arange(per)
        return cells.reshape(*starts.shape[:-1], -1)


class TensorMemoryShadow(Shadow):
    """Shadow of TMEM; a cell is one column of 16 lanes, the granule at which warps and MMAs share it."""

    COLUMNS = 512

    def __init__(self, actors: Actors, log: RaceLog, name: str) -> None:
        super().__init__(8 * self.COLUMNS, actors, log, name)

    def _at(self, cell: int) -> str:
        return f"{self.name} lanes {16 * (cell // self.COLUMNS)}.. column {cell % self.COLUMNS}"

    def end_read(self, cells, actor: int, clock: int, last: bool) -> None:
        """A pending read is over at `clock`. last: the actor has no other pending one."""
        self.reads[actor, cells] = clock
        if last:
            self.last_read[actor] = clock

    @classmethod
    def cells(cls, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.unique((lanes // 16) * cls.COLUMNS + columns)
