"""Clusters: distributed shared memory, copies between CTAs, multicast, cluster launch control; and reductions into
global memory. Against numpy, on every schedule, with the race each one guards against.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .errors import Deadlock, EmulatorError, RaceError, TensorMemoryError
from .kernels import kernel
from .launcher import launch
from .tensor_map import TensorMap

seeds = pytest.mark.parametrize("seed", range(6))

MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
WAIT = "WAIT{n}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{at}], {parity}; @!%p2 bra WAIT{n};"
"""A wait of every thread on the mbarrier at register {at}."""

START = """mov.b32 %r1, smem; shl.b32 %r2, %t, 2; add.s32 %r2, %r2, %r1; mov.u32 %r3, %cluster_ctarank;
mov.u32 %r4, %ctaid.x; shl.b32 %r5, %r4, 6; add.s32 %r5, %r5, %t; setp.eq.u32 %p1, %t, 0;
xor.b32 %r6, %r3, 1; mapa.shared::cluster.u32 %r7, %r2, %r6;
"""
"""%r2: this thread's word of shared memory; %r3, %r4: rank and CTA; %r5: index of the thread in the grid; %r7: the word
in the other CTA of a pair."""

BARRIER = "@%p1 mbarrier.init.shared::cta.b64 [%r1], {count}; fence.mbarrier_init.release.cluster;" + MEET
"""An mbarrier at the start of shared memory, visible to the whole cluster."""

STORE = "ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %r5, 4, %d1; st.global.b32 [%d1], %r9;"


def run(body: str, args, grid: int = 2, cluster: int = 2, seed: int = 0, **options):
    text = kernel(len(args), START + body, threads=64)
    return launch(text, grid, 64, args, cluster=(cluster, 1, 1), dynamic_shared=4096, seed=seed, **options)


def words(grid: int = 2) -> np.ndarray:
    return np.zeros(64 * grid, np.uint32)


@seeds
def test_a_cta_reads_and_writes_the_shared_memory_of_another(seed):
    """PTX ISA 9.7.9.24 (mapa), 5.1.6 (shared::cluster), 9.7.13.3 (barrier.cluster)."""
    read = "st.shared.b32 [%r2], %r5; {meet} ld.shared::cluster.b32 %r9, [%r7]; {leave}" + STORE
    write = "st.shared::cluster.b32 [%r7], %r5; {meet} ld.shared.b32 %r9, [%r2];" + STORE
    for body in (read, write):
        out = words(4)
        run(body.format(meet=MEET, leave=MEET), [out], grid=4, seed=seed)
        np.testing.assert_array_equal(out, np.arange(256) ^ 64)
        with pytest.raises(RaceError, match=r"read-after-write race|uninitialised read"):
            run(body.format(meet="", leave=MEET), [out], grid=4, seed=seed)


@seeds
def test_a_remote_arrival_releases_what_was_written_before_it(seed):
    """PTX ISA 9.7.13.15.13: mbarrier.arrive on the other CTA's barrier."""
    body = BARRIER.format(count=64) + (
        "st.shared::cluster.b32 [%r7+64], %r5; {arrive}" + WAIT.format(n=1, at="%r1", parity=0) + ""
        "ld.shared.b32 %r9, [%r2+64];" + STORE + MEET
    )
    arrive = "mapa.shared::cluster.u32 %r8, %r1, {}; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];"
    out = words()
    run(body.replace("{arrive}", arrive.format("%r6")), [out], seed=seed)
    np.testing.assert_array_equal(out, np.arange(128) ^ 64)
    with pytest.raises(RaceError, match=r"read-after-write race|uninitialised read"):
        run(body.replace("{arrive}", arrive.format("%r3")), [out], seed=seed)


