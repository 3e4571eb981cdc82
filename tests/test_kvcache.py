"""Attention over a KV cache: whatever the layout, it is attention over each sequence's valid keys, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from caches import INT32, Layout, ThroughCache, a_problem, cache_calls, exact_in_fp8, lay_out, problem
from hypothesis import given
from hypothesis import strategies as st
from oracle import oracle

from dispatch import attention_with_kvcache
from fa4_core.checks import check_forward, compare, expected

pytestmark = pytest.mark.serves("kv_cache")


SIDE = st.integers(0, 90)
# Compile-time axes, covered rather than crossed: head dims, group, page, what the cache has, mask and score.
KINDS = {
    "plain-64": {},
    "gqa-128-appended": {"dim": 128, "group": 4, "causal": True, "new": True, "rows": True},
    "gqa-odd-group-page-16": {"group": 3, "page": 16, "causal": True, "new": True},
    "page-1-window": {"page": 1, "group": 2, "window": (SIDE, SIDE)},
    "page-8": {"page": 8, "group": 2, "causal": True},
    "page-24-left": {"page": 24, "window": (SIDE, st.none()), "new": True},
    "leftpad-80x48-softcap-sink": {"dim": 80, "dim_v": 48, "group": 2, "pads": True, "softcap": True, "sink": True,
                                   "causal": True},
    "page-8-leftpad-sink": {"page": 8, "pads": True, "sink": True, "new": True, "causal": True},
    "fp8": {"group": 4, "fp8": True},
    "fp8-page-16-128": {"dim": 128, "group": 2, "page": 16, "fp8": True, "causal": True},
    "256": {"dim": 256, "causal": True},
    "5x7": {"dim": 5, "dim_v": 7, "group": 2, "new": True},
}  # fmt: skip


@pytest.mark.serves("every_kv_cache")  # test_decode.py has it for the kinds that cute serves
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_every_layout_is_attention_over_the_valid_keys(target, dtype, kinds):
    """Within the row budget of float64. What is not a valid key is NaN: page, padding, tail, another row."""

    # Each power of two of query rows is a kernel of its own.
    seqlens_q = (1, 5) if target.compiles else (1, 1, 2, 5, 16)

    lengths = st.integers(0, 20) | st.integers(0, 100 if target.interpreted else 700)

    @given(cache_calls(kinds, lengths, seqlens_q, batch=3, new=5, pads=40, splits=(0, 0, 1, 2, 5)))
    def check(call):
        lengths, seqlen_q, new, layout, options, splits, seed = call
        shape = {name: kinds[name] for name in ("dim", "dim_v", "group") if name in kinds}
        heads_kv = 1 if target.interpreted else 2
        q, k, v, used = problem(target, dtype, lengths, seqlen_q, heads_kv=heads_kv, seed=seed, **shape)
        if kinds.get("sink"):
            options["sink"] = torch.randn(q.shape[2], generator=torch.Generator().manual_seed(seed)).to(q.device)
        run = ThroughCache(target, layout, new, splits)
        if not layout.fp8:
            check_forward(run, q, k, v, seqused_k=used, **options).require()
            return
        out, lse = run(q, k, v, seqused_k=used, **options)
        want = expected(q, *exact_in_fp8(layout, k, v), seqused_k=used, **options)
        assert compare("out", out, want["out"]).passed, compare("out", out, want["out"])
        assert compare("lse", lse, want["lse"]).passed, compare("lse", lse, want["lse"])

    check()


def test_paged_equals_gathered_bit_for_bit_in_any_order_of_pages(target, dtype):
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    q, k, v, used = a_problem(target, dtype)
    whole = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
    pages = (1,) if "every_kv_cache" in target.serves else ()
    for page in (8, *pages) if target.interpreted else (16, 24, 256, *pages):
        for seed in range(2):
            got = ThroughCache(target, Layout(page, seed=seed))(q, k, v, seqused_k=used, causal=True)
            assert all(map(torch.equal, got, whole)), (page, seed)


def test_split_equals_whole(target):
    """In float32, statistics to 1e-6 of themselves: a chunk merged twice, or at another's weight, is far off."""
    # Of 16 bits, weights and results are rounded; a part of the 64 that came twice would be off by some 2^-6.
    rtol, atol = (1e-5, 2e-6) if target.widest == torch.float32 else (2**-9, 2**-11)
    q, k, v, used = a_problem(target, target.widest, lengths=(150, 33, 0) if target.interpreted else (3000, 33, 0))
    for options in ({}, {"causal": True, "window": (100, None)}, {"sink": torch.ones(q.shape[2], device=q.device)}):
        whole, whole_lse = ThroughCache(target, Layout(), num_splits=1)(q, k, v, seqused_k=used, **options)
        for splits in (0, 2, 7, 64):
            out, lse = ThroughCache(target, Layout(), num_splits=splits)(q, k, v, seqused_k=used, **options)
            torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(out, whole, rtol=rtol, atol=atol)


