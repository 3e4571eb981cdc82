"""The CuTe decode kernel behind `attention_with_kvcache`: what it serves and, on a GPU, its properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from caches import INT32, Layout, ThroughCache, cache_calls, index, problem, rows
from hypothesis import given
from hypothesis import strategies as st
from targets import CACHE_CALLS, SERVED, TARGETS

from dispatch import attention_with_kvcache
from fa4_core import kvcache, ops
from fa4_core.checks import check_forward
from fa4_core.kvcache import CacheInputs, CacheOptions, check_cache_signature
from fa4_core.problem import Kinds, signature_of
from fa4_cute import decode_config

CUTE = [target for target in TARGETS if target.backend == "cute"]
on_a_gpu = pytest.mark.parametrize(
    "cute",
    [target.parameter() for target in CUTE]
    or [pytest.param(None, marks=pytest.mark.skip(reason="needs a GPU that the cute backend serves"))],
)


@pytest.fixture(autouse=True)
def nothing_elsewhere():
    """Every call here is one that the backend serves, and runs on it."""
    yield
    assert set(CACHE_CALLS) <= {SERVED}


SIDE = st.integers(0, 90)
# Compile-time axes, covered rather than crossed. Query rows of a KV head: up to 16, rounded up to 4, 8 or 16.
KINDS = {
    "plain-64": {},
    "gqa-128-appended": {"dim": 128, "group": 4, "causal": True, "new": True, "rows": True},
    "odd-group-page-16": {"group": 3, "page": 16, "causal": True, "new": True},
    "page-24-left": {"page": 24, "window": (SIDE, st.none()), "group": 2},
    "leftpad-192x128-softcap-sink": {"dim": 192, "dim_v": 128, "group": 2, "pads": True, "softcap": True, "sink": True,
                                     "causal": True},
    "page-256-window-sink": {"page": 256, "group": 8, "window": (SIDE, SIDE), "sink": True},
    "192-of-few-rows": {"dim": 192},
    "256": {"dim": 256, "causal": True},
}  # fmt: skip


@on_a_gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_every_layout_is_attention_over_the_valid_keys(cute, half, kinds):
    """Within the row budget of float64. What is not a valid key is NaN: page, padding, tail, another row."""

    lengths = st.integers(0, 20) | st.integers(0, 700) | st.sampled_from((63, 64, 65, 3000))
    seqlens_q = (1, min(5, 16 // kinds.get("group", 1)))

    @given(cache_calls(kinds, lengths, seqlens_q, batch=5, new=3, pads=90, splits=(0, 0, 1, 2, 5, 64)))
    def check(call):
        lengths, seqlen_q, new, layout, options, splits, seed = call
        shape = {name: kinds[name] for name in ("dim", "dim_v", "group") if name in kinds}
        q, k, v, used = problem(cute, half, lengths, seqlen_q, heads_kv=2, seed=seed, **shape)
        if kinds.get("sink"):
            options["sink"] = torch.randn(q.shape[2], generator=torch.Generator().manual_seed(seed)).to(q.device)
        check_forward(ThroughCache(cute, layout, new, splits), q, k, v, seqused_k=used, **options).require()

    check()


@on_a_gpu
@pytest.mark.parametrize("group", [1, 8])
def test_a_row_depends_on_its_own_sequence_alone_bit_for_bit(cute, group):
    """Alone, in company, with more room, in other rows of the cache, on pages of any order."""
    lengths = (900, 33, 0, 70000, 5000)
    q, k, v, used = problem(cute, torch.bfloat16, lengths, 2, group=group, dim=128)
    together = ThroughCache(cute, Layout())(q, k, v, seqused_k=used, causal=True)
    for page in (8, 16, 24, 256):
        got = ThroughCache(cute, Layout(page, seed=page))(q, k, v, seqused_k=used, causal=True)
        assert all(map(torch.equal, got, together)), page
    for b in (0, 3, 4):
        mine = (q[b : b + 1], k[b : b + 1, : lengths[b]], v[b : b + 1, : lengths[b]])
        for layout in (Layout(), Layout(room=77), Layout(rows=(3,)), Layout(page=16)):
            alone = ThroughCache(cute, layout)(*mine, seqused_k=used[b : b + 1], causal=True)
            assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together)), (b, layout)


@on_a_gpu
def test_long_sequences_give_the_same_bits_every_time(cute):
    """Hundreds of laps of the ring of tiles in every block, whose copies end in any order; float64's result, too."""
    q, k, v, used = problem(cute, torch.bfloat16, (65000, 40001, 9), 1, heads_kv=8, group=4, dim=128)
    run = ThroughCache(cute, Layout())
    first = run(q, k, v, seqused_k=used)
    check_forward(lambda *a, **b: first, q, k, v, seqused_k=used).require()
    for _ in range(50):
        assert all(map(torch.equal, run(q, k, v, seqused_k=used), first))


