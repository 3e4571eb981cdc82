"""What a recorded launch's steps cost: pipes, clocks and registers of their instructions, from SASS and from PTX.

SASS is at hand for inner loops: `assembled` finds the steps that go round one of them and gives them its instructions,
in the assembler's order. What register instructions cost elsewhere is read off the PTX: a move is free, and so is a
shift left, which an address or exponent addition takes in; `ordered` stands for the assembler's scheduling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks import sm100_sass
from benchmarks.sm100_rates import L2_LATENCY, LATENCY, RATES, SCHEDULERS, TMEM_BYTES, Cost
from tests.emulator.events import Graph, Step
from tests.emulator.program import RUN
from tests.emulator.ptx import Instruction, destinations, sources

FREE = ("mov", "shl", "cvta", "ld.param", "not.pred", "setmaxnreg", "griddepcontrol", "prefetch", "tcgen05.fence")
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")
MULTIPLIES = ("fma", "mad", "mul")


def pipe_of(i: Instruction) -> tuple[str, int]:
    """The unit that executes a PTX instruction, and the clocks it takes for a warp's 32 lanes."""
    op, name = i.op, i.parts[0]
    if op.startswith(FREE):
        return "", 0
    if op.startswith(("tcgen05.ld", "tcgen05.st")):
        columns = next((int(part[1:]) for part in i.parts if part[0] == "x" and part[1:].isdigit()), 1)
        return "TMEM", columns * 32 * 4 // (TMEM_BYTES // SCHEDULERS)
    if name in ("tcgen05", "cp"):
        return "tensor", 1
    if name in ("elect", "vote", "activemask"):
        return "uniform", 1
    if op.startswith(("ld.shared", "st.shared", "mbarrier", "bar", "shfl")) and not op.startswith("bar.warp"):
        words = next((int(part[1:]) for part in i.parts if part in ("v2", "v4")), 1)
        return "shared", words
    if name in ("ld", "st", "atom", "red"):
        return "L2", 1
    if name in ("bra", "ret", "exit", "fence", "bar", "membar", "nanosleep"):
        return "other", 1
    if name in SPECIAL:
        return "MUFU", 32 // RATES["MUFU"]
    if i.type == "f32x2":
        return "FMA", 2 * 32 // RATES["FMA"]
    if name in MULTIPLIES or (i.type in ("f32", "f16x2", "bf16x2") and name in ("add", "sub")):
        return "FMA", 32 // RATES["FMA"]
    return "ALU", 32 // RATES["ALU"]


def costs(graph: Graph) -> list[list[Cost]]:
    """For each node of the program, at its pc, what its instructions cost."""

    def cost(i: Instruction) -> Cost:
        pipe, busy = pipe_of(i)
        latency = L2_LATENCY if pipe == "L2" else LATENCY.get(pipe, 0)
        return Cost(pipe, busy, latency, tuple(set(sources(i))), tuple(set(destinations(i))), i.op)

    out: list[list[Cost]] = []
    for node in graph.program.nodes:
        code = graph.program.kernel.instructions[node.pc : node.next_pc] if node else []
        line = [cost(i) for i in code]
        out.append(ordered(line) if node is not None and node.kind == RUN else line)
    return out


SYNCHRONISES = {
    "mbarrier.try_wait": "SYNCS.PHASECHK", "mbarrier.test_wait": "SYNCS.PHASECHK", "mbarrier.arrive": "SYNCS.ARRIVE",
    "bar.sync": "BAR.SYNC", "barrier.sync": "BAR.SYNC", "barrier.cta.sync": "BAR.SYNC", "bar.arrive": "BAR.ARV",
    "barrier.arrive": "BAR.ARV", "barrier.cta.arrive": "BAR.ARV", "tcgen05.ld": "LDTM", "tcgen05.st": "STTM",
    "tcgen05.wait::st": "FENCE.VIEW.ASYNC.T", "tcgen05.mma": "UTCHMMA", "tcgen05.commit": "UTCBAR",
}  # fmt: skip
"""Instructions whose order the assembler keeps: PTX and SASS."""


def _signature(op: str) -> str:
    """What kind of synchronising instruction a PTX or SASS instruction is; "" for none."""
    for ptx, sass in SYNCHRONISES.items():
        if op.startswith((ptx, sass)):
            return sass
    return ""


Loop = Sequence[sm100_sass.Instruction]


