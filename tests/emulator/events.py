"""The events of a launch and what each of them waits for, recorded while the emulator executes it.

`recording()` lists the graph of each launch inside it. A graph is the happens-before order of one execution, with no
time in it: `benchmarks/sm100_events.py` gives every event a duration and finds the longest path.

- A `Step` is a node of the program (a run of register instructions, a branch, or one other instruction) as one warp
  executed it; the steps of a warp follow each other in program order.
- An `Operation` is what a step starts and does not wait for: a TMA copy, an MMA, a commit.
- A `Phase` of a barrier completes with the last of its arrivals, by steps and by operations. A step that waits for it
  comes after.

Nothing of this runs in an ordinary launch: the machine and its barriers are replaced by recording ones for a while,
with every warp on its own, so that it is known who arrives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from . import barriers, launcher, machine
from .instructions import mbarrier
from .instructions.tma import tensor_map
from .layouts import InstructionDescriptor
from .patching import replaced
from .program import BRANCH, HANDLED, Node, Program
from .ptx import Mem


class Phase(NamedTuple):
    """The `number`-th completion, from 1, of a barrier: an mbarrier by (CTA, offset, incarnation), another by a number
    of its own."""

    barrier: tuple
    number: int


@dataclass(eq=False)
class Operation:
    """Asynchronous work. kind: "MMA", "commit", "TMA load", "TMA store", or the instruction's first words.

    size: FLOP of an MMA in each of its CTAs, bytes of a copy. ctas: whose units do the work. accumulator: the first
    column of an MMA's D; operand: that of its A if A is in tensor memory, else None. arrives: phases that its end
    arrives on.
    """

    kind: str
    size: int
    ctas: tuple[int, ...]
    accumulator: int = -1
    operand: int | None = None
    arrives: list[Phase] = field(default_factory=list)


@dataclass(eq=False)
class Step:
    """A node of the program, executed by one warp. skipped: its guard was false in every lane.

    waits: phases that have completed before the warp goes on. ended: operations, likewise. read: of `ended`, it is
    enough that they have read their source. arrives: phases that it arrives on itself. places: addresses in shared
    memory that the lanes of a load or a store name; lanes that name the same one are served at once.
    """

    pc: int
    skipped: bool = False
    waits: list[Phase] = field(default_factory=list)
    ended: list[Operation] = field(default_factory=list)
    read: bool = False
    arrives: list[Phase] = field(default_factory=list)
    starts: list[Operation] = field(default_factory=list)
    places: int = 0


@dataclass(eq=False)
class Graph:
    """One launch. steps: by (CTA, warp), in program order; CTAs are numbered in the order in which they started."""

    program: Program
    steps: dict[tuple[int, int], list[Step]] = field(default_factory=dict)

    def arrivals(self) -> dict[Phase, int]:
        """How many arrivals each phase has."""
        found: dict[Phase, int] = {}
        for steps in self.steps.values():
            for step in steps:
                for source in (step, *step.starts):
                    for phase in source.arrives:
                        found[phase] = found.get(phase, 0) + 1
        return found

    def missing(self) -> list[Phase]:
        """Phases that a step waits for and nothing arrives on: none, if the recording is complete."""
        arrivals = self.arrivals()
        waited = {phase for steps in self.steps.values() for step in steps for phase in step.waits}
        return sorted(waited - arrivals.keys())


class _MBarrier(barriers.MBarrier):
    """Tells the recording who arrives and what a wait is for."""

    def _phase(self, number: int) -> Phase:
        return Phase((self.cta.number, self.offset, self.stamp_base), number)

    def arrive(self, count, generic, proxy, line) -> None:
        self.cta.machine.arrived(self._phase(self.phase + 1))
        super().arrive(count, generic, proxy, line)

    def complete_tx(self, size, generic, proxy) -> None:
        self.cta.machine.arrived(self._phase(self.phase + 1))
        super().complete_tx(size, generic, proxy)

    def passes(self, parity: int) -> bool:
        done = super().passes(parity)
        self.cta.machine.asked = self._phase(self.phase + (not done))
        return done


class _Rendezvous(barriers.Rendezvous):
    """A named or a cluster barrier, likewise."""

    def __init__(self, machine, slots: int) -> None:
        super().__init__(machine, slots)
        self.key = (next(machine.made),)

    def arrive(self, threads, expected, warps, line, name) -> int:
        phase = Phase(self.key, self.generation + 1)
        self.machine.arrived(phase)
        self.machine.asked = phase
        return super().arrive(threads, expected, warps, line, name)


class Recorder(machine.Machine):
    """A machine that keeps the graph of what it executes."""

    def __init__(self, program, *args, **options) -> None:
        chosen = options.pop("schedule", None) or machine.Schedule.from_seed(0)
        options["schedule"] = replace(chosen, quantum=1, together=False, spurious=0.0, asynchrony="eager", late=0.0)
        super().__init__(program, *args, **options)
        self.made = itertools.count()
        self.graph = Graph(program)
        self.current: Step | Operation | None = None
        self.asked: Phase | None = None
        self._bulk: dict[tuple[int, int], tuple[list, list]] = {}

    def arrived(self, phase: Phase) -> None:
        assert self.current is not None
        self.current.arrives.append(phase)

    def _choose(self, ready):
        """Of a diverged warp's lanes those that are behind, as they reconverge at once on a GPU."""
        group = super()._choose(ready)
        return min((g for g in ready if g.cta is group.cta and g.lo == group.lo), key=lambda g: g.pc)

    def _step(self, group) -> None:
        """Executes one node of one warp and keeps it, unless it did not get past it."""
        node = self.program.nodes[group.pc]
        cta, frame, mask = group.cta, group.frame, group.mask
        if not hasattr(cta, "number"):
            cta.number = cta.cluster.index * len(cta.cluster.ctas) + cta.rank
        warp = frame.warps[0]
        active = self._active(node, frame, mask)
        step = self.current = Step(node.pc, skipped=not len(active))
        if not step.skipped and (place := _shared_place(node)) is not None:
            step.places = len(set(frame.read(place, np.uint64)[active].tolist()))
        self.asked = None
        pipe, loose = len(warp.pipe), len(cta.cluster.loose)
        super()._step(group)
        self.current = None
        ended = node.kind == HANDLED and node.instruction.parts[0] in ("ret", "exit")
        if group.pc == node.pc and not ended and node.kind != BRANCH:
            return
        steps = self.graph.steps.setdefault((cta.number, warp.index), [])
        if node.kind != HANDLED or step.skipped:
            steps.append(step)
            return
        self._waits(step, node, warp)
        for queue, first in ((warp.pipe, pipe), (cta.cluster.loose, loose)):
            for place in range(first, len(queue)):
                operation = self._operation(node.instruction, frame, active[0])
                step.starts.append(operation)
                queue[place] = self._observed(operation, queue[place])
        self._copies(step, node.instruction, warp)
        blocked = group.blocked
        if blocked is None:
            steps.append(step)
        else:  # kept when it gets past, behind what other lanes of the warp do until then
            original = blocked.condition

            def passed(frame):
                done = original(frame)
                if done:
                    steps.append(step)
                return done

            blocked.condition = passed

    @staticmethod
    def _active(node: Node, frame, mask) -> list[int]:
        instruction = node.instruction
        active = mask
        if node.kind == HANDLED and instruction.guard is not None:
            guard = frame.P[instruction.guard.row]
            guard = ~guard if instruction.guard_negated else guard
            active = guard if mask is None else guard & mask
        return frame.active_lanes(active)

    def _waits(self, step: Step, node: Node, warp) -> None:
        """What an instruction waits for. A `test_wait` that fails waits for nothing and is no branch of this graph."""
        op = node.instruction.op
        if op.startswith("barrier.cluster.wait"):
            step.waits.append(Phase(warp.cta.cluster.barrier.key, warp.cluster_generation))
        elif self.asked is not None and self.asked.number > 0:
            if op.startswith("mbarrier.test_wait"):
                barrier = warp.cta.mbarriers[self.asked.barrier[1]]
                if self.asked.number > barrier.phase:
                    return
            if op.startswith(("mbarrier.t", "bar.sync", "barrier.sync", "barrier.cta.sync")):
                step.waits.append(self.asked)

    def _operation(self, i, frame, lane: int) -> Operation:
        cta = frame.cta
        here = (cta.number,)
        if i.op.startswith("tcgen05.mma"):
            shape = InstructionDescriptor.decode(frame.lane_scalar(i.operands[3], lane), i.line)
            depth = 16 if i.has("kind::f16") else 8 if i.has("kind::tf32") else 32
            if i.has("cta_group::2"):
                here = (cta.number, cta.number ^ 1)
            column = frame.lane_scalar(i.operands[0].items[0], lane) & 0xFFFF
            a = i.operands[1]
            operand = frame.lane_scalar(a.items[0], lane) & 0xFFFF if isinstance(a, Mem) else None
            return Operation("MMA", 2 * shape.m * shape.n * depth // len(here), here, column, operand)
        if i.op.startswith("tcgen05.commit"):
            return Operation("commit", 0, here)
        if i.op.startswith(("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")):
            to_shared = next(p for p in i.parts if p.startswith(("shared::", "global"))).startswith("shared::")
            place = i.operands[1 if to_shared else 0].items[0]
            size = tensor_map(frame, frame.lane_scalar(place, lane), i.line).box_bytes
            return Operation("TMA load" if to_shared else "TMA store", size, here)
        if i.op.startswith("cp.async.bulk"):
            to_shared = next(p for p in i.parts if p.startswith(("shared::", "global"))).startswith("shared::")
            return Operation("TMA load" if to_shared else "TMA store", frame.lane_scalar(i.operands[2], lane), here)
        return Operation(".".join(i.parts[:2]), 0, here)

    def _observed(self, operation: Operation, action):
        """The queued action, with what it arrives on credited to the operation."""

        def run():
            self.current = operation
            try:
                return action()
            finally:
                self.current = None

        return run

    def _copies(self, step: Step, i, warp) -> None:
        """Bulk stores complete by commit groups, not by barriers."""
        open_, groups = self._bulk.setdefault((warp.cta.number, warp.index), ([], []))
        open_.extend(each for each in step.starts if each.kind == "TMA store")
        if i.op.startswith("cp.async.bulk.commit_group"):
            groups.append(list(open_))
            open_.clear()
        elif i.op.startswith("cp.async.bulk.wait_group"):
            pending = i.operands[0].value
            covered = groups[: len(groups) - pending] if pending else groups
            step.ended = [each for group in covered for each in group]
            step.read = i.has("read")


def _shared_place(node: Node):
    """The address operand of a load from or a store to shared memory, or None."""
    instruction = node.instruction
    if node.kind != HANDLED or not instruction.op.startswith(("ld.shared", "st.shared")):
        return None
    return instruction.operands[instruction.op.startswith("ld.")].items[0]


@contextmanager
def recording() -> Iterator[list[Graph]]:
    """Records every launch inside the block; the list has their graphs."""
    graphs: list[Graph] = []

    class Kept(Recorder):
        def run(self):
            graphs.append(self.graph)
            return super().run()

    with replaced({(launcher, "Machine"): Kept, (machine, "Rendezvous"): _Rendezvous,
                   (mbarrier, "MBarrier"): _MBarrier}):  # fmt: skip
        yield graphs