def test_a_row_depends_on_its_own_sequence_alone_bit_for_bit(target, dtype):
    """With the default split: alone, in company, with more room, in other rows of the cache; and the split is there."""
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    lengths = (90, 33, 0, 150) if target.interpreted else (900, 33, 0, 5000)
    q, k, v, used = a_problem(target, dtype, lengths=lengths)
    together = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
    for b in (0, 3):
        n = lengths[b]
        mine = (q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])
        for layout in (Layout(), Layout(room=77), Layout(rows=(3,)), Layout(page=8)):
            alone = ThroughCache(target, layout)(*mine, seqused_k=used[b : b + 1], causal=True)
            assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together)), (b, layout)


def test_the_number_of_teams_changes_no_bit(target, monkeypatch):
    """It follows from the GPU; which chunks meet in a program, and who merges last, follow from it."""
    if target.backend == "reference":
        pytest.skip("the reference has no programs")
    from fa4_cute import decode_launch as cute
    from fa4_triton import decode_launch as triton

    q, k, v, used = a_problem(target, lengths=(150, 33, 0) if target.interpreted else (3000, 33, 0))
    results = []
    for teams in (1, 2, 5) if target.interpreted else (1, 2, 5, 97, 1000):
        for launch in (cute, triton):
            monkeypatch.setattr(launch, "_teams", lambda *_, teams=teams: teams)
        cute._call_of.cache_clear()
        triton.forget()
        results.append(ThroughCache(target, Layout())(q, k, v, seqused_k=used))
    cute._call_of.cache_clear()
    triton.forget()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_sequences_alike_are_dealt_whole_and_merged_by_nobody(target, monkeypatch):
    """Within 5 % of each other, and with work for every program. Equal shares would cut the third sequence here."""
    if target.backend != "triton":
        pytest.skip("a promise of Triton's kernel alone")
    from fa4_triton import decode_launch

    tile = 16 if target.interpreted else 64
    monkeypatch.setattr(decode_launch, "_teams", lambda *_: 2)
    written = []
    for tiles in ((20, 20, 21, 20), (20, 20, 30, 20)):
        parts = []

        def work_space(n_parts, n_arrivals, device, parts=parts):
            parts.append(torch.full((n_parts,), float("nan"), device=device))
            return parts[0], torch.zeros(n_arrivals, dtype=INT32, device=device)

        monkeypatch.setattr(decode_launch, "work_space", work_space)
        decode_launch.forget()
        q, k, v, used = a_problem(target, lengths=[n * tile for n in tiles], heads_kv=2)
        check_forward(ThroughCache(target, Layout()), q, k, v, seqused_k=used).require()
        written.append(bool((parts[0] == parts[0]).any()))
    decode_launch.forget()
    assert written == [False, True]