@on_a_gpu
def test_graphs_of_one_stream_run_beside_its_own_calls(cute):
    """Lengths change between replays; each captured launch has counters of its own."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(3, 1, 8, 128, device="cuda", generator=g).bfloat16()
    k, v = (torch.randn(3, 9000, 2, 128, device="cuda", generator=g).bfloat16() for _ in range(2))
    seqlens = torch.tensor([9000, 5, 4000], dtype=INT32, device="cuda")

    def step():
        return attention_with_kvcache(q, k, v, cache_seqlens=seqlens, backend="cute")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [step() for _ in range(3)]
    side = torch.cuda.Stream()
    for lengths in ([9000, 5, 4000], [1, 8999, 64], [0, 700, 2500]):
        seqlens.copy_(torch.tensor(lengths, dtype=INT32))
        want = step()
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(10):
            with torch.cuda.stream(side):
                graph.replay()
            assert torch.equal(step(), want)
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in captured)


@on_a_gpu
def test_auto_takes_it_where_it_serves_and_triton_elsewhere(cute):
    def backend(**changed):
        cache = torch.zeros(2, 99, 2, 64, dtype=torch.bfloat16, device="cuda")
        tensors = {"q": cache[:, :1].repeat(1, 1, 4, 1), "k_cache": cache, "v_cache": cache}
        inputs = CacheInputs(**{**tensors, **changed})
        call = kvcache._call_of(signature_of((*inputs, None)), CacheOptions(), kvcache._are_aligned(inputs, None))
        return call.backend.name

    assert backend() == "cute"
    assert backend(q=torch.zeros(2, 5, 8, 64, dtype=torch.bfloat16, device="cuda")) == "triton"  # 20 rows a KV head
    assert backend(q=torch.zeros(2 * 8 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(2, 1, 8, 64)) == "triton"


def lacks(options=CacheOptions(), aligned=True, **changed):  # noqa: B008
    """What the kernel lacks for a call of 4 query heads on 2 KV heads, with arguments changed."""
    caches = {"k_cache": rows(2, 9, 2, 64), "v_cache": rows(2, 9, 2, 64)}
    tensors = {"q": rows(2, 1, 4, 64), **caches, "cache_seqlens": index(3, 7), **changed}
    tensors = {
        name: t.bfloat16() if t.is_floating_point() and t.element_size() == 4 else t for name, t in tensors.items()
    }
    signature = signature_of((*CacheInputs(**tensors), None))
    return decode_config.missing(check_cache_signature(signature, options, aligned))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"k_cache": rows(5, 8, 2, 64), "v_cache": rows(5, 8, 2, 64), "page_table": index([0, 3], [2, 4])}, None),
        ({"cache_leftpad": index(0, 1), "cache_batch_idx": index(1, 0)}, None),
        ({"q": rows(2, 8, 4, 64)}, None),
        ({"q": rows(2, 9, 4, 64)}, "18 query rows"),
        ({"q": rows(2, 1, 4, 80), "k_cache": rows(2, 9, 2, 80)}, "head_dim=80"),
        ({name: rows(2, 9, 2, 64, dtype=torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}, "float8_e4m3fn"),
        ({"k_cache": rows(5, 1, 2, 64), "v_cache": rows(5, 1, 2, 64), "page_table": index([0], [2])}, "pages of 1"),
        ({"k_cache": rows(5, 8, 2, 64), "v_cache": rows(5, 8, 2, 64), "page_table": index([0], [2]),
          "cache_leftpad": index(0, 1)}, "cache_leftpad"),
        ({"k_cache": rows(2, 9, 2, 65, dtype=torch.bfloat16)[..., :64]}, "strides"),
        ({"aligned": False}, "addresses"),
        ({"k_cache": rows(5, 256, 2, 64), "v_cache": rows(5, 256, 2, 64),
          "page_table": torch.zeros(2, 2**22, dtype=INT32)}, "2 caches of 1073741824 rows"),
        ({"k_cache": rows(2, 0, 2, 64), "v_cache": rows(2, 0, 2, 64)}, None),
    ],
)  # fmt: skip
def test_what_it_lacks_it_says(changed, why):
    """Then another backend runs, or the caller who named this one reads why."""
    found = lacks(**changed)
    assert (not found) if why is None else (len(found) == 1 and why in found[0]), found


@pytest.mark.parametrize("dims", list(itertools.product((64, 128, 192, 256), repeat=2)))
@pytest.mark.parametrize("few", [4, 8, 16])
def test_every_configuration_covers_every_column_and_row(few, dims):
    """By one thread each, and fits the multiprocessor."""
    head_dim, head_dim_v = dims
    kinds = Kinds(
        dtype=torch.bfloat16, head_dim=head_dim, head_dim_v=head_dim_v, group=1, varlen=False, seqused_q=False,
        seqused_k=True, paged=True, window_left=False, window_right=False, softcap=False, sink=False, kv_cache=True,
    )  # fmt: skip
    for page in (0, 8, 24, 256):
        config = decode_config.config_for(decode_config.CacheKinds(kinds, few, page, True, False, False, False))
        columns = [
            4 * thread + 4 * config.row_threads * n + i
            for thread in range(config.row_threads) for n in range(config.columns // 4) for i in range(4)
        ]  # fmt: skip
        assert sorted(columns) == list(range(head_dim_v))
        assert 32 * decode_config.WARPS // config.row_threads >= few
        assert config.tile_n % config.box == 0
        assert config.shared_bytes <= decode_config.SHARED_LIMIT


def test_the_chooser_hears_of_the_call(monkeypatch):
    """Whether a backend serves depends on what only the call knows: the page, the cache's dtype, the rows."""
    seen = []
    backend = ops.backend_of

    def heard(problem, name, cache=None):
        seen.append(cache)
        return backend(problem, name, cache)

    monkeypatch.setattr(ops, "backend_of", heard)
    q, cache = torch.randn(1, 1, 2, 16), torch.randn(1, 37, 1, 16)
    out = attention_with_kvcache(q, cache, cache, cache_seqlens=5, num_splits=3, softmax_scale=0.1234)
    assert math.isfinite(out.sum())
    assert [problem.num_splits for problem in seen] == [3]
