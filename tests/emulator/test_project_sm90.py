"""The project's CuTe DSL forward for SM90, executed: what a GPU run costs minutes for is tried here first.

Beyond results, the emulator watches what a Hopper GPU does not tell: races, missing fences, registers beyond what the
block was launched with (a kernel that hung on an H100 was found so).
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="needs the package nvidia-cutlass-dsl"
)
dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")

from simulation import visited_by_warpgroups  # noqa: E402

from fa4_core.checks import check_forward  # noqa: E402
from fa4_core.problem import Inputs, make_problem  # noqa: E402
from fa4_core.strategies import Case  # noqa: E402
from fa4_cute import launch  # noqa: E402
from fa4_cute.sm90_config import config_for  # noqa: E402

from . import cute_backend  # noqa: E402
from .cute_backend import emulated_cute  # noqa: E402

ARCH = "sm_90a"
bf16, fp16 = torch.bfloat16, torch.float16

FEATURES = {
    "full-64": {"dtype": bf16, "head_dim": 64},
    "causal-gqa-128": {"dtype": bf16, "head_dim": 128, "causal": True, "heads_q": 4, "heads_kv": 2},
    "varlen-used-left-96-sink": {
        "dtype": fp16, "head_dim": 96, "varlen": True, "window": (40, None), "used": True, "sink": "normal"
    },
    "full-256": {"dtype": fp16, "head_dim": 256},
    "softcap-window-64": {"dtype": bf16, "head_dim": 64, "window": (70, 9), "softcap": 5.0},
    "softcap-causal-gqa-128": {
        "dtype": fp16, "head_dim": 128, "causal": True, "softcap": 5.0, "heads_q": 4, "heads_kv": 2
    },
    "softcap-window-256": {"dtype": bf16, "head_dim": 256, "window": (70, 9), "softcap": 5.0},
    "causal-192": {"dtype": bf16, "head_dim": 192, "head_dim_v": 96, "causal": True},
    "window-sink-groups-of-8-64": {
        "dtype": bf16, "head_dim": 64, "window": (70, 9), "sink": "normal", "heads_q": 8
    },
    "varlen-window-used-softcap-sink-gqa-256": {
        "dtype": fp16, "head_dim": 256, "varlen": True, "window": (60, 20), "used": True, "softcap": 5.0,
        "sink": "normal", "heads_q": 8, "heads_kv": 2
    },
    "causal-groups-of-3": {"dtype": bf16, "head_dim": 64, "causal": True, "heads_q": 3},
}  # fmt: skip
"""One compilation each; what a case adds is drawn. Both ways to the output are there: beside Q and where Q was; heads
of groups that divide 64 lie side by side in a query tile."""


def attention(q, k, v, **options):
    return dispatch.attention(q, k, v, backend="cute", **options)


@st.composite
def cases_of(draw, name):
    """A case of a feature: lengths around the 128- and 192-row tiles, magnitudes, threshold, seed."""
    fixed = {"head_dim_v": FEATURES[name]["head_dim"], **FEATURES[name]}
    packed, used = fixed.get("varlen", False), fixed.pop("used", False)
    length = st.sampled_from((0, 1, 2, 127, 128, 129, 192, 193, 257)) | st.integers(1, 400)
    pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=3 if packed else 1))
    if used:
        fixed["used"] = tuple(tuple(draw(st.integers(0, pair[side])) for pair in pairs) for side in (0, 1))
    if packed:
        fixed["tail"] = draw(st.tuples(st.sampled_from((0, 3)), st.sampled_from((0, 70))))
    return Case(
        lengths=tuple(pairs),
        scores=draw(st.sampled_from(("normal", "large", "rising"))),
        rescale_threshold=draw(st.sampled_from((8.0, 0.0))),
        seed=draw(st.integers(0, 2**20)),
        **fixed,
    )


# No shrinking: an example takes up to a second, and its seed replays it.
@pytest.mark.parametrize("name", FEATURES)
@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(data=st.data(), seed=st.integers(0, 63), programs=st.integers(1, 3))
def test_forward_is_within_its_budget(name, data, seed, programs):
    """Wrong values, races, deadlocks, uninitialised reads and accesses out of bounds all fail."""
    case = data.draw(cases_of(name))
    call = case.build("cpu")
    with emulated_cute(ARCH, seed=seed, programs=programs):
        report = check_forward(attention, call.q, call.k, call.v, **call.options)
    assert report.passed, f"schedule {seed}, {programs} blocks: {case!r}\n{report}"


@pytest.mark.parametrize(
    "case",
    [
        Case(bf16, 128, 128, heads_q=64, lengths=((5, 300), (0, 3), (2, 0), (1, 70)), varlen=True, causal=True,
             sink="normal", tail=(2, 0)),
        Case(fp16, 64, 64, heads_q=64, heads_kv=2, lengths=((20, 200),) * 2, window=(20, None), sink="normal"),
        Case(fp16, 64, 64, heads_q=16, lengths=((80, 200),) * 2, used=((70, 0), (150, 100)), causal=True),
        Case(bf16, 192, 128, heads_q=16, lengths=((20, 300), (9, 20)), varlen=True, causal=True),
        Case(bf16, 192, 192, heads_q=4, heads_kv=2, lengths=((70, 130),) * 2, window=(None, 30), softcap=5.0),
        Case(fp16, 8, 8, heads_q=4, heads_kv=2, lengths=((130, 200),), causal=True),
        Case(bf16, 256, 256, heads_q=32, lengths=((9, 100),), used=((8,), (99,)), sink="large"),
        Case(bf16, 64, 64, heads_q=128, lengths=((3, 100),)),
        Case(bf16, 256, 72, heads_q=2, lengths=((140, 200),), causal=True),
    ],
    ids=["64 of 128 varlen", "32 of 64", "16 of 64 used", "16 of 192 varlen", "2 of 192", "2 of 8", "32 of 256 used",
         "128 of 64, apart", "2 of 256, 72 of V"],
)  # fmt: skip
def test_groups_of_any_size(case):
    """Rows of a packed tile: each of its own head's sink, LSE and output, at its own position's mask and bounds."""
    call = case.build("cpu")
    with emulated_cute(ARCH, seed=1):
        check_forward(attention, call.q, call.k, call.v, **call.options).require()


def test_a_batch_of_no_sequence_has_rows_of_zeros():
    """All rows are past the last sequence, which ends where it begins."""
    call = Case(bf16, 64, 64, heads_q=2, lengths=(), varlen=True, tail=(3, 5)).build("cpu")
    with emulated_cute(ARCH):
        out, lse = attention(call.q, call.k, call.v, return_lse=True, **call.options)
    assert out.shape == (3, 2, 64)
    assert not out.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize(
    "case",
    [
        Case(bf16, 256, 256, heads_q=2, lengths=((300, 340),)),
        Case(bf16, 192, 128, heads_q=4, heads_kv=2, lengths=((140, 300), (9, 20)), varlen=True, causal=True),
    ],
    ids=["256", "192 varlen"],
)
def test_the_form_for_long_rows_gives_the_same_bits(case, monkeypatch):
    """Several work items a block, so that Q's slot and the output's are used anew."""
    call, seen = case.build("cpu"), []

    def results():
        with emulated_cute(ARCH, programs=4, seed=1, observe=lambda request, result: seen.append(request)):
            return attention(call.q, call.k, call.v, return_lse=True, **call.options)

    usual = results()
    monkeypatch.setattr(launch, "LONG", 1)
    long = results()
    assert seen[0] != seen[1]
    assert all(map(torch.equal, usual, long))
    with emulated_cute(ARCH, seed=2):
        check_forward(attention, call.q, call.k, call.v, **call.options).require()


@pytest.mark.parametrize(("group", "longest"), [(1, 500), (3, 300), (8, 200), (64, 60)])
def test_hidden_tiles_are_never_visited(group, longest):
    """Counted against brute force, by the positions that a query tile holds."""
    rng = np.random.default_rng(group)
    for seed in range(3):
        len_q, len_k = (int(n) for n in rng.integers((longest // 2, 1), (longest, 600)))
        left, right = (int(n) for n in rng.integers(0, 100, 2))
        q, k = torch.randn(1, len_q, group, 64).bfloat16(), torch.randn(1, len_k, 1, 64).bfloat16()
        inputs = Inputs(q, k, k)
        problem = make_problem(inputs, window_left=left, window_right=right)
        _, _, counts = cute_backend.forward(problem, inputs, ARCH, counted=True, seed=seed)
        assert counts is not None
        config = config_for(problem.kinds)
        assert config.packed == (1 if group == 3 else group)
        want = visited_by_warpgroups(len_q, len_k, left, right, config)
        want = np.where(want > 0, want, -1)  # rows without keys are written elsewhere, and not counted
        assert (counts[0, :, :, 0].numpy() == want).all(), (len_q, len_k, left, right)


def test_no_schedule_and_no_number_of_blocks_changes_a_result():
    """Blocks draw their items from a counter, and items overlap: neither may show.

    To the bit on a GPU (tests/test_cute.py); here numpy sums a product by the warps that happen to be at it together.
    """
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 300, 2, 128, generator=g).bfloat16() for _ in range(3))
    results = []
    for seed, programs in ((0, 1), (1, 2), (2, 5)):
        with emulated_cute(ARCH, seed=seed, programs=programs):
            results.append(attention(q, k, v, causal=True, return_lse=True))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-6, atol=1e-6)


def test_nothing_crosses_a_sequence():
    """NaN in the neighbours' rows, which the last tile of a sequence reads, changes nothing."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(500, 1, 96, generator=g).half() for _ in range(3))
    cu = torch.tensor([0, 150, 330, 500], dtype=torch.int32)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "window": (400, None), "sink": torch.zeros(1)}
    options["seqused_q"] = options["seqused_k"] = torch.tensor([150, 180, 170], dtype=torch.int32)
    with emulated_cute(ARCH, seed=3):
        clean, lse = attention(q, k, v, **options, return_lse=True)
        for t in (q, k, v):
            t[:150] = math.nan
            t[330:] = math.nan
        dirty, dirty_lse = attention(q, k, v, **options, return_lse=True)
    torch.testing.assert_close(clean[150:330], dirty[150:330], rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(lse[:, 150:330], dirty_lse[:, 150:330], rtol=1e-6, atol=1e-6)


def test_a_sink_may_be_float64():
    """No kernel reads one: it once failed to compile."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 70, 2, 64, generator=g).bfloat16() for _ in range(3))
    sink = torch.tensor([0.5, -2.0])
    with emulated_cute(ARCH):
        want = attention(q, k, v, sink=sink, return_lse=True)
        got = attention(q, k, v, sink=sink.double(), return_lse=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_softcap_bends_large_scores_beside_small_ones(head_dim, causal):
    """Rows and keys on both sides of the polynomial's reach, infinite scores and NaN, each row as float64 has it."""
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 330, 1, head_dim, generator=g).bfloat16() for _ in range(3))
    q[:, 40:48] *= 60  # warps of 16 rows: some all near, some not
    q[:, 200:280:9] *= 20
    k[:, 70:75] *= 30
    q[:, 100], q[:, 101] = 0.0, math.nan
    q[:, 100, :, 3] = math.inf  # scores of both infinities, which bend to the cap and its negative
    with emulated_cute(ARCH):
        out, lse = attention(q, k, v, softcap=8.0, causal=causal, return_lse=True)
        check_forward(attention, q, k, v, softcap=8.0, causal=causal).require()
    double = (t.double() for t in (q, k, v))
    _, want = dispatch.attention(*double, softcap=8.0, causal=causal, backend="reference", return_lse=True)
    assert out[:, 101].isnan().all()
    assert not out[:, [*range(101), *range(102, 330)]].isnan().any()
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5, equal_nan=True)


