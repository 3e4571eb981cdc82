"""The earliest times of a recorded launch's events, without a Blackwell GPU.

`tests/emulator/events.py` records what waits for what while the emulator executes a kernel. `timed` plays that graph
in the order of time, with what instructions cost (`sm100_costs.py`) and the latencies of `sm100_rates.py`. A warp
issues in order, one instruction a clock and scheduler; an instruction waits for its registers, for its pipe, which the
warps of a scheduler share, and for the barriers and copies that it was recorded to wait for. MMAs run one after the
other, TMA copies share one path to the L2 cache. Every event knows which of these it waited for last, so the longest
path can be read backwards, by kind.

Not seen: shared memory's bandwidth, which MMA operands and TMA copies share and pairs of CTAs relieve; bank conflicts;
clock rates under load; misses in the L2 cache. Which warp a scheduler prefers is not known: `timed` has two answers.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.sm100_costs import Loop, assembled, costs
from benchmarks.sm100_rates import BRANCH, HANDOVER, L2_BYTES, L2_LATENCY, MMA_FLOP, REMOTE, SCHEDULERS, Cost
from tests.emulator.events import Graph, Operation, Phase, Step


@dataclass
class Timing:
    """issued, passed: of each step, when its last instruction issued and when its warp went on. begun, ended: of each
    operation. phases: when they completed. ends: when each CTA's last warp and operation was done. busy: clocks of
    each CTA's units in use (all four schedulers). path: of the last event, clocks by what was waited for."""

    issued: dict[Step, float] = field(default_factory=dict)
    passed: dict[Step, float] = field(default_factory=dict)
    begun: dict[Operation, float] = field(default_factory=dict)
    ended: dict[Operation, float] = field(default_factory=dict)
    phases: dict[Phase, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    busy: dict[int, Counter] = field(default_factory=dict)
    _events: list[tuple[float, int, str]] = field(default_factory=list)
    _last: dict[int, int] = field(default_factory=dict)

    def path(self, cta: int = 0, since: float = 0.0, until: float = math.inf) -> Counter:
        """What the last event of a CTA waited for: clocks by kind, of those between `since` and `until`."""
        found: Counter = Counter()
        at = self._last[cta]
        while at >= 0:
            time, before, cause = self._events[at]
            start = self._events[before][0] if before >= 0 else 0.0
            found[cause] += max(min(time, until) - max(start, since), 0.0)
            at = before
        return +found


class _Warp:
    """A warp on its way through its steps."""

    def __init__(self, key: tuple[int, int], steps: list[Step]) -> None:
        self.key, self.steps, self.cta, self.scheduler = key, steps, key[0], (key[0], key[1] % SCHEDULERS)
        self.step = self.instruction = 0
        self.line: list[Cost] = []
        self.left = False  # whether the current step has issued, and may still wait
        self.issued = 0.0
        self.clock, self.event, self.cause = 0.0, -1, "issue"  # when it may go on, behind what, and why
        self.ready: dict[Any, tuple[float, int, str]] = {}
        self.memory = (0.0, -1)  # when its last access to tensor memory is over
        self.multiplied = (0.0, -1)  # when its last MMA is over


class _Player:
    """Plays a graph. Times are clocks; an event is (time, the event it waited for last, why)."""

    def __init__(self, graph: Graph, loops: Sequence[Loop], turns: bool) -> None:
        self.turns = turns
        self.graph, self.costs, self.out = graph, costs(graph), Timing()
        self.assembled: dict[Step, list[Cost]] = {}
        for loop in loops:
            self.assembled.update(assembled(graph, loop))
        self.missing = graph.arrivals()
        self.completed: dict[Phase, int] = {}
        self.latest: dict[Phase, tuple[float, int]] = {}
        self.parked: dict[Phase, list[_Warp]] = defaultdict(list)
        self.slots: dict[Any, tuple[float, int]] = defaultdict(lambda: (0.0, -1))
        self.units: dict[Any, tuple[float, int]] = defaultdict(lambda: (0.0, -1))
        self.read: dict[Operation, float] = {}
        self.operation_event: dict[Operation, int] = {}
        self.heap: list[tuple[float, int, int, _Warp]] = []
        self.pushed = 0

    def event(self, time: float, before: int, cause: str) -> int:
        self.out._events.append((time, before, cause))
        return len(self.out._events) - 1

    def push(self, warp: _Warp, time: float) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (time, 0 if self.turns else warp.key[1], self.pushed, warp))

    def play(self) -> Timing:
        for key, steps in self.graph.steps.items():
            warp = _Warp(key, steps)
            warp.line = self._line(steps[0])
            self.out.busy.setdefault(key[0], Counter())
            self.push(warp, 0.0)
        left = len(self.graph.steps)
        while self.heap:
            time, _, _, warp = heapq.heappop(self.heap)
            left -= self._advance(warp, time)
        if left:
            waiting = sorted((warp.key, phase) for phase, each in self.parked.items() for warp in each)
            raise ValueError(f"{left} warps wait for what never happens: {waiting[:8]}")
        return self.out

    def _line(self, step: Step) -> list[Cost]:
        line = self.assembled.get(step)
        if line is not None:
            return line
        line = self.costs[step.pc]
        return [line[0]._replace(pipe="other", busy=1, latency=0, writes=())] if step.skipped else line

    def _advance(self, warp: _Warp, now: float) -> bool:
        """Issues instructions of a warp until another warp could be earlier, or it waits. True at its end."""
        while True:
            step = warp.steps[warp.step]
            while warp.instruction < len(warp.line):
                cost = warp.line[warp.instruction]
                start, before, cause = self._earliest(warp, cost)
                if cost.pipe and start > now and self.heap and self.heap[0][0] < start:
                    self.push(warp, start)
                    return False
                self._issue(warp, cost, start, before, cause)
                now = max(now, start)
                warp.instruction += 1
            if not warp.left:
                self._leave(warp, step)
                warp.left = True
            if not self._pass(warp, step):
                return False
            warp.left = False
            warp.step += 1
            warp.instruction = 0
            if warp.step == len(warp.steps):
                self._end(warp.cta, warp.clock, warp.event)
                return True
            warp.line = self._line(warp.steps[warp.step])

    def _end(self, cta: int, time: float, event: int) -> None:
        if time >= self.out.ends.get(cta, 0.0):
            self.out.ends[cta], self.out._last[cta] = time, event

    def _earliest(self, warp: _Warp, cost: Cost) -> tuple[float, int, str]:
        start, before, cause = (0.0, -1, "issue") if not cost.pipe else (warp.clock, warp.event, warp.cause)
        ready = warp.ready
        for register in cost.reads:
            found = ready.get(register)
            if found is not None and found[0] > start:
                start, before, cause = found
        if cost.pipe:
            if cost.op.startswith(("tcgen05.wait", "FENCE.VIEW.ASYNC.T")) and warp.memory[0] > start:
                start, before, cause = *warp.memory, "TMEM"
            slot = self.slots[warp.scheduler]
            if slot[0] > start:
                start, before, cause = *slot, "issue"
            unit = self.units[warp.scheduler, cost.pipe]
            if unit[0] > start:
                start, before, cause = *unit, cost.pipe
        return start, before, cause

    def _issue(self, warp: _Warp, cost: Cost, start: float, before: int, cause: str) -> None:
        if not cost.pipe:
            for register in cost.writes:
                warp.ready[register] = (start, before, cause)
            return
        event = self.event(start, before, cause)
        self.slots[warp.scheduler] = (start + 1, event)
        self.units[warp.scheduler, cost.pipe] = (start + cost.busy, event)
        self.out.busy[warp.cta][cost.pipe] += cost.busy
        self.out.busy[warp.cta]["issue"] += 1
        done = (start + cost.busy - 1 + cost.latency, event, cost.pipe)
        for register in cost.writes:
            warp.ready[register] = done
        if cost.pipe == "TMEM":
            warp.memory = (done[0], event)
        warp.issued = start
        branch = cost.op.startswith("bra") and self._taken(warp, cost)
        warp.clock, warp.event, warp.cause = start + (BRANCH if branch else 1), event, "branch" if branch else "issue"

    def _taken(self, warp: _Warp, cost: Cost) -> bool:
        """Whether the warp's branch goes elsewhere."""
        if cost.op == "bra taken":
            return True
        following = warp.steps[warp.step + 1].pc if warp.step + 1 < len(warp.steps) else -1
        return following != self.graph.program.nodes[warp.steps[warp.step].pc].next_pc

    def _leave(self, warp: _Warp, step: Step) -> None:
        """Arrivals and operations of a step that has issued."""
        issued = self.out.issued[step] = warp.issued
        for phase in step.arrives:
            self._arrive(phase, issued, warp.event, warp.cta)
        for operation in step.starts:
            self._start(warp, operation, issued)

    def _pass(self, warp: _Warp, step: Step) -> bool:
        """A step's waits. False if its warp is parked."""
        for operation in step.ended:
            time = self.read[operation] if step.read else self.out.ended[operation]
            if time > warp.clock:
                warp.clock, warp.event, warp.cause = time, self.operation_event[operation], "TMA"
        open_ = [phase for phase in step.waits if phase not in self.completed]
        if open_:
            self.parked[open_[0]].append(warp)
            return False
        for phase in step.waits:
            time = self.out.phases[phase] + HANDOVER
            if time > warp.clock:
                warp.clock, warp.event, warp.cause = time, self.completed[phase], "hand-over"
        self.out.passed[step] = warp.clock
        return True

    def _arrive(self, phase: Phase, time: float, event: int, cta: int) -> None:
        if len(phase.barrier) > 1 and phase.barrier[0] != cta and event >= 0:
            time += REMOTE
            event = self.event(time, event, "hand-over")
        self.latest[phase] = max(self.latest.get(phase, (0.0, -1)), (time, event))
        self.missing[phase] -= 1
        if self.missing[phase]:
            return
        self.out.phases[phase], self.completed[phase] = self.latest.pop(phase)
        for warp in self.parked.pop(phase, ()):
            self.push(warp, max(warp.clock, self.out.phases[phase] + HANDOVER))

    def _start(self, warp: _Warp, operation: Operation, issued: float) -> None:
        """Times an operation, which starts when its unit is free: operations come here in the order of their issue."""
        if operation.kind == "commit":
            begin, event = max(warp.multiplied, (issued, warp.event))
            end = begin
        else:
            begin, event = issued, warp.event
            multiplies = operation.kind == "MMA"
            unit = operation.kind if multiplies else "TMA"
            clocks = operation.size / (MMA_FLOP if multiplies else L2_BYTES)
            cause = "issue"
            for cta in operation.ctas:
                if self.units[cta, operation.kind][0] > begin:
                    begin, event = self.units[cta, operation.kind]
                    cause = unit
            event = self.event(begin, event, cause)
            free = (begin + clocks, self.event(begin + clocks, event, unit))
            end, event = free
            if multiplies:
                warp.multiplied = free
            else:
                end, event = end + L2_LATENCY, self.event(end + L2_LATENCY, event, unit)
            for cta in operation.ctas:
                self.units[cta, operation.kind] = free
                self.out.busy[cta][operation.kind] += clocks
                self._end(cta, end, event)
            self.read[operation] = free[0]
        self.out.begun[operation], self.out.ended[operation] = begin, end
        self.operation_event[operation] = event
        for phase in operation.arrives:
            self._arrive(phase, end, event, warp.cta)


