"""The project's CuTe DSL forward for SM100, executed: against float64, the Triton kernel and itself.

No Blackwell GPU is at hand, so this is what its correctness rests on. Every run is race-checked, on a drawn schedule.
"""

from __future__ import annotations

import functools
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

from simulation import simulated_skips, visited_tiles  # noqa: E402

from fa4_core.checks import check_forward  # noqa: E402
from fa4_core.problem import Inputs, make_problem  # noqa: E402
from fa4_core.strategies import Case  # noqa: E402

from . import cute_backend  # noqa: E402
from .cute_backend import emulated_cute  # noqa: E402
from .errors import EmulatorError  # noqa: E402
from .faults import data_path_faults, idle, program_with, synchronisation_faults  # noqa: E402
from .launcher import TRITON_TOLERATES  # noqa: E402
from .triton_backend import emulated_triton  # noqa: E402

ARCH = "sm_100a"
bf16, fp16 = torch.bfloat16, torch.float16

FEATURES = {
    "full-gqa-128": {"dtype": bf16, "head_dim": 128, "heads_q": 4, "heads_kv": 2, "sink": "normal"},
    "full-120": {"dtype": fp16, "head_dim": 120},
    "causal-gqa-128": {"dtype": bf16, "head_dim": 128, "causal": True, "heads_q": 4, "heads_kv": 2},
    "causal-groups-of-3": {"dtype": bf16, "head_dim": 64, "causal": True, "heads_q": 3},
    "varlen-window-used-gqa-64": {
        "dtype": bf16,
        "head_dim": 64,
        "varlen": True,
        "window": (50, 20),
        "used": True,
        "heads_q": 8,
        "sink": "normal",
    },
    "window-softcap-sink-64": {"dtype": bf16, "head_dim": 64, "window": (70, 9), "softcap": 5.0, "sink": "normal"},
    "varlen-causal-64": {"dtype": bf16, "head_dim": 64, "varlen": True, "causal": True},
    "varlen-used-left-96": {"dtype": fp16, "head_dim": 96, "varlen": True, "window": (40, None), "used": True},
    "used-72": {"dtype": fp16, "head_dim": 72, "used": True},
    "causal-192": {"dtype": bf16, "head_dim": 192, "head_dim_v": 128, "causal": True},
    "causal-gqa-256": {"dtype": bf16, "head_dim": 256, "causal": True, "heads_q": 2, "sink": "normal"},
    "varlen-window-used-200": {"dtype": fp16, "head_dim": 200, "varlen": True, "window": (150, 9), "used": True},
}
"""One compilation each; what a case adds is drawn. The full ones share their MMAs between two CTAs."""

# No shrinking: an example takes up to a second, and its seed replays it.
_phases = (Phase.explicit, Phase.generate)


def attention(q, k, v, **options):
    return dispatch.attention(q, k, v, backend="cute", **options)


@st.composite
def cases_of(draw, name):
    """A case of a feature: lengths around the 256-row and 128-key tiles, magnitudes, threshold, seed."""
    fixed = {"head_dim_v": FEATURES[name]["head_dim"], **FEATURES[name]}
    packed, used = fixed.get("varlen", False), fixed.pop("used", False)
    edges = (0, 1, 2, 127, 128, 129, 255, 256, 257, 300, *((511, 512, 513, 700) if name.startswith("full") else ()))
    length = st.sampled_from(edges) | st.integers(1, 400)
    pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=3 if packed else 1))
    if not packed:
        pairs = pairs * draw(st.integers(1, 2))
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


@pytest.mark.parametrize("name", FEATURES)
@settings(max_examples=6, phases=_phases)
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
        Case(bf16, 128, 128, heads_q=128, lengths=((7, 300),)),
        Case(fp16, 8, 8, heads_q=4, heads_kv=2, lengths=((300, 200),), causal=True),
        Case(bf16, 192, 128, heads_q=32, lengths=((20, 300),), varlen=True, causal=True),
    ],
    ids=["group of 128, pairs", "head_dim 8", "group of 32, head_dim 192"],
)
def test_rare_groups_and_head_dims(case):
    call = case.build("cpu")
    with emulated_cute(ARCH, seed=1):
        check_forward(attention, call.q, call.k, call.v, **call.options).require()


def test_more_rows_than_kernels_can_number_are_refused(monkeypatch):
    from fa4_cute import launch

    monkeypatch.setattr(launch, "COUNTED", 300)
    q = torch.zeros(1, 300, 1, 64, dtype=bf16)
    with emulated_cute(ARCH), pytest.raises(NotImplementedError, match="300 rows of q, 300 of k and 2 work items"):
        attention(q, q, q)


