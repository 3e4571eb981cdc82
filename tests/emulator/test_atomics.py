"""atom and red against numpy, on global and shared memory, in both packed types (PTX ISA 9.7.13.5-6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .kernels import kernel
from .launcher import launch

THREADS, PLACES = 64, 8
TURN = np.arange(THREADS)
place_of = TURN % PLACES

# name: (element, PTX register of the operand and how it is made from %t, the result of all threads of one place)
OPERATIONS = {
    "add.u32": (np.uint32, "mov.b32 %r9, %t;", "%r9", lambda v: 7 + v.sum()),
    "add.u64": (np.uint64, "cvt.u64.u32 %d9, %t; shl.b64 %d9, %d9, 33;", "%d9", lambda v: 7 + (v.sum() << 33)),
    "add.f32": (np.float32, "cvt.rn.f32.u32 %r9, %t;", "%r9", lambda v: 7 + v.sum()),
    "add.f64": (np.float64, "cvt.rn.f64.u32 %d9, %t;", "%d9", lambda v: 7 + v.sum()),
    "max.s32": (np.int32, "sub.s32 %r9, 30, %t;", "%r9", lambda v: max(7, (30 - v).max())),
    "min.s32": (np.int32, "sub.s32 %r9, 30, %t;", "%r9", lambda v: min(7, (30 - v).min())),
    "max.u32": (np.uint32, "sub.s32 %r9, 30, %t;", "%r9", lambda v: max(7, ((30 - v) & 0xFFFFFFFF).max())),
    "and.b32": (np.uint32, "or.b32 %r9, %t, 5;", "%r9", lambda v: 7 & np.bitwise_and.reduce(v | 5)),
    "or.b32": (np.uint32, "mov.b32 %r9, %t;", "%r9", lambda v: 7 | np.bitwise_or.reduce(v)),
    "xor.b32": (np.uint32, "mov.b32 %r9, %t;", "%r9", lambda v: 7 ^ np.bitwise_xor.reduce(v)),
    "inc.u32": (np.uint32, "mov.b32 %r9, 9;", "%r9", lambda v: (7 + len(v)) % 10),
    "dec.u32": (np.uint32, "mov.b32 %r9, 9;", "%r9", lambda v: (7 - len(v)) % 10),
}


def places_of(op: str, space: str, form: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All threads operate, eight on each of eight places that hold 7; (the places, what `atom` returned)."""
    dtype, make, register, _ = OPERATIONS[op]
    data, old = np.full(PLACES, 7, dtype), np.zeros(THREADS, dtype)
    size = data.itemsize
    bits, keep = 8 * size, "%r12" if size == 4 else "%d12"
    returned = f"{keep}, " if form == "atom" else ""
    place = "%d1" if space == "global" else "%r2"
    body = f"""and.b32 %r1, %t, {PLACES - 1}; ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %r1, {size}, %d1;
    mov.b32 %r2, smem; mad.lo.s32 %r2, %r1, {size}, %r2; setp.lt.u32 %p1, %t, {PLACES};
    @%p1 ld.global.b{bits} {keep}, [%d1]; @%p1 st.shared.b{bits} [%r2], {keep}; bar.sync 0; {make}
    {form}.relaxed.gpu.{space}.{op} {returned}[{place}], {register}; bar.sync 0;
    ld.param.b64 %d2, [p1]; mad.wide.u32 %d2, %t, {size}, %d2; st.global.b{bits} [%d2], {keep};"""
    if space == "shared":
        body += f"@%p1 ld.shared.b{bits} {keep}, [%r2]; @%p1 st.global.b{bits} [%d1], {keep};"
    launch(kernel(2, body, threads=THREADS), 1, THREADS, [data, old], dynamic_shared=256, seed=seed)
    return data, old


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_atomics_of_many_lanes_on_one_place(op, space, seed):
    dtype, _, _, combine = OPERATIONS[op]
    want = np.array([combine(TURN[place_of == p]) for p in range(PLACES)]).astype(dtype)
    for form in ("red", "atom"):
        data, old = places_of(op, space, form, seed)
        np.testing.assert_array_equal(data, want)
    if op == "inc.u32":  # each returned value but the first is what another lane left
        for place in range(PLACES):
            assert sorted(old[place_of == place]) == sorted((7 + n) % 10 for n in range(PLACES))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves_add_one_by_one(kind):
    data = torch.zeros(2, dtype={"f16": torch.float16, "bf16": torch.bfloat16}[kind])
    one_two = (torch.tensor([1.0, 2.0], dtype=data.dtype)).view(torch.int32).item()
    body = f"ld.param.b64 %d1, [p0]; red.relaxed.gpu.global.add.noftz.{kind}x2 [%d1], {one_two};"
    launch(kernel(1, body, threads=64), 1, 64, [data])
    assert data.tolist() == [64.0, 128.0]


def test_vector_reductions_add_four_floats_at_once():
    data = np.zeros(4, np.float32)
    body = """ld.param.b64 %d1, [p0]; cvt.rn.f32.u32 %r1, %t; neg.f32 %r2, %r1; mov.b32 %r3, 0f3F800000; mov.b32 %r4, 0;
    red.relaxed.gpu.global.add.v4.f32 [%d1], {%r1, %r2, %r3, %r4};"""
    launch(kernel(1, body, threads=64), 1, 64, [data])
    assert data.tolist() == [2016.0, -2016.0, 64.0, 0.0]


@pytest.mark.parametrize("seed", range(6))
def test_compare_and_swap_lets_one_thread_through(seed):
    lock, winners = np.full(1, 5, np.uint32), np.zeros(64, np.uint32)
    body = """ld.param.b64 %d1, [p0]; add.s32 %r1, %t, 100; atom.relaxed.gpu.global.cas.b32 %r2, [%d1], 5, %r1;
    setp.eq.u32 %p1, %r2, 5; selp.b32 %r3, 1, 0, %p1; ld.param.b64 %d2, [p1]; mad.wide.u32 %d2, %t, 4, %d2;
    st.global.b32 [%d2], %r3;"""
    launch(kernel(2, body, threads=64), 1, 64, [lock, winners], seed=seed)
    assert winners.sum() == 1
    assert lock[0] == 100 + winners.argmax()
