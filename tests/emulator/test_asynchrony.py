"""Copies end in any order, drawn from the seed: a kernel that is right only when they end in turn, and its twin."""

from dataclasses import replace

import numpy as np
import pytest

from .errors import EmulatorError
from .kernels import kernel
from .launcher import launch
from .machine import Schedule

SEEDS = range(8)
SLOTS, TILES, WARPS = 9, 36, 2
WAIT = "W{name}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1+{at}], {parity}; @!%p2 bra W{name};"


def ring(*, waits_for_release: bool) -> str:
    """Warps 0 and 1 take 128-byte tiles in turn from a ring of nine slots, which warp 2 fills by bulk copies.

    The tile in the same slot a lap before is the other warp's, so a warp may come while that one has not landed, and a
    parity tells a lap only from the one before. waits_for_release: until the other warp has let go of the slot.
    """
    full, empty, data = 0, 8 * SLOTS, 1024
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"

    def wait(name: str, barriers: int, n: int, lap: int) -> str:
        return WAIT.format(name=name, at=barriers + n % SLOTS * 8, parity=lap % 2)

    lines = ["""mov.b32 %r1, smem; shr.u32 %r2, %t, 5; and.b32 %r3, %t, 31; shl.b32 %r4, %r3, 2; add.s32 %r4, %r4, %r1;
    setp.eq.u32 %p1, %r3, 0; setp.eq.u32 %p3, %t, 0; ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1];
    mad.wide.u32 %d2, %r3, 4, %d2;"""]  # fmt: skip
    lines += [f"@%p3 mbarrier.init.shared::cta.b64 [%r1+{8 * n}], 1;" for n in range(2 * SLOTS)]
    lines += ["fence.mbarrier_init.release.cluster; bar.sync 0;"]
    lines += [f"setp.eq.u32 %p4, %r2, {w}; @%p4 bra WARP{w};" for w in range(WARPS)]
    for n in range(TILES):
        slot, lap = n % SLOTS, n // SLOTS
        lines += [wait(f"LOAD{n}", empty, n, lap + 1),
            f"""@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+{full + 8 * slot}], 128;
            add.s32 %r5, %r1, {data + 128 * slot}; add.s32 %r6, %r1, {full + 8 * slot}; add.s64 %d3, %d1, {128 * n};
            @%p1 {copy} [%r5], [%d3], 128, [%r6];"""]  # fmt: skip
    for w in range(WARPS):
        lines += [f"bra DONE; WARP{w}:"]
        for n in range(w, TILES, WARPS):
            slot, lap = n % SLOTS, n // SLOTS
            lines += [wait(f"RELEASED{n}", empty, n, lap + 1)] if waits_for_release else []
            lines += [wait(f"TILE{n}", full, n, lap),
                f"""ld.shared.b32 %r7, [%r4+{data + 128 * slot}]; st.global.b32 [%d2+{128 * n}], %r7;
                bar.warp.sync -1; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r1+{empty + 8 * slot}];"""]  # fmt: skip
    return kernel(2, "\n".join([*lines, "DONE:"]), threads=32 * (WARPS + 1))


def run(text: str, seed: int, **options):
    """(result, whether the tiles came out right)."""
    tiles = np.arange(32 * TILES, dtype=np.uint32)
    out = np.zeros_like(tiles)
    result = launch(text, 1, 32 * (WARPS + 1), [tiles, out], dynamic_shared=4096, seed=seed, **options)
    return result, np.array_equal(out, tiles)


def test_a_wait_two_laps_ahead_is_right_only_when_copies_end_in_turn():
    """Seen on an H100: a launch failure, where the emulator's tests had been right."""
    reported = set()
    for seed in SEEDS:
        assert run(ring(waits_for_release=True), seed)[1]
        # A copy that ends as soon as it is issued ends in turn.
        in_turn = replace(Schedule.from_seed(seed), asynchrony="eager", quantum=1, late=0.0)
        assert run(ring(waits_for_release=False), seed, schedule=in_turn)[1]
        try:
            run(ring(waits_for_release=False), seed)
        except EmulatorError:
            reported.add(seed)
    # By the seed that tests take by default, and by more than see it when no copy is put off: four of the eight.
    assert 0 in reported
    assert len(reported) >= 6, reported


def test_a_seed_draws_one_order_and_seeds_draw_several():
    def order(seed: int) -> tuple[int, int]:
        result, _ = run(ring(waits_for_release=True), seed)
        return result.steps, result.async_steps

    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS]
    assert len(set(orders)) == len(SEEDS)


@pytest.mark.parametrize("asynchrony", ["eager", "random"])
def test_what_is_put_off_ends_though_a_warp_spins(asynchrony):
    """`test_wait` never suspends its warp, and the arrival cannot move before the copies that it follows."""
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """mov.b32 %r1, smem; shl.b32 %r2, %t, 2; add.s32 %r2, %r2, %r1; setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 32; bar.sync 0; ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1;
    cp.async.ca.shared.global [%r2+16], [%d1], 4; cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];
    SPIN: mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra SPIN;
    ld.shared.b32 %r3, [%r2+16]; ld.param.b64 %d2, [p1]; mad.wide.u32 %d2, %t, 4, %d2; st.global.b32 [%d2], %r3;"""
    for seed in SEEDS:
        schedule = replace(Schedule.from_seed(seed), asynchrony=asynchrony, late=0.5)
        launch(kernel(2, body), 1, 32, [data, out], dynamic_shared=256, schedule=schedule, max_steps=20_000)
    np.testing.assert_array_equal(out, data)