@pytest.mark.parametrize("name", ["causal-groups-of-3", "varlen-causal-64"])
@settings(max_examples=5, phases=_phases)
@given(data=st.data(), seed=st.integers(0, 63), resident=st.integers(1, 3))
def test_blocks_that_take_over_the_work_of_others_do_all_of_it(name, data, seed, resident):
    """Cluster launch control: a block for each item, of which a few start and cancel the rest."""
    case = data.draw(cases_of(name))
    call = case.build("cpu")
    with emulated_cute(ARCH, config=taking_over(), seed=seed, programs=1, resident=resident):
        report = check_forward(attention, call.q, call.k, call.v, **call.options)
    assert report.passed, f"schedule {seed}, {resident} at a time: {case!r}\n{report}"


def taking_over():
    """A configuration with cluster launch control."""
    from fa4_cute.sm100_config import Exp2Share, Sm100Config

    return Sm100Config(64, 64, Exp2Share(period=16), launch_control=True)


@pytest.mark.parametrize("name", ["causal-gqa-128", "varlen-causal-64"])
@settings(max_examples=3, phases=_phases)
@given(data=st.data(), seed=st.integers(0, 63))
def test_forward_agrees_with_the_triton_kernel(name, data, seed):
    """Two kernels written apart, both compiled for sm_100 and executed: same masks, same rows, same rounding of P."""
    case = data.draw(cases_of(name))
    call = case.build("cpu")
    with emulated_cute(ARCH, seed=seed):
        ours, lse = attention(call.q, call.k, call.v, **call.options, return_lse=True)
    with emulated_triton(100, tolerate=(*TRITON_TOLERATES, "missing proxy fence")):
        triton, triton_lse = dispatch.attention(
            call.q, call.k, call.v, **call.options, return_lse=True, backend="triton"
        )
    torch.testing.assert_close(lse, triton_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.float(), triton.float(), atol=2e-2, rtol=2e-2)


def forward(q, k, v, *, config=None, counted=False, seed=0, programs=2, **options):
    """Out, LSE and counts of a call in the dense layout."""
    inputs = Inputs(q, k, v)
    problem = make_problem(inputs, **options)
    return cute_backend.forward(problem, inputs, ARCH, config, counted=counted, seed=seed, programs=programs)


@pytest.mark.parametrize("scores", ["normal", "q x 16", "rising keys"])
def test_skips_are_those_of_a_numpy_simulation(scores):
    """A pivot followed where it should stay costs speed that no result shows; kept too long, it overflows fp16."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(1, 200, 1, 64, generator=g), torch.randn(1, 640, 1, 64, generator=g)
    if scores == "q x 16":
        q *= 16
    elif scores == "rising keys":  # rising towards the left, since tiles are walked from the right
        k = q.mean(1, keepdim=True) * torch.linspace(2500, 0, k.shape[1])[None, :, None, None]
        q = q.mean(1, keepdim=True) + 0.01 * q
    q, k = q.bfloat16(), k.bfloat16()
    for threshold in (8.0, 0.0):
        _, _, counts = forward(q, k, k, counted=True, rescale_threshold=threshold)
        assert counts is not None
        assert (counts[..., 0] == 5).all()
        want = simulated_skips(q, k, 128, threshold)
        # float32 and float64 may fall on different sides of the threshold in a rare row.
        assert (counts[..., 1].numpy() != want).mean() <= 0.01
        if threshold == 8.0:
            share = want.mean() / 4
            assert share > 0.99 if scores == "normal" else share < 0.1 if scores == "rising keys" else True


def test_a_nan_in_any_column_shows_in_every_row_that_sees_it():
    """Software exponentials lose NaNs: the row maximum must carry them. Batch element b holds one at column 3 b."""
    g = torch.Generator().manual_seed(0)
    columns = range(0, 128, 3)
    at = (range(len(columns)), columns)
    q = torch.randn(len(columns), 2, 1, 64, generator=g).bfloat16()
    k, v = (torch.randn(len(columns), 128, 1, 64, generator=g).bfloat16() for _ in range(2))
    k[at] = math.nan
    out, lse, _ = forward(q, k, v, config=emulating_most(), programs=4)
    assert out.isnan().all()
    assert lse.isnan().all()
    q, k, v = (t[:9].clone() for t in (q, k, v))
    k[:] = 0
    k[range(9), range(20, 110, 10), 0, 0] = math.inf
    q[..., 0] = 1
    out, lse, _ = forward(q, k, v, config=emulating_most())  # inf - inf in every row, as in float64
    assert out.isnan().all()


def emulating_most():
    """A configuration that emulates every exponential it can, but for a few of each row."""
    from fa4_cute.sm100_config import Exp2Share, Sm100Config

    share = Exp2Share(period=32, emulated=30, first=0, last=4)
    return Sm100Config(64, 64, share)


def test_nothing_crosses_a_sequence_or_a_row():
    """NaN in every row of the neighbours' q, k and v, and past the rows in use, changes no bit."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(700, 1, 64, generator=g).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 150, 430, 700], dtype=torch.int32)
    used = torch.tensor([150, 201, 270], dtype=torch.int32)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "seqused_k": used, "causal": True}
    with emulated_cute(ARCH, seed=3):
        clean = attention(q, k, v, **options, return_lse=True)
        for t in (q, k, v):
            t[:150] = math.nan
            t[430:] = math.nan
        k[150 + 201 : 430] = math.nan
        v[150 + 201 : 430] = math.nan
        dirty = attention(q, k, v, **options, return_lse=True)
        assert torch.equal(clean[0][150:430], dirty[0][150:430])
        assert torch.equal(clean[1][:, 150:430], dirty[1][:, 150:430])
        q[250] = math.nan  # one query row
        out = attention(q, k, v, **options)
    rows = out[150:430].isnan().any(-1).any(-1)
    assert rows.nonzero().flatten().tolist() == [100]