@seeds
def test_st_async_and_bulk_copies_between_ctas_complete_on_the_receivers_barrier(seed):
    """PTX ISA 9.7.9.13 (st.async), 9.7.9.25.4.1 (cp.async.bulk to shared::cluster)."""
    expect = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {bytes};"
    single = (
        "mapa.shared::cluster.u32 %r8, %r1, %r6; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r7+1024], %r5, [%r8];"
    )
    bulk = """st.shared.b32 [%r2+2048], %r5; {fence} bar.sync 0; @!%p1 bra SENT; mapa.shared::cluster.u32 %r8, %r1, %r6;
    add.s32 %r10, %r1, 2048; add.s32 %r11, %r1, 1024; mapa.shared::cluster.u32 %r11, %r11, %r6;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r11], [%r10], 256, [%r8]; SENT:"""
    end = "{wait} ld.shared.b32 %r9, [%r2+1024];" + STORE + MEET
    wait = WAIT.format(n=1, at="%r1", parity=0)
    fenced = bulk.replace("{fence}", "fence.proxy.async.shared::cta;")
    for send in (single, fenced):
        body = BARRIER.format(count=1) + expect.format(bytes=256) + send + end
        out = words()
        run(body.format(wait=wait), [out], seed=seed)
        np.testing.assert_array_equal(out, np.arange(128) ^ 64)
        with pytest.raises(RaceError, match=r"read-after-write race|uninitialised read"):
            run(body.format(wait=""), [out], seed=seed)
        with pytest.raises(Deadlock, match="tx 4"):
            run(body.replace(", 256;", ", 260;", 1).format(wait=wait), [out], seed=seed)
    unfenced = BARRIER.format(count=1) + expect.format(bytes=256) + bulk.replace("{fence}", "") + end
    with pytest.raises(RaceError, match="missing proxy fence"):
        run(unfenced.format(wait=wait), [words()], seed=seed)


@seeds
def test_a_multicast_load_reaches_the_ctas_of_its_mask_and_their_barriers(seed):
    """PTX ISA 9.7.9.25.5.2: one tensor load of CTA 1 into CTAs 0, 1 and 3 of four."""
    data = torch.arange(128, dtype=torch.int32)
    tmap = TensorMap(data.data_ptr(), (128,), (), (64,), 0, "s32")
    body = BARRIER.format(count=1) + (
        "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256; setp.eq.u32 %p3, %r3, 1; and.pred %p3, %p3, %p1;"
        "add.s32 %r10, %r1, 1024; mov.b64 %d2, p1; mov.b16 %h1, 11;"
        "@%p3 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r10], [%d2, {32}], [%r1], %h1;"
        "mov.b32 %r9, 7; setp.eq.u32 %p4, %r3, 2; @%p4 bra SKIP;"
        + WAIT.format(n=1, at="%r1", parity=0)
        + "ld.shared.b32 %r9, [%r2+1024]; SKIP:"
        + STORE
        + MEET
    )
    text = kernel(1, START + body, threads=64)
    text = text.replace(".param .u64 p0\n", ".param .u64 p0,\n.param .align 64 .b8 p1[128]\n")
    out = words(4)
    launch(text, 4, 64, [out, tmap], memory=[data], cluster=(4, 1, 1), dynamic_shared=4096, seed=seed)
    want = np.tile(np.arange(32, 96), (4, 1))
    want[2] = 7
    np.testing.assert_array_equal(out.reshape(4, 64), want)


def test_a_multicast_load_to_a_cta_without_that_barrier_is_an_error():
    data = torch.arange(128, dtype=torch.int32)
    body = (
        "setp.eq.u32 %p3, %r4, 0; and.pred %p3, %p3, %p1; @%p3 mbarrier.init.shared::cta.b64 [%r1], 1;"
        "fence.mbarrier_init.release.cluster; add.s32 %r10, %r1, 1024; mov.b16 %h1, 3; ld.param.b64 %d2, [p0];"
        "@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r10], [%d2], 256, [%r1], %h1;"
    )
    with pytest.raises(EmulatorError, match="multicast to CTA 1, which has no mbarrier at 0x400"):
        run(body, [data])


PERSISTENT = """@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; fence.proxy.async.shared::cta; bar.sync 0; mov.b32 %r12, 0;
NEXT: ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %r4, 4, %d1; @%p1 red.global.add.u32 [%d1], 1;
add.s32 %r10, %r1, 16; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;
@%p1 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r10], [%r1];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], %r12; @!%p2 bra WAIT; xor.b32 %r12, %r12, 1;
ld.shared.v2.b64 {%d3, %d4}, [%r10]; mov.b128 %q, {%d3, %d4}; fence.proxy.async.shared::cta; bar.sync 0;
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q; @!%p3 bra DONE;
clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r4, %q; bra NEXT; DONE:"""


@pytest.mark.parametrize("resident", [1, 2, 5])
@seeds
def test_cluster_launch_control_hands_every_block_to_exactly_one_cta(seed, resident):
    """PTX ISA 9.7.13.16: CTAs take blocks that have not started, until none is left."""
    count = np.zeros(11, np.uint32)
    text = kernel(1, START + PERSISTENT, ".reg .b128 %q;", threads=64)
    launch(text, 11, 64, [count], dynamic_shared=4096, seed=seed, resident=resident)
    np.testing.assert_array_equal(count, np.ones(11))