def timed(graph: Graph, loops: Sequence[Loop] = (), turns: bool = True) -> Timing:
    """The earliest time of every event. loops: SASS of inner loops, which stands for their PTX (see `assembled`).
    turns: warps of a scheduler that want the same pipe take turns; else the one of the lowest number always goes first.

    Raises ValueError if a warp waits for what was not recorded.
    """
    return _Player(graph, loops, turns).play()


@dataclass(frozen=True)
class Tile:
    """A Q tile's visit to a key tile, in clocks: S is there, all warps have stored the first and the last part of P,
    the MMAs of P V begin and end."""

    s: float
    first_p: float
    last_p: float
    begin: float
    end: float


def _groups(steps: list[Step]) -> list[tuple[list[Operation], list[Phase]]]:
    """A warp's MMAs, in groups that follow each other on one accumulator, with the phases that the next commit arrives
    on."""
    found: list[tuple[list[Operation], list[Phase]]] = []
    fresh = False
    for operation in (each for step in steps for each in step.starts):
        if operation.kind == "commit" and found:
            if fresh:
                found[-1][1].extend(operation.arrives)
            fresh = False
        elif operation.kind == "MMA":
            last = found[-1][0][-1] if found else None
            if last is None or (last.accumulator, last.operand is None) != (
                operation.accumulator,
                operation.operand is None,
            ):
                found.append(([], []))
            found[-1][0].append(operation)
            fresh = True
    return found