@pytest.mark.parametrize(("head_dim", "heads", "causal"), [(64, 2, True), (128, 4, False)])
def test_dense_is_varlen_and_no_block_count_or_schedule_changes_a_bit(head_dim, heads, causal):
    """At head_dim 128 the dense layout is computed by pairs of CTAs, the packed one by single ones."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 300, n, head_dim, generator=g).bfloat16() for n in (heads, 2, 2))
    cu = torch.tensor([0, 300], dtype=torch.int32)
    results = []
    for seed, programs in ((0, 1), (1, 2), (2, 4)):
        with emulated_cute(ARCH, seed=seed, programs=programs):
            results.append(attention(q, k, v, causal=causal, return_lse=True))
            packed = attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal, return_lse=True)
            results.append((packed[0][None], packed[1][None]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_hidden_tiles_are_never_visited():
    """Counted against brute force, for each Q tile of 128 rows apart."""
    rng = np.random.default_rng(0)
    for seed in range(8):
        len_q, len_k = (int(n) for n in rng.integers(1, 600, 2))
        left, right = (int(n) for n in rng.integers(0, 200, 2))
        q, k = torch.randn(1, len_q, 1, 64).bfloat16(), torch.randn(1, len_k, 1, 64).bfloat16()
        _, _, counts = forward(q, k, k, counted=True, window_left=left, window_right=right, seed=seed)
        assert counts is not None
        want = visited_tiles(len_q, len_k, left, right, 128, 128)
        seen = want > 0  # rows without keys are written elsewhere, and not counted
        assert (counts[0, 0, :, 0].numpy()[seen] == want[seen]).all(), (len_q, len_k, left, right)
        assert (counts[0, 0, :, 0].numpy()[~seen] == -1).all()


_PACKED = (
    {"lengths": ((0, 70), (900, 500), (10, 30), (0, 70), (100, 1900), (0, 0), (0, 3), (600, 900)), "tail": (3, 0)},
    {"lengths": ((300, 257),) * 2, "tail": (0, 70)},
)
COVERING = {
    "full-gqa-128": ({"lengths": ((900, 500),)}, {"lengths": ((300, 200),)}),
    "causal-gqa-128": ({"lengths": ((900, 500),)}, {"lengths": ((384, 1184),)}),
    "causal-192": ({"lengths": ((900, 500),)}, {"lengths": ((300, 257),) * 3}, {"lengths": ((384, 1184),)}),
    "causal-gqa-256": ({"lengths": ((900, 500),)}, {"lengths": ((200, 600),) * 3}),
    "varlen-causal-64": _PACKED,
    "varlen-causal-64, taking over": _PACKED,
    "varlen-window-used-gqa-64": (
        {
            "lengths": ((0, 3),) * 3 + ((100, 700),) * 2,
            "used": ((0, 0, 0, 100, 70), (1, 1, 1, 0, 690)),
            "window": (300, 130),
            "tail": (3, 0),
        },
        {
            "lengths": ((200, 700), (140, 600), (20, 1500)),
            "used": ((200, 130, 20), (700, 600, 1500)),
            "window": (130, 20),
        },
    ),
    "window-softcap-sink-64": (
        {"lengths": ((700, 500),), "window": (200, 130)},
        {"lengths": ((600, 640),), "window": (40, 300)},
        {"lengths": ((600, 640),), "window": (300, 40)},
        {"lengths": ((520, 300),) * 3, "window": (300, 500)},
        {"lengths": ((1100, 300),), "window": (60, 40)},
    ),
}
"""Kernels whose every path some case takes: with a left edge alone, for one, no second tile is masked on the right."""


@pytest.mark.parametrize("name", COVERING)
def test_every_barrier_and_memory_instruction_runs(name):
    """In a few cases chosen for it, with rescales on most tiles: a path that no test takes is one that none checks."""
    results = []
    feature, _, variant = name.partition(", ")
    fixed = {"head_dim_v": FEATURES[feature]["head_dim"], **FEATURES[feature]}
    options = {"config": taking_over(), "resident": 2} if variant else {"programs": 2}
    for chosen in COVERING[name]:
        case = Case(**{**fixed, **chosen}, scores="large", rescale_threshold=0.0, seed=3)
        call = case.build("cpu")
        with emulated_cute(ARCH, seed=2, observe=lambda request, result: results.append(result), **options):
            check_forward(attention, call.q, call.k, call.v, **call.options).require()
    missed = set.intersection(*(set(result.not_executed()) for result in results))
    missed = sorted(text for text in missed if "ld.param" not in text)
    assert not missed, "\n".join(missed)


_IMPLIED = (
    "implied by another wait: an item is published when every warp has read the one before it, which a warp does when "
    "it is done with the one before that"
)
ARGUED = {
    ("delete", "bar.warp.sync"): "joins the lanes before one arrives for all; a warp's lanes run together here",
    ("delete", "mbarrier.test_wait"): "always true: it stands there for ptxas alone",
    ("swap", "mbarrier.test_wait"): "as above",
    ("delete", "mbarrier.try_wait"): _IMPLIED,
    ("flip parity", "mbarrier.try_wait"): _IMPLIED,
    ("delete", "cp.async.bulk"): _IMPLIED,
    ("swap", "cp.async.bulk"): _IMPLIED,
    ("swap", "tcgen05.wait::st.sync.aligned <-> bar.warp.sync"): "both still precede the arrival that publishes P",
    ("swap", "mbarrier.arrive"): "the two publish different things, and neither waits for the other",
}
"""Why a broken kernel of `test_broken_synchronisation_is_caught` may be as good as the whole one, by kind and start."""


FAULTY = {
    "one block": (64, ((200, 6), (1000, 1), (1000, 1))),
    "pair": (128, ((300, 6), (1000, 1), (1000, 1))),
    "one Q tile": (256, ((100, 6), (1000, 1), (1000, 1))),
}
"""head_dim; (rows, magnitude) of q, k and v. Two items for the block or pair, eight key tiles so that every ring
wraps, rescales on most tiles."""


def _survivors(name: str, share: int):
    """(faults tried, those not caught) of every `share`-th fault that the unbroken run does not prove idle."""
    g = torch.Generator().manual_seed(7)
    head_dim, shapes = FAULTY[name]
    inputs = Inputs(*((torch.randn(2, n, 1, head_dim, generator=g) * size).bfloat16() for n, size in shapes))
    problem, seeds = make_problem(inputs, rescale_threshold=0.0), (0, 1, 2, 5)
    program, _ = cute_backend.kernel(cute_backend.request_of(problem, inputs, ARCH))
    results = []
    run = functools.partial(cute_backend.forward, problem, inputs, ARCH, programs=1)
    clean = run(observe=lambda request, result: results.append(result))

    def caught(broken) -> bool:
        for seed in seeds:
            try:
                got = run(seed=seed, program=broken, max_steps=80_000)
            except EmulatorError:
                return True
            if not all(torch.equal(a, b) for a, b in zip(clean[:2], got[:2])):
                return True
        return False

    faults = [f for f in synchronisation_faults(program.kernel) if not idle(f, results[0])]
    faults = (faults + list(data_path_faults(program.kernel)))[::share]
    return faults, [fault for fault in faults if not caught(program_with(program.kernel, fault))]


def _check_faults(name: str, share: int) -> None:
    faults, survivors = _survivors(name, share)
    unexplained = [
        str(fault)
        for fault in survivors
        if not any(fault.kind == kind and fault.text.startswith(start) for kind, start in ARGUED)
    ]
    print(f"{name}: {len(faults) - len(survivors)} of {len(faults)} caught")
    assert not unexplained, "\n".join(unexplained)
    if share == 1:
        assert len(survivors) <= 0.1 * len(faults), "\n".join(map(str, survivors))


@pytest.mark.parametrize("name", FAULTY)
def test_a_sample_of_broken_synchronisation_is_caught(name):
    _check_faults(name, 23)


@pytest.mark.faults_full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", FAULTY)
def test_broken_synchronisation_is_caught(name):
    """Every synchronisation instruction deleted, flipped, miscounted or swapped, and descriptors and columns moved."""
    _check_faults(name, 1)
