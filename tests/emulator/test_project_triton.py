"""The project's Triton kernels, forward and backward, as compiled for each architecture, bfloat16 included.

This is what "any NVIDIA GPU" rests on: the interpreter cannot do bfloat16 and no machine has all of these GPUs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="needs the package triton")
dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fa4_core import problem  # noqa: E402
from fa4_core.checks import check_backward, check_forward  # noqa: E402
from fa4_core.strategies import Case  # noqa: E402
from fa4_triton import launch  # noqa: E402
from fa4_triton.compile import compile_kernel  # noqa: E402
from fa4_triton.steps import find_sequence, span_of  # noqa: E402

from .launcher import TRITON_TOLERATES, launch_triton  # noqa: E402
from .triton_backend import emulated_triton  # noqa: E402

CAPABILITIES = (80, 90, 100, 120)
TOLERATED = {100: (*TRITON_TOLERATES, "missing proxy fence")}
"""On sm_100 Triton 3.7 leaves a proxy fence out of the peeled first iteration; see docs/emulator.md."""

# No shrinking: an example takes a second, and its seed replays it.

FEATURES = {
    "causal-gqa": {"causal": True, "heads_q": 2},
    "window-softcap-sink": {"window": (20, 9), "softcap": 5.0, "sink": "normal"},
    "varlen": {"varlen": True, "causal": True},
}


def attention(q, k, v, **options):
    return dispatch.attention(q, k, v, backend="triton", **options)


def lengths(features, pair):
    return ((pair[0], pair[1]), (pair[1] // 2, pair[1])) if features.get("varlen") else (pair,)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", FEATURES)
@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(
    pair=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scores=st.sampled_from(("normal", "rising", "large")),
    seed=st.integers(0, 63),
)
def test_forward_and_backward_are_within_their_budget(capability, name, pair, scores, seed):
    """bfloat16, head_dim 64; lengths, magnitudes and the schedule are drawn. "rising" keeps the running maximum moving,
    which is what runs the rescale."""
    case = Case(dtype=torch.bfloat16, head_dim=64, head_dim_v=64, lengths=lengths(FEATURES[name], pair), scores=scores,
                seed=seed, **FEATURES[name])  # fmt: skip
    call = case.build("cpu")
    with emulated_triton(capability, seed=seed, tolerate=TOLERATED.get(capability, TRITON_TOLERATES)):
        report = check_backward(attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options)
    assert report.passed, f"sm_{capability}, schedule {seed}: {case!r}\n{report}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(pair=st.tuples(st.integers(60, 140), st.integers(60, 140)), seed=st.integers(0, 63))
def test_forward_of_fp16_at_head_dim_128(capability, pair, seed):
    """Other tiles of the project's table: more warps, wider accumulators, deeper pipelines."""
    case = Case(dtype=torch.float16, head_dim=128, head_dim_v=128, lengths=(pair,), causal=True, seed=seed)
    call = case.build("cpu")
    with emulated_triton(capability, seed=seed, tolerate=TOLERATED.get(capability, TRITON_TOLERATES)):
        report = check_forward(attention, call.q, call.k, call.v, **call.options)
    assert report.passed, f"sm_{capability}, schedule {seed}: {case!r}\n{report}"


def test_sinks_of_different_dtypes_do_not_share_a_kernel():
    """Seen: the kernel compiled for the first call's float32 sink read the next one's bfloat16 sink out of bounds."""
    q, sink = torch.randn(1, 40, 4, 16, dtype=torch.float16), torch.randn(4)
    with emulated_triton(80):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            check_backward(attention, q, q, q, dout=torch.ones_like(q), sink=sink.to(dtype)).require()


INT32 = torch.int32
LEAST, MOST = -(2**31), 2**31 - 1
WILD = (MOST, LEAST, -1, 99, 2**30, 0, 1, 64, LEAST + 1, -(2**30), 70, 35)


@triton.jit
def probe(cu, used, rows, batch, found, TILE: tl.constexpr):
    """For each program's sequence its span, and the place of the tile that is numbered like it."""
    i = tl.program_id(0)
    span = span_of(cu, used, i, rows, batch)
    sequence, tile = find_sequence(cu, rows, batch, i, TILE)
    tl.store(found + 5 * i, span.start)
    tl.store(found + 5 * i + 1, span.room)
    tl.store(found + 5 * i + 2, span.length)
    tl.store(found + 5 * i + 3, sequence)
    tl.store(found + 5 * i + 4, tile)


@pytest.mark.parametrize("rows", [0, 70, MOST])
def test_every_span_lies_in_its_tensor_whatever_stands_for_its_ends(rows):
    """All pairs of wild numbers. Seen: an end near -2^31 gave a sequence of almost 2^31 rows."""
    cu = torch.tensor([n for pair in itertools.product(WILD, WILD) for n in pair], dtype=INT32)
    used = torch.tensor(WILD, dtype=INT32).repeat(len(cu) // len(WILD))[:-1]
    batch = len(used)
    found = torch.full((batch + 2, 5), LEAST, dtype=INT32)
    compiled = compile_kernel(probe, (cu, used, 1, 1, found), {"TILE": 64}, {"num_warps": 1}, GPUTarget("cuda", 80, 32))
    launch_triton(compiled, (batch + 2,), {"cu": cu, "used": used, "rows": rows, "batch": batch, "found": found})
    start, room, length, sequence, tile = found.long().unbind(1)
    assert (start >= 0).all()
    assert (room >= 0).all()
    assert (start + room <= rows).all()
    assert (length >= 0).all()
    assert (length <= room).all()
    assert not length[batch:].any()
    assert ((sequence >= 0) & (sequence <= batch + 1)).all()
    assert ((tile >= 0) & (tile <= torch.arange(batch + 2))).all()


def wild(seed, n):
    """n numbers that no length and no end should be, among some that they are."""
    at = torch.randint(0, len(WILD), (n,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(WILD, dtype=INT32)[at]


@pytest.mark.parametrize("layout", ["ends", "ends and lengths", "lengths"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_wild_length_or_end_leads_out_of_the_tensors(capability, layout, monkeypatch):
    """What memcheck would say of the compiled kernels, forward and backward: no memory exists but the arguments'.

    Races are not looked for: wrong ends let two sequences overlap, whose programs then write the same rows.
    """
    monkeypatch.setattr(problem, "contents_are_checked", lambda device: False)
    monkeypatch.setattr(launch, "MIN_TMA_FLOPS", 0)  # through descriptors where the architecture has them
    batch, ran = 4, []
    # The first end is the one seen, the second the other way round; then ends that fall and what is drawn.
    ends = [[0, 35, LEAST, 64, 70], [LEAST, MOST, LEAST, MOST, -5], [70, 64, 35, 1, 0]]
    ends = [*(torch.tensor(e, dtype=INT32) for e in ends), wild(capability, batch + 1)]
    for seed, cu in enumerate(ends):
        options = {}
        if "ends" in layout:
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu.flip(0) if seed else cu}
        if "lengths" in layout:
            options |= {"seqused_q": wild(seed, batch), "seqused_k": wild(seed + 10, batch)}
        shape = (70, 1, 64) if "ends" in layout else (batch, 70, 1, 64)
        q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
        with emulated_triton(
            capability, seed=seed, observe=lambda name, _: ran.append(name), races=False,
            tolerate=TOLERATED.get(capability, TRITON_TOLERATES),
        ):  # fmt: skip
            out, lse = attention(q, k, v, causal=seed > 1, return_lse=True, **options)
            torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    kernels = ["attention_forward", "row_slopes", "attention_backward_kv", "attention_backward_q"]
    assert ran == kernels * len(ends)
