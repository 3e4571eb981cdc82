"""Registers of asynchronous instructions: each rule on a kernel that breaks it and on its repaired twin, on every
schedule, whatever the values come to.
"""

from __future__ import annotations

import numpy as np
import pytest

from .errors import EmulatorError, RaceError
from .hazards import EARLY_LOAD, EARLY_MMA, UNFENCED
from .kernels import kernel
from .launcher import launch
from .test_tensor_cores import RegisterProduct

seeds = pytest.mark.parametrize("seed", range(6))

TOUCH_ACCUMULATOR = "add.f32 %c0, %c0, 0f00000000;"
TOUCH_FRAGMENT = "mov.b32 %a1, 0;"
READ_FRAGMENT = "xor.b32 %r9, %a1, 1;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


@seeds
def test_wgmma_registers_belong_to_it_until_wait_group(seed):
    """PTX ISA 9.7.15.5.2: accumulators may not be touched before the wait, A fragments not be changed."""
    for text in (TOUCH_ACCUMULATOR, TOUCH_FRAGMENT):
        with pytest.raises(RaceError, match=EARLY_MMA):
            RegisterProduct("bf16", 64, "f32").run(seed, between=text)
        RegisterProduct("bf16", 64, "f32").run(seed, between=WAIT + text)
    RegisterProduct("bf16", 64, "f32").run(seed, between=READ_FRAGMENT)
    with pytest.raises(RaceError, match=EARLY_MMA):
        RegisterProduct("bf16", 64, "f32").run(seed, wait="")


@seeds
def test_wgmma_needs_a_fence_after_ordinary_uses_of_its_registers(seed):
    """PTX ISA 9.7.15.7.1 (wgmma.fence)."""
    fence = "wgmma.fence.sync.aligned;"
    with pytest.raises(RaceError, match=UNFENCED):
        RegisterProduct("f16", 8, "f32").run(seed, fence="")
    for register in ("%c0", "%a2"):
        late = f"xor.b32 {register}, {register}, 0;"
        with pytest.raises(RaceError, match=UNFENCED):
            RegisterProduct("f16", 8, "f32").run(seed, fence=fence + late)
        RegisterProduct("f16", 8, "f32").run(seed, fence=late + fence)


def test_a_move_behind_the_fence_only_renames():
    """Compilers place copies there; content computed before the fence stays fenced, computed behind it does not."""
    fence = "wgmma.fence.sync.aligned;"
    copies = "mov.b32 %r8, %a2; {} mov.b32 %a2, %r8;"
    RegisterProduct("f16", 8, "f32").run(fence=fence + copies.format(""))
    RegisterProduct("f16", 8, "f32").run(fence=copies.format("xor.b32 %r8, %r8, 0;" + fence))
    with pytest.raises(RaceError, match=UNFENCED):
        RegisterProduct("f16", 8, "f32").run(fence=fence + copies.format("xor.b32 %r8, %r8, 0;"))


@seeds
def test_wgmma_that_one_warp_goes_around_is_an_error(seed):
    """PTX ISA 9.7.15: all four warps of a warpgroup execute it. In this machine the other three would just go on."""
    around = "setp.ge.u32 %p5, %t, {}; @%p5 bra AROUND; wgmma.fence.sync.aligned;"
    product, wait = RegisterProduct("f16", 8, "f32"), WAIT + " AROUND:"
    product.run(seed, fence=around.format(128), wait=wait)
    with pytest.raises(EmulatorError, match=r"executed \[1, 1, 1, 0\] wgmma"):
        product.run(seed, fence=around.format(96), wait=wait)


LOAD = """mov.b32 %r1, smem; setp.lt.u32 %p1, %t, 32;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32; bar.sync 0; ld.shared.b32 %r2, [%r1];
and.b32 %r3, %t, 96; shl.b32 %r3, %r3, 16; add.s32 %r3, %r3, %r2;
tcgen05.st.sync.aligned.32x32b.x2.b32 [%r3], {{%t, %t}}; tcgen05.wait::st.sync.aligned; bar.sync 0;
tcgen05.ld.sync.aligned.32x32b.x2.b32 {{%r4, %r5}}, [%r3]; {behind}
bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;"""
WAIT_LOAD = "tcgen05.wait::ld.sync.aligned;"
STORE = "ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, 4, %d1; st.global.b32 [%d1], %r6;"


def run_load(behind: str, seed: int, **options):
    out = np.zeros(128, np.uint32)
    result = launch(kernel(1, LOAD.format(behind=behind), threads=128), 1, 128, [out], dynamic_shared=1024, seed=seed,
                    **options)  # fmt: skip
    np.testing.assert_array_equal(out, np.arange(128) + 1)
    return result


@seeds
def test_using_loaded_registers_before_the_wait_is_a_note_or_an_error(seed):
    """PTX ISA 9.7.16.8.1 asks for wait::ld; kernels known to be good rely on the assembler instead. Moves rename."""
    use = "add.s32 %r6, %r4, 1;"
    assert not run_load(WAIT_LOAD + use + STORE, seed, tolerate=()).notes
    assert any(EARLY_LOAD in note for note in run_load(use + STORE, seed).notes)
    with pytest.raises(RaceError, match=EARLY_LOAD):
        run_load(use + STORE, seed, tolerate=())
    renamed = "mov.b64 %d3, {%r4, %r5}; {} mov.b64 {%r7, %r8}, %d3; add.s32 %r6, %r7, 1;"
    run_load(renamed.replace("{}", WAIT_LOAD) + STORE, seed, tolerate=())
    with pytest.raises(RaceError, match=EARLY_LOAD):
        run_load(renamed.replace("{}", "") + STORE, seed, tolerate=())


SHARE = """mov.b32 %r1, smem; setp.lt.u32 %p1, %t, 32; setp.ge.u32 %p2, %t, 128;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32; bar.sync 0; ld.shared.b32 %r2, [%r1];
and.b32 %r3, %t, 96; shl.b32 %r3, %r3, 16; add.s32 %r3, %r3, %r2; @%p2 bra SECOND;
tcgen05.st.sync.aligned.32x32b.x2.b32 [%r3], {%t, %t}; tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r4, %r5}, [%r3]; ENDS bar.sync 1, 256; bra BOTH;
SECOND: bar.sync 1, 256; tcgen05.st.sync.aligned.32x32b.x2.b32 [%r3], {0, 0}; tcgen05.wait::st.sync.aligned;
BOTH: bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;"""


@seeds
@pytest.mark.parametrize("ends", [WAIT_LOAD, "add.s32 %r6, %r5, 1;"])
def test_a_load_must_end_before_the_barrier_that_lets_others_overwrite(seed, ends):
    """By the wait, or by an instruction that needs the registers. Warps 4 to 7 reach the lanes of warps 0 to 3."""

    def go(ends):
        return launch(kernel(0, SHARE.replace("ENDS", ends), threads=256), 1, 256, [], dynamic_shared=1024, seed=seed)

    go(ends)
    with pytest.raises(RaceError, match=r"write-after-read race.*tcgen05\.st"):
        go("")
