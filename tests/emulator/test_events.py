"""The event graph and its times: on programs whose times follow by hand, and complete on the attention kernels."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

pytest.importorskip("benchmarks.sm100_events", reason="run from the repository's root")

from benchmarks.sm100_costs import _signature, way_round
from benchmarks.sm100_events import report, tiles, timed
from benchmarks.sm100_rates import BRANCH, HANDOVER, L2_BYTES, L2_LATENCY, LATENCY, MMA_FLOP, REMOTE
from benchmarks.sm100_sass import Instruction
from tests.emulator.events import recording
from tests.emulator.kernels import kernel, tile_product
from tests.emulator.launcher import launch
from tests.emulator.tensor_map import TensorMap

START = """mov.b32 %r1, smem; add.s32 %r2, %r1, 8; shr.u32 %r3, %t, 5; setp.eq.u32 %p1, %t, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], {count}; @%p1 mbarrier.init.shared::cta.b64 [%r2], {count}; bar.sync 0;
"""
"""Two mbarriers, at %r1 and %r2; %r3 is the warp."""
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [{at}];"
WAIT = "W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{at}], {parity}; @!%p2 bra W{n};"


def recorded(body: str, threads: int = 64, count: int = 32, cluster: int = 1, **options):
    """(graph, times) of a program on `threads` threads a CTA."""
    with recording() as graphs:
        launch(kernel(0, START.format(count=count) + body, threads=threads), cluster, threads, [],
               cluster=(cluster, 1, 1), dynamic_shared=1024, **options)  # fmt: skip
    (graph,) = graphs
    assert not graph.missing()
    return graph, timed(graph)


def steps_of(graph, op: str, warp: int | None = None, cta: int = 0):
    """The steps, in order, that executed an instruction and were not guarded off."""
    nodes = graph.program.nodes
    return [step for (c, w), steps in sorted(graph.steps.items()) for step in steps
            if (w == warp or warp is None) and c == cta and not step.skipped
            and nodes[step.pc].instruction.op.startswith(op)]  # fmt: skip


def test_a_hand_over_takes_the_arrival_and_the_latency_behind_it():
    """Warp 1 waits for warp 0, which multiplies a chain of ten before it arrives."""
    chain = "mul.f32 %r5, %r5, %r5;" * 10
    body = "setp.eq.u32 %p3, %r3, 1; @%p3 bra SECOND;" + chain + ARRIVE + "bra END; SECOND:" + WAIT + "END:"
    graph, time = recorded(body.format(at="%r1", n=1, parity=0))
    (arrival,), (wait,) = steps_of(graph, "mbarrier.arrive", 0), steps_of(graph, "mbarrier.try_wait", 1)
    first = next(s for s in graph.steps[0, 0] if graph.program.nodes[s.pc].instruction.op.startswith("mul.f32"))
    before = graph.steps[0, 0][graph.steps[0, 0].index(first) - 1]
    # The branch before falls through; a product is read LATENCY after it issued; the arrival needs none.
    assert time.issued[first] == time.passed[before] + 9 * LATENCY["FMA"]
    assert time.issued[arrival] == time.issued[first] + 1
    assert time.phases[wait.waits[0]] == time.issued[arrival]
    assert time.passed[wait] == time.issued[arrival] + HANDOVER
    assert time.path(0)["hand-over"] == 2 * HANDOVER  # this one, and bar.sync's


def test_lanes_that_read_one_word_name_one_place():
    body = "mov.b32 %r4, 0; shl.b32 %r5, %t, 2; add.s32 %r5, %r5, %r1; st.shared.b32 [%r5+64], %r4; bar.sync 0;"
    graph, _ = recorded(body + "ld.shared.b32 %r6, [%r1+64]; ld.shared.b32 %r7, [%r5+64];")
    places = [[step.places for step in steps_of(graph, op, 1)] for op in ("st.shared", "ld.shared")]
    assert places == [[32], [1, 32]]


def test_two_roles_in_a_cycle_take_two_hand_overs_a_round():
    rounds = 6
    first = "".join(ARRIVE.format(at="%r1") + WAIT.format(n=f"A{n}", at="%r2", parity=n % 2) for n in range(rounds))
    second = "".join(WAIT.format(n=f"B{n}", at="%r1", parity=n % 2) + ARRIVE.format(at="%r2") for n in range(rounds))
    graph, time = recorded(f"setp.eq.u32 %p3, %r3, 1; @%p3 bra SECOND; {first} bra END; SECOND: {second} END:")
    done = [time.phases[step.waits[0]] for step in steps_of(graph, "mbarrier.try_wait", 0)]
    # Behind each wait, a branch that is not taken issues, then the arrival.
    assert np.diff(done).tolist() == [2 * (HANDOVER + 1)] * (rounds - 1)


def test_arrivals_in_another_cta_are_further_away():
    body = """mapa.shared::cluster.u32 %r8, %r1, 1; mov.u32 %r9, %cluster_ctarank; setp.eq.u32 %p3, %r9, 1;
    fence.mbarrier_init.release.cluster; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    @%p3 bra SECOND; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8]; bra END; SECOND:"""
    leave = "END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    graph, time = recorded(body + WAIT.format(n=1, at="%r1", parity=0) + leave, threads=32, cluster=2)
    (arrival,) = steps_of(graph, "mbarrier.arrive", cta=0)
    (wait,) = steps_of(graph, "mbarrier.try_wait", cta=1)
    assert time.passed[wait] == time.issued[arrival] + REMOTE + HANDOVER


@pytest.mark.parametrize("other", [4, 1])
def test_warps_of_a_scheduler_share_its_pipes(other):
    """Two warps compute 16 exponentials each, 8 clocks each: warps 0 and 4 in turns, 0 and 1 at once."""
    work = "".join(f"ex2.approx.ftz.f32 %r{10 + n}, %r5;" for n in range(16))
    choose = f"setp.eq.u32 %p3, %r3, 0; setp.eq.u32 %p4, %r3, {other}; or.pred %p3, %p3, %p4; @!%p3 bra END;"
    graph, time = recorded(f"{choose} {work} END:", threads=160)
    begin, end = [], []
    for warp in (0, other):
        (run,) = steps_of(graph, "ex2", warp)
        inside = graph.steps[0, warp]
        begin.append(time.passed[inside[inside.index(run) - 1]])
        end.append(time.issued[run])
    if other == 4:
        assert max(end) - min(begin) == 8 * 31
    else:
        assert [e - b for b, e in zip(begin, end)] == [8 * 15, 8 * 15]
    assert time.busy[0]["MUFU"] == 32 * 8


def test_a_branch_costs_what_it_says_only_when_it_is_taken():
    graph, time = recorded("setp.eq.u32 %p3, %t, 99; @%p3 bra NEAR; NEAR: bra FAR; FAR: nanosleep.u32 0;", threads=32)
    inside = graph.steps[0, 0]
    branches = [s for s in inside if graph.program.nodes[s.pc].instruction.parts[0] == "bra"]
    through, taken = branches
    # Both go on at the next instruction.
    assert time.issued[taken] == time.issued[through] + 1
    body = "setp.eq.u32 %p3, %t, 99; bra FAR; nanosleep.u32 7; FAR: nanosleep.u32 0;"
    graph, time = recorded(body, threads=32)
    (branch,), (sleep,) = steps_of(graph, "bra"), steps_of(graph, "nanosleep")
    assert time.issued[sleep] == time.issued[branch] + BRANCH


def product(k: int = 64):
    """(graph, times) of a 128 x 64 x k matrix product: TMA loads, MMAs, a commit, a wait."""
    text, a, b, shared = tile_product("bf16", 128, 64, k, 128, False, False, sm90=False)
    data = [torch.zeros(rows, k, dtype=torch.bfloat16) for rows in (128, 64)]
    maps = [TensorMap(t.data_ptr(), (k, len(t)), (2 * k,), o.box, 128, "bf16") for t, o in zip(data, (a, b))]
    out = np.zeros((128, 64), np.float32)
    with recording() as graphs:
        launch(text, 1, 128, [*maps, out], memory=data, dynamic_shared=shared)
    (graph,) = graphs
    assert not graph.missing()
    return graph, timed(graph)


def started(graph, kind: str):
    return [op for steps in graph.steps.values() for step in steps for op in step.starts if op.kind == kind]


def test_tma_copies_share_a_path_and_complete_the_phase_they_report_to():
    graph, time = product()
    loads = started(graph, "TMA load")
    assert [load.size for load in loads] == [128 * 128, 64 * 128]
    issued = time.issued[steps_of(graph, "cp.async.bulk.tensor")[0]]
    first, second = (time.ended[load] for load in loads)
    assert first == issued + 128 * 128 / L2_BYTES + L2_LATENCY
    assert second == first + 64 * 128 / L2_BYTES
    (phase,) = {phase for load in loads for phase in load.arrives}
    waits = [s for s in steps_of(graph, "mbarrier.try_wait") if s.waits == [phase]]
    assert len(waits) == 4
    assert {time.passed[wait] for wait in waits} == {second + HANDOVER}


def test_mmas_run_in_order_and_a_commit_reports_their_end():
    graph, time = product(k=256)
    mmas, (commit,) = started(graph, "MMA"), started(graph, "commit")
    clocks = 2 * 128 * 64 * 16 / MMA_FLOP
    assert len(mmas) == 16
    assert {(each.accumulator, each.operand, each.size / MMA_FLOP) for each in mmas} == {(0, None, clocks)}
    for before, after in zip(mmas, mmas[1:]):
        assert time.begun[after] >= time.ended[before]
    assert all(time.ended[each] == time.begun[each] + clocks for each in mmas)
    assert time.phases[commit.arrives[0]] == time.ended[commit] == time.ended[mmas[-1]]
    assert time.busy[0]["MMA"] == 16 * clocks


def test_a_graph_that_lacks_an_arrival_is_refused():
    graph, _ = product()
    (commit,) = started(graph, "commit")
    phase = commit.arrives.pop()
    assert graph.missing() == [phase]
    with pytest.raises(ValueError, match="4 warps wait for what never happens"):
        timed(graph)


def line(*ops: str) -> list[Instruction]:
    """SASS; "BRA+2" jumps over one instruction."""
    found = []
    for op in ops:
        name, _, target = op.partition("+")
        found.append(Instruction(f"{name} R1, R2", name, "", int(target or 0)))
    return found


def test_a_loops_way_is_told_by_what_it_synchronises_on():
    loop = line("IADD3", "SYNCS.PHASECHK", "BRA+3", "LDTM.x32", "STTM.x32", "MUFU.EX2", "SYNCS.ARRIVE", "BRA")
    assert [_signature(op) for op in ("mbarrier.try_wait.parity.b64", "tcgen05.st.sync", "mul.f32")] == [
        "SYNCS.PHASECHK", "STTM", ""]  # fmt: skip
    whole = way_round(loop, ["SYNCS.PHASECHK", "LDTM", "STTM", "SYNCS.ARRIVE"])
    assert [[cost.op for cost in span] for span in whole or ()] == [
        ["bra taken", "IADD3", "SYNCS.PHASECHK"], ["BRA", "LDTM.x32"], ["STTM.x32"],
        ["MUFU.EX2", "SYNCS.ARRIVE"]]  # fmt: skip
    short = way_round(loop, ["SYNCS.PHASECHK", "SYNCS.ARRIVE"])
    assert [[cost.op for cost in span] for span in short or ()] == [
        ["bra taken", "IADD3", "SYNCS.PHASECHK"], ["bra taken", "MUFU.EX2", "SYNCS.ARRIVE"]]  # fmt: skip
    assert way_round(loop, ["SYNCS.PHASECHK", "STTM", "SYNCS.ARRIVE"]) is None


def complete(graph, visits: int) -> None:
    """Every wait has its completion, there is no cycle, and the chains are those of the problem."""
    assert not graph.missing()
    for turns in (True, False):
        time = timed(graph, turns=turns)
        chains = [tile for each in tiles(graph, time).values() for tile in each]
        assert len(chains) == visits
        for tile in chains:
            assert tile.s < tile.first_p < tile.last_p < tile.end
            assert tile.first_p < tile.begin < tile.end
        found = report(graph, time)
        # No faster than its units, and the path fills the time it is taken from.
        assert found["period"] >= max(time.busy[0]["MMA"], time.busy[0]["MUFU"] / 4) / (visits / 2)
        assert sum(found["path"].values()) == pytest.approx(1, abs=0.01)
        assert sum(time.path(0).values()) == pytest.approx(time.ends[0])


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs the package nvidia-cutlass-dsl")
@pytest.mark.parametrize(("head_dim", "causal", "visits"), [(64, False, 16), (128, True, 15)])
def test_our_forwards_graph_is_complete(head_dim, causal, visits):
    """256 rows on 1024 keys; under causal, the upper Q tile does not visit the last key tile."""
    from fa4_core.problem import Inputs, make_problem
    from tests.emulator.cute_backend import forward
    from tests.emulator.published import Problem

    problem = Problem(0, head_dim, 256, 1024, causal=causal)
    inputs = Inputs(problem.q, problem.k, problem.v)
    with recording() as graphs:
        out, _, _ = forward(make_problem(inputs, window_right=0 if causal else -1), inputs, "sm_100a", programs=1)
    assert (out.double() - problem.answer()["out"]).abs().max() < 0.02
    complete(graphs[0], visits)


@pytest.mark.upstream
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
@pytest.mark.parametrize("pair", [False, True])
def test_the_published_forwards_graph_is_complete(pair):
    from tests.emulator.published import Problem, forward

    with recording() as graphs:
        run = forward(Problem(0, 128, 512 if pair else 256, 1024), sm100=True, pair=pair)
    assert run.errors["out"] < 3.5e-3
    complete(graphs[0], 16)
