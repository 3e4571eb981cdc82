"""The project's Triton kernels, forward and backward, as compiled for each architecture, bfloat16 included.

This is what "any NVIDIA GPU" rests on: the interpreter cannot do bfloat16 and no machine has all of these GPUs.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs the package triton")
dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")

from fa4_core.checks import check_backward, check_forward  # noqa: E402
from fa4_core.strategies import Case  # noqa: E402

from .launcher import TRITON_TOLERATES  # noqa: E402
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