def test_a_softcap_takes_scores_of_minus_infinity_for_scores():
    """Not for hidden keys, which are -inf beside them: each counts with the cap's negative."""
    g = torch.Generator().manual_seed(8)
    k, v = (torch.randn(1, 200, 1, 64, generator=g).bfloat16() for _ in range(2))
    q = torch.zeros_like(k)
    q[..., 3], k[..., 3] = math.inf, -1.0
    with emulated_cute(ARCH):
        out, lse = attention(q, k, v, softcap=5.0, causal=True, return_lse=True)
    keys = torch.arange(1, 201)
    torch.testing.assert_close(lse[0, 0], keys.log() - 5.0)
    torch.testing.assert_close(out[0, :, 0].float(), v[0, :, 0].float().cumsum(0) / keys[:, None], rtol=1e-2, atol=4e-3)


def test_hidden_scores_that_no_polynomial_serves_change_nothing():
    """Keys after the diagonal and past the length in use, huge, infinite and NaN, share tiles with what rows see."""
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, 200, 1, 64, generator=g).bfloat16() for _ in range(3))
    used = torch.tensor([150], dtype=torch.int32)
    options = {"causal": True, "softcap": 30.0, "seqused_q": used, "seqused_k": used}
    results = []
    for value in (1.0, 1e30, math.inf, math.nan):
        k[:, 150:] = value
        v[:, 150:] = value
        k[:, 120:150] = value if math.isfinite(value) else 1e30
        with emulated_cute(ARCH):
            out, lse = attention(q, k, v, return_lse=True, **options)
        results.append((out[:, :120], lse[..., :120]))
    assert not results[0][0].isnan().any()
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=2**-10, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [30.0, 1e6])
def test_a_softcap_of_any_size_keeps_the_precision(softcap):
    """Far above the scores it bends next to nothing; a tanh that cancels near zero was off by its 2^-24 times 1e6."""
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 70, 1, 64, generator=g).bfloat16() for _ in range(3))
    with emulated_cute(ARCH):
        _, lse = attention(q, k, v, softcap=softcap, return_lse=True)
    double = (t.double() for t in (q, k, v))
    _, want = dispatch.attention(*double, softcap=softcap, backend="reference", return_lse=True)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=4e-6)