@pytest.mark.parametrize("page", [0, 16])
def test_chunked_prefill_equals_whole_prefill(target, dtype, page):
    """Rows of the prompt arrive in chunks of any size, down to one: each sees what came before it and itself."""

    def chunked(q, k, v, *, return_lse, causal):
        assert causal
        assert return_lse
        batch, length = k.shape[:2]
        k_cache, v_cache, where = lay_out(Layout(page, room=3), k, v, [0] * batch)
        parts, done = [], 0
        for size in (17, 1, 40, length):
            rows = slice(done, min(done + size, length))
            parts.append(
                target.with_kvcache(
                    q[:, rows], k_cache, v_cache, k[:, rows], v[:, rows], cache_seqlens=done, causal=True,
                    return_lse=True, **where,
                )
            )  # fmt: skip
            done = rows.stop
        outs, lses = zip(*parts)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    length = 75 if target.interpreted else 400
    q, k, v, _ = a_problem(target, dtype, lengths=(length,) * 2, seqlen_q=length)
    check_forward(chunked, q, k, v, causal=True).require()


def test_an_int_length_equals_a_tensor_of_it(target):
    q, k, v, _ = a_problem(target, lengths=(50, 50))
    k_cache, v_cache, _ = lay_out(Layout(room=9), k, v, [50, 50])
    tensor = torch.tensor([50, 50], dtype=INT32, device=q.device)
    a, b = (
        attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n, backend=target.backend, return_lse=True)
        for n in (50, tensor)
    )
    if not target.gathers:
        assert all(map(torch.equal, a, b))
    check_forward(lambda *_, **__: a, q, k, v).require()


def test_out_is_written_in_place_at_any_stride(target):
    q, k, v, used = a_problem(target)
    want = ThroughCache(target, Layout())(q, k, v, seqused_k=used, return_lse=False)
    for out in (torch.empty_like(q), torch.empty_like(q.transpose(1, 2)).transpose(1, 2)):
        got = ThroughCache(target, Layout())(q, k, v, seqused_k=used, return_lse=False, out=out)
        assert got is out
        assert torch.equal(out, want)


@pytest.mark.parametrize("seqlen_q", [0, 1, 2])
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_dimensions_and_rows_without_a_key(target, batch, seqlen_q):
    """No key: 0 and -inf, or the sink's logit."""
    dim = target.cache_dim
    q = torch.randn(batch, seqlen_q, 2, dim, device=target.device, dtype=torch.float16)
    cache = torch.full((batch, 20, 2, dim), math.nan, device=target.device, dtype=torch.float16)
    sink = torch.tensor([0.5, -math.inf], device=target.device)
    for table in (None, torch.zeros(batch, 0, dtype=INT32, device=target.device)):
        if table is not None:
            cache = cache.new_zeros(1, 8, 2, dim)
        for options in ({}, {"sink": sink}):
            out, lse = attention_with_kvcache(
                q, cache, cache.clone(), cache_seqlens=0, page_table=table, causal=True, return_lse=True,
                backend=target.backend, **options,
            )  # fmt: skip
            assert out.shape == q.shape
            assert lse.shape == (batch, 2, seqlen_q)
            assert (out == 0).all()
            want = sink[None, :, None].expand_as(lse) if options else torch.full_like(lse, -math.inf)
            torch.testing.assert_close(lse, want)