def way_round(loop: Loop, wanted: Sequence[str]) -> list[list[Cost]] | None:
    """The way through a loop's SASS, past its forward branches, that synchronises as wanted: for each of these
    instructions, itself and those from the previous one on, the first's beginning with the loop's tail. None if no way
    does."""
    open_ = [(0, 0, ())]  # next instruction, instructions of `wanted` that were met, branches taken
    while open_:
        at, met, jumps = open_.pop()
        while at < len(loop):
            if mark := _signature(loop[at].op):
                if met == len(wanted) or wanted[met] != mark:
                    break
                met += 1
            if 0 < loop[at].target < len(loop) - at:
                open_.append((at + loop[at].target, met, (*jumps, at)))
            at += 1
        else:
            if met == len(wanted):
                break
    else:
        return None
    spans, line, at = [], [], 0
    while at < len(loop):
        each = sm100_sass.cost(loop[at])
        taken = at in jumps or at == len(loop) - 1
        line.append(each._replace(op="bra taken") if taken else each)
        if _signature(loop[at].op):
            spans.append(line)
            line = []
        at += loop[at].target if at in jumps else 1
    spans[0] = line + spans[0]
    return spans


def assembled(graph: Graph, loop: Loop) -> dict[Step, list[Cost]]:
    """What steps cost where their warp goes round a loop of which the SASS is at hand: to each synchronising step the
    SASS instructions behind the previous one, to the others nothing.

    Turns of the loop are found by what they synchronise on, in order; of several places in the program the one that is
    executed most often is the loop's.
    """
    nodes = graph.program.nodes
    ways: dict[tuple[str, ...], list[list[Cost]] | None] = {}
    turns: dict[int, list[tuple[list[Step], tuple[str, ...]]]] = defaultdict(list)
    for steps in graph.steps.values():
        marked = [n for n, s in enumerate(steps) if not s.skipped and _signature(nodes[s.pc].instruction.op)]
        last: dict[int, int] = {}
        for n, place in enumerate(marked):
            pc = steps[place].pc
            if pc in last and n - last[pc] <= len(loop):
                wanted = tuple(_signature(nodes[steps[m].pc].instruction.op) for m in marked[last[pc] : n])
                if wanted not in ways:
                    ways[wanted] = way_round(loop, wanted)
                if ways[wanted]:
                    turns[pc].append((steps[marked[last[pc]] : place], wanted))
            last[pc] = n
    found: dict[Step, list[Cost]] = {}
    for turn, wanted in max(turns.values(), key=len, default=()):
        spans = iter(ways[wanted] or ())
        for step in turn:
            marked_ = not step.skipped and _signature(nodes[step.pc].instruction.op)
            found[step] = next(spans) if marked_ else []
    return found


def ordered(line: list[Cost]) -> list[Cost]:
    """Straight-line code in the order of a list scheduler: of what could issue first, what the most clocks follow."""
    follow: list[list[int]] = [[] for _ in line]
    missing = [0] * len(line)
    made: dict[Any, int] = {}
    readers: dict[Any, list[int]] = defaultdict(list)
    for n, each in enumerate(line):
        before = {made[r] for r in each.reads if r in made}
        before |= {made[r] for r in each.writes if r in made} | {m for r in each.writes for m in readers[r]}
        before.discard(n)
        for m in before:
            follow[m].append(n)
        missing[n] = len(before)
        for r in each.reads:
            readers[r].append(n)
        for r in each.writes:
            made[r] = n
            readers[r] = []
    rank = [0] * len(line)
    for n in range(len(line) - 1, -1, -1):
        each = line[n]
        rank[n] = each.busy + each.latency + max((rank[m] for m in follow[n]), default=0)
    ready_at = [0] * len(line)
    waiting = [(0, -rank[n], n) for n in range(len(line)) if not missing[n]]
    free: dict[str, int] = defaultdict(int)
    out, clock = [], 0
    while waiting:
        best = min(waiting, key=lambda w: (max(w[0], free[line[w[2]].pipe], clock), w[1], w[2]))
        waiting.remove(best)
        n = best[2]
        each = line[n]
        out.append(each)
        start = best[0] if not each.pipe else max(best[0], free[each.pipe], clock)
        if each.pipe:
            clock, free[each.pipe] = start + 1, start + each.busy
        done = start + max(each.busy - 1, 0) + each.latency
        for m in follow[n]:
            ready_at[m] = max(ready_at[m], done)
            missing[m] -= 1
            if not missing[m]:
                waiting.append((ready_at[m], -rank[m], m))
    return out
