"""The verdicts: for each, a kernel that deserves it and its repaired twin that does not."""

import numpy as np
import pytest
import torch

from .errors import (
    BarrierMisuse,
    Deadlock,
    EmulatorError,
    Livelock,
    OutOfBounds,
    PtxSyntaxError,
    RaceError,
    TensorMemoryError,  # fmt: skip
    Unsupported,
)
from .kernels import kernel
from .launcher import launch, load_program
from .tensor_map import TensorMap

SEEDS = range(6)


def run(body, args=(), threads=64, seed=0, registers="", **options):
    return launch(
        kernel(len(args), body, registers, threads), 1, threads, args, dynamic_shared=4096, seed=seed, **options
    )


EXCHANGE = """mov.b32 %r1, smem; shl.b32 %r2, %t, 2; add.s32 %r2, %r2, %r1; st.shared.b32 [%r2], %t;
{sync}
xor.b32 %r3, %t, 32; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r1; ld.shared.b32 %r4, [%r3];
ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; st.global.b32 [%d1], %r4;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exchange_without_a_barrier_is_a_race_on_every_schedule(seed):
    """Also where the warps run in step and the values come out right."""
    out = np.zeros(64, np.uint32)
    with pytest.raises(RaceError, match=r"read-after-write race|uninitialised read"):
        run(EXCHANGE.format(sync=""), [out], seed=seed)
    run(EXCHANGE.format(sync="bar.sync 0;"), [out], seed=seed)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_overwriting_what_another_warp_still_reads_is_a_race(seed):
    again = EXCHANGE.format(sync="bar.sync 0;") + "{sync} st.shared.b32 [%r2], 0;"
    out = np.zeros(64, np.uint32)
    with pytest.raises(RaceError, match="write-after-read race"):
        run(again.format(sync=""), [out], seed=seed)
    run(again.format(sync="bar.sync 0;"), [out], seed=seed)


def test_two_warps_writing_one_word_race_unless_they_write_one_value():
    body = "mov.b32 %r1, smem; shr.u32 %r2, %t, {shift}; st.shared.b32 [%r1], %r2;"
    with pytest.raises(RaceError, match="write-after-write race"):
        run(body.format(shift=5), seed=5)  # seed 5 runs every warp on its own
    run(body.format(shift=30), seed=5)


def test_reading_shared_memory_that_nobody_wrote_is_reported():
    with pytest.raises(RaceError, match="uninitialised read"):
        run("mov.b32 %r1, smem; ld.shared.b32 %r2, [%r1];")


def test_deadlock_names_warp_barrier_phase_and_counts():
    body = """mov.b32 %r1, smem; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 2; bar.sync 0;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra WAIT;"""
    for seed in SEEDS:
        with pytest.raises(
            Deadlock, match=r"warps? 0.*parity 0 of mbarrier 0x400 of CTA 0: phase 0, pending 1 of 2, tx 0"
        ):
            run(body, seed=seed)
    run(body.replace("], 2;", "], 1;"))


def test_deadlock_on_a_named_barrier_counts_threads():
    body = "setp.lt.u32 %p1, %t, 32; @!%p1 bra DONE; barrier.sync 3, 64; DONE:"
    with pytest.raises(Deadlock, match="named barrier 3, phase 0: 32 of 64 threads arrived"):
        run(body)
    run(body.replace("64", "32"))


def test_spinning_on_a_value_that_never_comes_is_a_livelock():
    flag = np.zeros(1, np.uint32)
    body = "ld.param.b64 %d1, [p0]; SPIN: ld.acquire.gpu.global.b32 %r1, [%d1]; setp.eq.u32 %p1, %r1, 0; @%p1 bra SPIN;"
    with pytest.raises(Livelock):
        run(body, [flag], max_steps=200)


@pytest.mark.parametrize(
    ("body", "error", "match"),
    [
        (
            "ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; ld.global.b32 %r1, [%d1];",
            OutOfBounds,
            "line .* outside every",
        ),
        ("ld.param.b64 %d1, [p0]; st.global.b32 [%d1+2], 0;", OutOfBounds, "misaligned"),
        ("mov.b32 %r1, smem; st.shared.b32 [%r1+8192], 0;", OutOfBounds, "shared address"),
        ("mov.b32 %r1, smem; st.shared.v4.b32 [%r1+4], {0, 0, 0, 0};", OutOfBounds, "misaligned"),
        ("mov.b32 %r1, smem; mbarrier.arrive.shared::cta.b64 _, [%r1];", BarrierMisuse, "no mbarrier was initialised"),
        (
            "mov.b32 %r1, smem; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0; "
            "mbarrier.arrive.shared::cta.b64 _, [%r1];",
            BarrierMisuse,
            "64 arrivals|32 arrivals",
        ),
        (
            "mov.b32 %r1, smem; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0; "
            "@%p1 mbarrier.init.shared::cta.b64 [%r1], 4;",
            BarrierMisuse,
            "again while it is live",
        ),
        ("setp.lt.u32 %p1, %t, 32; @%p1 barrier.arrive 1, 64; @%p1 barrier.arrive 1, 96;", BarrierMisuse, "96 threads"),
        ("trap;", EmulatorError, "trap executed"),
    ],
)
def test_misuse_is_an_error_with_its_line(body, error, match):
    with pytest.raises(error, match=match):
        run(body, [np.zeros(63, np.uint32)])


ALLOCATE = (
    "mov.b32 %r1, smem; setp.lt.u32 %p1, %t, 32; "
    "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], {n}; bar.sync 0; ld.shared.b32 %r2, [%r1];"
)
FREE = "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, {n};"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (ALLOCATE.format(n=64), "ended with TMEM allocated"),
        (ALLOCATE.format(n=64) + FREE.format(n=64) + FREE.format(n=64), "dealloc of 64 columns"),
        (ALLOCATE.format(n=64) + FREE.format(n=32), "dealloc of 32 columns"),
        (ALLOCATE.format(n=48), "alloc of 48 columns"),
        (ALLOCATE.format(n=32) + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2+32];", "touches columns 32..32"),
        (
            "setp.lt.u32 %p1, %t, 32; @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
            + ALLOCATE.format(n=32),
            "after relinquish",
        ),
    ],
)
def test_tensor_memory_misuse(body, match):
    with pytest.raises(TensorMemoryError, match=match):
        run(body, registers="", check=False)


def test_allocating_more_tmem_than_there_is_waits_for_ever():
    body = ALLOCATE.format(n=512) + "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;"
    with pytest.raises(Deadlock, match=r"tcgen05\.alloc of 32 columns"):
        run(body)


def test_setmaxnreg_beyond_the_pool_blocks_for_ever():
    """Two warps of 128 registers: both may not grow, one may if the other shrinks."""
    body = (
        "setp.lt.u32 %p1, %t, 32; @%p1 bra A; setmaxnreg.{other}.sync.aligned.u32 {n}; "
        "bra B; A: setmaxnreg.inc.sync.aligned.u32 160; B:"
    )
    with pytest.raises(Deadlock, match="pool of 8192 registers exceeded"):
        run(body.format(other="inc", n=136), register_budget=128)
    run(body.format(other="dec", n=96), register_budget=128)
    with pytest.raises(EmulatorError, match="wrong direction"):
        run(body.format(other="inc", n=96), register_budget=128)


def test_the_register_pool_is_what_the_block_was_launched_with():
    """Seen on an H100: 384 threads get 168 registers each, so 240 + 240 + 32 do not fit though the register file
    would hold them; 240 + 240 + 24 do."""
    body = """setp.lt.u32 %p1, %t, 128; @%p1 bra PRODUCE; setmaxnreg.inc.sync.aligned.u32 240; bra DONE;
    PRODUCE: setmaxnreg.dec.sync.aligned.u32 {n}; DONE:"""
    for seed in SEEDS:
        with pytest.raises(Deadlock, match="pool of 64512 registers exceeded"):
            run(body.format(n=32), threads=384, seed=seed)
        run(body.format(n=24), threads=384, seed=seed)


def tma(fence: str, tx: int = 1024) -> str:
    return f"""mov.b32 %r1, smem; add.s32 %r2, %r1, 1024; setp.eq.u32 %p1, %t, 0; shl.b32 %r5, %t, 2;
    add.s32 %r5, %r5, %r2;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; {fence} bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {tx};
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%d1], 1024, [%r1];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra WAIT;
    ld.shared.b32 %r6, [%r5];"""


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_load_needs_its_init_fence_its_wait_and_its_bytes(seed):
    data = np.arange(256, dtype=np.uint32)
    start = "ld.param.b64 %d1, [p0];"
    run(start + tma("fence.mbarrier_init.release.cluster;"), [data], seed=seed)
    with pytest.raises(RaceError, match="missing mbarrier init fence"):
        run(start + tma(""), [data], seed=seed)
    with pytest.raises(Deadlock, match="tx 16"):
        run(start + tma("fence.mbarrier_init.release.cluster;", 1040), [data], seed=seed)
    unwaited = tma("fence.mbarrier_init.release.cluster;").replace(
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra WAIT;", ""
    )
    with pytest.raises(RaceError, match="read-after-write race"):
        run(start + unwaited, [data], seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tma_store_of_generic_writes_needs_a_proxy_fence(seed):
    out = torch.zeros(64, dtype=torch.int32)
    tmap = TensorMap(out.data_ptr(), (64,), (), (64,), 0, "s32")
    body = """mov.b32 %r1, smem; shl.b32 %r2, %t, 2; add.s32 %r2, %r2, %r1; st.shared.b32 [%r2], %t; {fence} bar.sync 0;
    setp.eq.u32 %p1, %t, 0; @!%p1 bra DONE; mov.b64 %d1, p0;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%d1, {{0}}], [%r1]; cp.async.bulk.commit_group;
    {wait} DONE:"""

    def go(fence, wait="cp.async.bulk.wait_group 0;", first=0):
        text = body.replace("{{0}}", f"{{{{{first}}}}}").format(fence=fence, wait=wait)
        text = kernel(0, text, "", 64).replace(".entry k(\n\n)", ".entry k(\n.param .align 64 .b8 p0[128])")
        return launch(text, 1, 64, [tmap], memory=[out], dynamic_shared=4096, seed=seed)

    go("fence.proxy.async.shared::cta;")
    assert out.tolist() == list(range(64))
    with pytest.raises(RaceError, match="missing proxy fence"):
        go("")
    assert any("did not wait for" in note for note in go("fence.proxy.async.shared::cta;", wait="").notes)
    go("fence.proxy.async.shared::cta;", first=-4)
    assert out.tolist() == [*range(4, 64), *range(60, 64)]
    with pytest.raises(OutOfBounds, match="innermost coordinate 6 of s32 is not a multiple of 16 bytes"):
        go("fence.proxy.async.shared::cta;", first=6)


def test_cp_async_is_visible_only_after_its_wait():
    data = np.arange(128, dtype=np.uint32)
    body = """mov.b32 %r1, smem; ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 16, %d1; shl.b32 %r2, %t, 4;
    add.s32 %r2, %r2, %r1;
    cp.async.cg.shared.global [%r2], [%d1], 16; cp.async.commit_group; {wait}
    ld.shared.v4.b32 {{%r4,%r5,%r6,%r7}}, [%r2];"""
    for seed in SEEDS:
        run(body.format(wait="cp.async.wait_group 0;"), [data], threads=32, seed=seed)
        with pytest.raises(RaceError, match="read-after-write race"):
            run(body.format(wait="cp.async.wait_group 1;"), [data], threads=32, seed=seed)


REUSE = """mov.b32 %r1, smem; add.s32 %r2, %r1, 64; add.s32 %r3, %r1, 128; ld.param.b64 %d1, [p0];
setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], {count}; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
fence.mbarrier_init.release.cluster; bar.sync 0; {used} @%p1 {inval} fence.proxy.async.shared::cta; bar.sync 0;
@%p1 {write}"""
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [%d1], 16, [%r2];"
WRITES = {
    "st.shared.b32 [{to}+4], 0;": "st writes",
    "atom.shared.add.u32 %r4, [{to}], 1;": "atom writes",
    "cp.async.ca.shared.global [{to}], [%d1], 8; cp.async.wait_all;": "cp.async writes",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16; @%p1 " + BULK: "bulk load writes",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("write", WRITES)
def test_the_memory_of_an_mbarrier_is_free_only_when_it_is_invalidated(write, seed):
    """PTX ISA 9.7.13.15. Seen on an H100: barriers that a compiler left live below a tile of K gave NaN."""
    inval = "mbarrier.inval.shared::cta.b64 [%r1];"
    data = np.zeros(4, np.uint32)

    def go(to: str, inval: str) -> None:
        run(REUSE.format(count=2, used="", inval=inval, write=write.format(to=to)), [data], seed=seed)

    with pytest.raises(RaceError, match=f"live mbarrier overwritten: .*{WRITES[write]} .* byte 0x40[04]"):
        go("%r1", "nanosleep.u32 0;")
    go("%r1", inval)
    go("%r3", "nanosleep.u32 0;")


@pytest.mark.parametrize(
    ("count", "used", "error"),
    [
        (1, "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];", BarrierMisuse),
        (2, "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];", BarrierMisuse),
        (2, "", BarrierMisuse),
        (1, "", RaceError),
    ],
)
def test_an_mbarrier_is_initialised_again_only_when_it_is_invalidated(count, used, error):
    """PTX ISA 9.7.13.15: also one that nothing has used, by the same count; that alone is a kind to tolerate."""
    again = "mbarrier.init.shared::cta.b64 [%r1], 1;"
    for seed in SEEDS:
        body = {"count": count, "used": used, "write": again}
        with pytest.raises(error, match="mbarrier 0x400 of CTA 0 is initialised again while it is live"):
            run(REUSE.format(**body, inval="nanosleep.u32 0;"), [np.zeros(4, np.uint32)], seed=seed)
        inval = "mbarrier.inval.shared::cta.b64 [%r1];"
        run(REUSE.format(**body, inval=inval), [np.zeros(4, np.uint32)], seed=seed)


def test_what_follows_an_inval_is_ordered_behind_it():
    body = REUSE.format(count=1, used="", inval="mbarrier.inval.shared::cta.b64 [%r1];", write="nanosleep.u32 0;")
    store = "setp.eq.u32 %p2, %t, 32; @%p2 st.shared.b32 [%r1], 7;"
    run(body + store, [np.zeros(4, np.uint32)])
    with pytest.raises(RaceError, match=r"write-after-write race|live mbarrier overwritten"):
        run(body.replace("bar.sync 0;\n@%p1 nano", "@%p1 nano") + store, [np.zeros(4, np.uint32)])


def test_coverage_lists_what_never_ran():
    result = run("setp.gt.u32 %p1, %t, 999; @!%p1 bra DONE; mov.b32 %r1, smem; st.shared.b32 [%r1], 0; DONE:")
    assert [line.split(": ")[1] for line in result.not_executed()] == ["st.shared.b32 [%r1], 0"]


def test_unsupported_instructions_are_found_before_anything_runs_and_named_with_their_line():
    text = kernel(0, "tcgen05.cp.cta_group::1.128x256b [%r1], %d1;\nadd.cc.u32 %r1, %r2, %r3;")
    problems = load_program(text).unsupported
    first = 1 + next(n for n, line in enumerate(text.splitlines()) if "tcgen05.cp" in line)
    assert [p.split(":")[0] for p in problems] == [f"line {first}", f"line {first + 1}"]
    with pytest.raises(Unsupported, match=f"line {first}"):
        launch(text, 1, 32, [])


def test_text_that_is_not_ptx_is_refused_with_its_line():
    text = kernel(0, "mov.b32 %r1, %nothing;")
    line = 1 + next(n for n, line in enumerate(text.splitlines()) if "%nothing" in line)
    with pytest.raises(PtxSyntaxError, match=f"line {line}: operand '%nothing'"):
        load_program(text)


def test_divergent_lanes_meet_again_at_a_warp_barrier():
    out = np.zeros(32, np.uint32)
    body = """and.b32 %r1, %t, 3; setp.eq.u32 %p1, %r1, 0; mov.b32 %r2, 1; @%p1 bra EVEN; mov.b32 %r2, 2; EVEN:
    LOOP: add.s32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 6; add.s32 %r2, %r2, 1; @%p2 bra LOOP;
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1;
    st.global.b32 [%d1], %r3;"""
    run(body, [out], threads=32)
    start = np.arange(32) % 4
    value = np.where(start == 0, 1, 2) + 6 - start
    np.testing.assert_array_equal(out, value[np.arange(32) ^ 1])


def test_a_warp_collective_that_lanes_never_reach_deadlocks():
    with pytest.raises(Deadlock, match="waits for the other lanes"):
        run("setp.lt.u32 %p1, %t, 8; @%p1 bra SOME; bar.sync 1, 64; SOME: bar.warp.sync -1; @%p1 bra SOME;", threads=32)


SEPARATE_WAYS = """mov.b32 %r9, smem; setp.lt.u32 %p1, %t, 16; and.b32 %r3, %t, 1; setp.eq.u32 %p2, %r3, 0;
mov.b32 %r2, 0; @!%p1 bra UPPER; mov.b32 %r1, {lower}; bra MEET; UPPER: add.s32 %r3, %r3, 1; setp.lt.u32 %p4, %r3, 6;
@%p4 bra UPPER; mov.b32 %r1, {upper}; MEET: {op} ld.param.b64 %d1, [p0];
mad.wide.u32 %d1, %t, 4, %d1; st.global.b32 [%d1], %r2;"""
"""The lower lanes come first to `op`, whose membermask %r1 the upper ones have not written then."""

LANE = np.arange(32)
COLLECTIVES = {
    "redux.sync.add.u32 %r2, %t, %r1;": (np.full(32, 496), np.repeat((120, 376), 16)),
    "redux.sync.max.u32 %r2, %t, %r1;": (np.full(32, 31), np.repeat((15, 31), 16)),
    "vote.sync.ballot.b32 %r2, %p2, %r1;": (np.full(32, 0x55555555), np.repeat((0x5555, 0x55550000), 16)),
    "vote.sync.all.pred %p3, %p1, %r1; selp.b32 %r2, 1, 0, %p3;": (np.zeros(32), LANE < 16),
    "vote.sync.any.pred %p3, %p1, %r1; selp.b32 %r2, 1, 0, %p3;": (np.ones(32), LANE < 16),
    "vote.sync.uni.pred %p3, %p1, %r1; selp.b32 %r2, 1, 0, %p3;": (np.zeros(32), np.ones(32)),
    "elect.sync %r2|%p3, %r1;": (np.zeros(32), LANE & 16),
    "shfl.sync.bfly.b32 %r2, %t, 3, 31, %r1;": (LANE ^ 3, LANE ^ 3),
    "shl.b32 %r4, %t, 2; add.s32 %r4, %r4, %r9; st.shared.b32 [%r4], %t; bar.warp.sync %r1; xor.b32 %r4, %r4, 28;"
    "ld.shared.b32 %r2, [%r4];": (LANE ^ 7, LANE ^ 7),
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", COLLECTIVES)
def test_a_membermask_in_a_register_is_that_of_the_lanes_that_have_come(op, seed):
    """PTX ISA 9.7.9.6, 9.7.13.2-6: a lane waits for those that its own mask names, whole warp or half of one."""
    for (lower, upper), want in zip(((-1, -1), (0xFFFF, 0xFFFF0000)), COLLECTIVES[op]):
        out = np.zeros(32, np.uint32)
        run(SEPARATE_WAYS.format(lower=lower, upper=upper, op=op), [out], threads=32, seed=seed)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (-1, 0xFFFF0000, "different membermasks|waits for the other lanes"),
        (0xFFFF, -1, "different membermasks|waits for the other lanes"),
        (0xFFFF, 0xFFFF, "does not name it"),
        (0xFFFE, 0xFFFF0000, "does not name it"),
    ],
)
def test_membermasks_that_contradict_each_other_are_errors(lower, upper, message, seed):
    """PTX ISA 9.7.13.6: the lanes of a mask execute with the same one, and a lane outside its own is undefined."""
    body = SEPARATE_WAYS.format(lower=lower, upper=upper, op="redux.sync.add.u32 %r2, %t, %r1; bar.warp.sync -1;")
    with pytest.raises(EmulatorError, match=message):
        run(body, [np.zeros(32, np.uint32)], threads=32, seed=seed)


def test_a_membermask_is_checked_where_all_lanes_come_together():
    out = np.zeros(32, np.uint32)
    body = "setp.lt.u32 %p1, %t, 16; selp.b32 %r1, {}, {}, %p1; redux.sync.add.u32 %r2, %t, %r1;"
    body += "ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; st.global.b32 [%d1], %r2;"
    run(body.format(0xFFFF, 0xFFFF0000), [out], threads=32)
    np.testing.assert_array_equal(out, np.repeat((120, 376), 16))
    with pytest.raises(EmulatorError, match="different membermasks"):
        run(body.format(-1, 0xFFFF0000), [out], threads=32)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_with_one_membermask_do_not_wait_for_those_with_another(seed):
    """Of the upper lanes 24 to 31 come to the instruction only after lane 0 has passed it."""
    body = """mov.b32 %r9, smem; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [%r9], 0; bar.warp.sync -1;
    setp.lt.u32 %p2, %t, 16; selp.b32 %r1, {lower}, {upper}, %p2; setp.lt.u32 %p3, %t, 24; @%p3 bra MEET;
    SPIN: ld.shared.b32 %r3, [%r9]; setp.eq.u32 %p4, %r3, 0; @%p4 bra SPIN; MEET: {guard} bar.warp.sync %r1;
    @%p1 st.shared.b32 [%r9], 1;"""
    for guard in ("", "@!%p2"):
        run(body.format(lower=0xFFFF, upper=0xFFFF0000, guard=guard), threads=32, seed=seed)
    with pytest.raises(Livelock):
        run(body.format(lower=-1, upper=-1, guard=""), threads=32, seed=seed, max_steps=2000)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_warp_collective_does_not_wait_for_lanes_that_exit(seed):
    """PTX ISA 9.7.13.6: for all non-exited lanes of the mask; here the others exit while these already wait."""
    out = np.zeros(32, np.uint32)
    body = """setp.lt.u32 %p1, %t, 8; @!%p1 bra DONE; mov.b32 %r1, -1; redux.sync.add.u32 %r2, %t, %r1;
    ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; st.global.b32 [%d1], %r2; ret; DONE: mov.b32 %r1, 0;"""
    run(body, [out], threads=32, seed=seed)
    np.testing.assert_array_equal(out, np.where(LANE < 8, 28, 0))


def test_warp_collectives_against_numpy():
    """PTX ISA 9.7.9.6 (shfl), 9.7.13.2-6 (vote, redux, elect)."""
    values = np.random.default_rng(0).integers(0, 1000, 64).astype(np.uint32)
    body = """ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; ld.global.b32 %r1, [%d1]; setp.gt.u32 %p1, %r1, 500;
    {op}
    ld.param.b64 %d2, [p1]; mad.wide.u32 %d2, %t, 4, %d2; st.global.b32 [%d2], %r2;"""
    warps = values.reshape(2, 32)
    lane = np.arange(32)
    cases = {
        "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;": warps[:, lane ^ 5],
        "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;": np.repeat(warps[:, 3:4], 32, 1),
        "shfl.sync.up.b32 %r2, %r1, 2, 0, -1;": warps[:, np.where(lane < 2, lane, lane - 2)],
        "shfl.sync.down.b32 %r2, %r1, 2, 31, -1;": warps[:, np.where(lane > 29, lane, lane + 2)],
        "shfl.sync.bfly.b32 %r2, %r1, 1, 0x1c1f, -1;": warps[:, lane ^ 1],
        "vote.sync.ballot.b32 %r2, %p1, -1;": np.repeat(((warps > 500) << lane).sum(1), 32),
        "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;": np.repeat((warps > 500).any(1), 32),
        "vote.sync.all.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;": np.repeat((warps > 500).all(1), 32),
        "redux.sync.add.s32 %r2, %r1, -1;": np.repeat(warps.sum(1), 32),
        "redux.sync.max.u32 %r2, %r1, -1;": np.repeat(warps.max(1), 32),
        "elect.sync %r3|%p2, -1; selp.b32 %r2, 1, 0, %p2;": np.tile(lane == 0, 2),
        "and.b32 %r3, %t, 28; setp.ne.u32 %p3, %r3, 0; mov.b32 %r2, 9; @%p3 elect.sync %r2|%p2, 0xfffffff0;": np.tile(
            np.where(lane < 4, 9, 4), 2
        ),
    }
    for op, want in cases.items():
        out = np.zeros(64, np.uint32)
        run(body.format(op=op), [values, out])
        np.testing.assert_array_equal(out, want.reshape(-1), err_msg=op)