def test_a_nan_key_or_value_reaches_its_readers_and_no_one_else(target):
    """Through the merge, too: a NaN that the weights of the chunks dropped would be plausible numbers."""
    length = 150 if target.interpreted else 3000
    q, k, v, used = a_problem(target, lengths=(length, length), seqlen_q=2)
    clean, clean_lse = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
    group = q.shape[2] // k.shape[2]
    for tensor in (k, v):
        for at in (0, length // 2, length - 1):
            kept = tensor[1, at, 0].clone()
            tensor[1, at, 0] = math.nan
            out, lse = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
            tensor[1, at, 0] = kept
            readers = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
            readers[1, (0 if at < length - 1 else 1) :, :group] = True
            assert out[readers].isnan().all()
            if tensor is k:
                assert torch.equal(out[~readers], clean[~readers])
                assert torch.equal(lse.transpose(1, 2).isnan(), readers)
            else:
                # A value's NaN may also show in rows of its sequence and head that see the tile.
                readers[1, :, :group] = True
                assert torch.equal(out[~readers], clean[~readers])
                assert torch.equal(lse, clean_lse)


@pytest.mark.serves("every_kv_cache")
@pytest.mark.parametrize("kinds", [{}, {"causal": True, "group": 3}, {"window": (30, 4), "softcap": 5.0, "sink": True}])
@pytest.mark.parametrize("varlen", [False, True])
def test_attention_on_pages_equals_attention_on_gathered_keys(target, dtype, varlen, kinds):
    """Within the budget: prompts of any length, some without keys, some longer than their keys, NaN elsewhere."""
    options = {name: value for name, value in kinds.items() if name != "group"}
    lengths_k = (70, 0, 33) if target.interpreted else (500, 0, 33, 130)
    lengths_q = (40, 5, 60) if target.interpreted else (300, 5, 60, 1)
    for page in (8,) if target.interpreted else (16,) if dtype == torch.bfloat16 else (1, 24, 256):
        q, k, v, used = a_problem(
            target, dtype, lengths=lengths_k, seqlen_q=max(lengths_q), group=kinds.get("group", 1)
        )
        if kinds.get("sink"):
            options["sink"] = torch.linspace(-1, 1, q.shape[2], device=q.device)
        k_pages, v_pages, where = lay_out(Layout(page), k, v, lengths_k)
        where = {"page_table": where["page_table"], "seqused_k": used}
        used_q = torch.tensor(lengths_q, dtype=INT32, device=q.device)
        want = expected(q, k, v, seqused_q=used_q, seqused_k=used, **options)
        if not varlen:
            out, lse = target(q, k_pages, v_pages, return_lse=True, seqused_q=used_q, **where, **options)
        else:
            cu = torch.tensor([0, *lengths_q]).cumsum(0).to(q.device, INT32)
            packed = torch.cat([q[b, :n] for b, n in enumerate(lengths_q)])
            packed = torch.cat([packed, torch.full_like(packed[:3], math.nan)])  # rows past the last sequence
            packed_out, packed_lse = target(
                packed, k_pages, v_pages, return_lse=True, cu_seqlens_q=cu, **where, **options
            )
            assert (packed_out[-3:] == 0).all()
            assert (packed_lse[:, -3:] == -math.inf).all()
            out, lse = torch.zeros_like(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, device=q.device)
            for b, n in enumerate(lengths_q):
                out[b, :n] = packed_out[cu[b] : cu[b + 1]]
                lse[b, :, :n] = packed_lse[:, cu[b] : cu[b + 1]]
        for name, got in (("out", out), ("lse", lse)):
            assert compare(name, got, want[name]).passed, (page, str(compare(name, got, want[name])))


@pytest.mark.serves("every_kv_cache")
def test_a_packed_prompt_on_pages_is_the_same_bits_in_any_company(target):
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    q, k, v, used = a_problem(target, lengths=(70, 33), seqlen_q=30)
    k_pages, v_pages, where = lay_out(Layout(8), k, v, used.tolist())
    table = where["page_table"]
    cu = torch.tensor([0, 30, 60], dtype=INT32, device=q.device)
    both = target(q.flatten(0, 1), k_pages, v_pages, causal=True, cu_seqlens_q=cu, seqused_k=used, page_table=table)
    for b in range(2):
        alone = target(
            q[b], k_pages, v_pages, causal=True, cu_seqlens_q=cu[:2], seqused_k=used[b : b + 1],
            page_table=table[b : b + 1],
        )  # fmt: skip
        assert torch.equal(alone, both[30 * b : 30 * b + 30])


def test_the_reference_is_the_oracle():
    """The second witness of these tests, once against the tests' own truth, without the checks' code."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, h, 16, generator=g, dtype=torch.float64) for n, h in ((3, 4), (20, 2), (20, 2)))
    k_cache, v_cache, where = lay_out(Layout(page=8), k, v, [18])
    got = attention_with_kvcache(
        q, k_cache, v_cache, k[:, 18:], v[:, 18:], cache_seqlens=18, causal=True, return_lse=True, **where
    )
    for a, b in zip(got, oracle(q, k, v, causal=True)):
        torch.testing.assert_close(a, b)