def tiles(graph: Graph, timing: Timing, columns: int = 128) -> dict[tuple[int, int], list[Tile]]:
    """The visits of each Q tile, by CTA and first column of its S, told by what they do: MMAs with both operands in
    shared memory make S, those that read A from tensor memory where that S was take P. columns: of S. Of a pair of CTAs
    the first one has the MMAs, and P is that of both."""
    groups = {cta: found for (cta, _), steps in graph.steps.items() if (found := _groups(steps))}
    scores_of = [phases for found in groups.values() for mmas, phases in found if mmas[0].operand is None]
    ready = {phase for phases in scores_of for phase in phases}
    nodes = graph.program.nodes
    stored: dict[Phase, list[list[float]]] = defaultdict(list)  # by phase of S: when each warp's parts of P were
    for steps in graph.steps.values():
        parts: list[float] = []
        for step in steps:
            op = nodes[step.pc].instruction.op
            if step.waits and step.waits[0] in ready and not op.startswith("mbarrier.test_wait"):
                parts = []
                stored[step.waits[0]].append(parts)
            elif op.startswith("tcgen05.wait::st"):
                parts.append(timing.passed[step])
    found: dict[tuple[int, int], list[Tile]] = defaultdict(list)
    for cta, each in groups.items():
        for n, (scores, phases) in enumerate(each):
            column = scores[0].accumulator
            if scores[0].operand is not None:
                continue
            values = next((g for g, _ in each[n + 1 :] if g[0].operand is not None
                           and column <= g[0].operand < column + columns), None)  # fmt: skip
            by_warp = [parts for phase in phases for parts in stored[phase] if parts]
            if values and by_warp:
                found[cta, column].append(Tile(
                    timing.ended[scores[-1]], max(parts[0] for parts in by_warp), max(parts[-1] for parts in by_warp),
                    timing.begun[values[0]], timing.ended[values[-1]],
                ))  # fmt: skip
    return dict(found)


def report(graph: Graph, timing: Timing) -> dict[str, Any]:
    """Of the first CTA, which has one item: medians over the tiles in its middle, clocks of the whole, and the part of
    the longest path that each kind of event has in the middle. S is there at the end of its last MMA, O at the end of
    P V's last; a period is the time from a Q tile's S to its next."""
    visits = [each for (cta, _), each in tiles(graph, timing).items() if cta == 0]
    middle = [tile for each in visits for tile in each[3:-2]]
    since, until = min(tile.s for tile in middle), max(tile.s for tile in middle)
    path = timing.path(0, since, until)
    return {
        "tiles": sum(map(len, visits)),
        "S to first P": median(tile.first_p - tile.s for tile in middle),
        "S to last P": median(tile.last_p - tile.s for tile in middle),
        "S to P V": median(tile.begin - tile.s for tile in middle),
        "S to O": median(tile.end - tile.s for tile in middle),
        "period": median(b.s - a.s for each in visits for a, b in zip(each[3:-2], each[4:-2])),
        "item": timing.ends[0],
        "path": {kind: round(clocks / (until - since), 3) for kind, clocks in path.most_common()},
    }