REDUCE = """st.shared.{width} [%r2], {value}; fence.proxy.async.shared::cta; bar.sync 0;
@!%p1 bra DONE; ld.param.b64 %d1, [p0];
cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%d1], [%r1], {bytes}; cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0; DONE:"""

SUMS = {
    "add.f32": (np.float32, "cvt.rn.f32.u32 %r9, %r5;", "b32", "%r9", lambda a: a.sum(0)),
    "add.u32": (np.uint32, "mov.b32 %r9, %r5;", "b32", "%r9", lambda a: a.sum(0)),
    "max.s32": (np.int32, "neg.s32 %r9, %r5;", "b32", "%r9", lambda a: (-a.astype(np.int32)).max(0).clip(0)),
    "or.b32": (np.uint32, "mov.b32 %r9, %r5;", "b32", "%r9", np.bitwise_or.reduce),
    "add.u64": (np.uint64, "cvt.u64.u32 %d9, %r5;", "b64", "%d9", lambda a: a.sum(0)),
    "add.noftz.f16": (np.float16, "cvt.rn.f16.u32 %h1, %r5;", "b16", "%h1", lambda a: a.sum(0)),
    "add.noftz.bf16": (np.uint16, "cvt.rn.f32.u32 %r9, %r5; cvt.rn.bf16.f32 %h1, %r9;", "b16", "%h1", None),
}


@seeds
@pytest.mark.parametrize("op", SUMS)
def test_bulk_reductions_of_several_ctas_add_up(op, seed):
    """PTX ISA 9.7.9.25.4.2 (cp.reduce.async.bulk): each CTA adds its 64 elements to the same 64; sums are exact."""
    dtype, make, width, value, combine = SUMS[op]
    out = np.zeros(64, dtype)
    size = out.itemsize
    place = f"mul.lo.u32 %r2, %t, {size}; add.s32 %r2, %r2, %r1;"
    run(place + make + REDUCE.format(width=width, value=value, op=op, bytes=64 * size), [out], grid=3, cluster=1,
        seed=seed)  # fmt: skip
    inputs = np.arange(192).reshape(3, 64)
    if combine is None:
        found = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float().numpy()
        assert np.abs(found - inputs.sum(0)).max() <= 2  # a unit of bfloat16 between 256 and 512
    else:
        np.testing.assert_array_equal(out, combine(inputs).astype(dtype))


@seeds
def test_a_tensor_reduction_adds_inside_the_tensor_only(seed):
    """PTX ISA 9.7.9.25.5.4 (cp.reduce.async.bulk.tensor): two CTAs add a box that hangs over the tensor's end."""
    out = torch.zeros(72)
    tmap = TensorMap(out.data_ptr(), (60,), (), (64,), 0, "f32")
    body = """cvt.rn.f32.u32 %r9, %t; st.shared.b32 [%r2], %r9; fence.proxy.async.shared::cta; bar.sync 0;
    @!%p1 bra DONE; mov.b64 %d1, p0;
    cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.tile.bulk_group [%d1, {4}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; DONE:"""
    text = kernel(0, START + body, threads=64).replace(".entry k(\n\n)", ".entry k(\n.param .align 64 .b8 p0[128])")
    launch(text, 2, 64, [tmap], memory=[out], dynamic_shared=4096, seed=seed)
    want = np.zeros(72)
    want[4:60] = 2 * np.arange(56)
    np.testing.assert_array_equal(out.numpy(), want)


@seeds
def test_a_pair_allocates_tensor_memory_together(seed):
    """PTX ISA 9.7.16.7.1: cta_group::2 needs a warp of each CTA, and neither goes on before both have it."""
    body = (
        """setp.lt.u32 %p3, %t, 32; {who}
    @%p3 tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r1], {columns}; bar.sync 0; ld.shared.b32 %r9, [%r1];
    @%p3 tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r9, {columns};"""
        + STORE
    )
    out = words()
    run(body.format(who="", columns=64), [out], seed=seed)
    np.testing.assert_array_equal(out, 0)
    with pytest.raises(Deadlock, match=r"tcgen05\.alloc of 64 columns: for the other CTA"):
        run(body.format(who="setp.ne.u32 %p4, %r3, 0; @%p4 exit;", columns=64), [out], seed=seed)
    sizes = "shl.b32 %r10, 32, %r3;"
    with pytest.raises(TensorMemoryError, match="one CTA of a pair allocates"):
        run(body.format(who=sizes, columns="%r10"), [out], seed=seed)
