"""Attention over a KV cache: whatever the layout, it is attention over each sequence's valid keys, against float64.

A drawn problem is a padded batch with used lengths; each test lays it out as a cache (contiguous, padded on the left,
in other rows, in pages of any order, as fp8), everything that is no valid key NaN, and asks for the same result.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import oracle
from torch.multiprocessing.reductions import StorageWeakRef

from dispatch import attention_with_kvcache
from fa4_core import kvcache
from fa4_core import problem as problem_module
from fa4_core.checks import check_forward, compare, expected

pytestmark = pytest.mark.serves("kv_cache")

FP8 = torch.float8_e4m3fn
INT32 = torch.int32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")


@dataclass(frozen=True)
class Layout:
    """How a batch lies in a cache. `page` 0: contiguous; `pads` and `rows` are cache_leftpad and cache_batch_idx."""

    page: int = 0
    room: int = 0
    """Rows beyond the longest sequence."""
    pads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    fp8: bool = False
    seed: int = 0


def descales(layout, k, v):
    """(k_descale (B, Hkv), v_descale (Hkv,)), or None for both."""
    if not layout.fp8:
        return None, None
    g = torch.Generator().manual_seed(layout.seed)
    batch, _, heads, _ = k.shape
    return (torch.rand(batch, heads, generator=g) + 0.5).to(k.device), (torch.rand(heads, generator=g) + 0.5).to(
        v.device
    )


def lay_out(layout, k, v, lengths):
    """The caches with the first `lengths` rows of k and v in them and NaN elsewhere; the options that say where."""
    batch, longest = k.shape[:2]
    pads = layout.pads or (0,) * batch
    capacity = longest + layout.room + max(pads, default=0)
    g = torch.Generator().manual_seed(layout.seed)
    k_descale, v_descale = descales(layout, k, v)
    options = {"k_descale": k_descale, "v_descale": v_descale}
    if layout.pads is not None:
        options["cache_leftpad"] = torch.tensor(pads, dtype=INT32, device=k.device)
    if layout.page:
        pages = -(-capacity // layout.page)
        table = torch.randperm(batch * pages + 3, generator=g)[: batch * pages].view(batch, pages)
        shape = (batch * pages + 3, layout.page)
        options["page_table"] = table.to(k.device, INT32)
    else:
        table = torch.tensor(layout.rows or range(batch))[:, None]
        shape = (int(table.max()) + 2 if batch and layout.rows else batch, capacity)
        if layout.rows:
            options["cache_batch_idx"] = table[:, 0].to(k.device, INT32)
    caches = []
    for rows, descale in ((k, k_descale), (v, v_descale)):
        cache = torch.full((*shape, *rows.shape[2:]), math.nan, dtype=rows.dtype, device=rows.device)
        if layout.fp8:
            rows = (rows.float() / (descale[:, None, :, None] if descale.dim() == 2 else descale[:, None])).to(FP8)
            cache = cache.to(FP8)
        for b in range(batch):
            at = pads[b] + torch.arange(lengths[b])
            place = (table[b, at // shape[1]].to(k.device), (at % shape[1]).to(k.device))
            if layout.fp8:  # whose elements cannot be assigned by index
                cache.view(torch.uint8)[place] = rows[b, : lengths[b]].view(torch.uint8)
            else:
                cache[place] = rows[b, : lengths[b]]
        caches.append(cache)
    return *caches, options


def same_bits(a, b):
    """Equal, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class ThroughCache:
    """Called like `attention` with seqused_k: lays k and v out as a cache, appends the last `new` rows, attends."""

    target: object
    layout: Layout
    new: int = 0
    num_splits: int = 0

    def __call__(self, q, k, v, *, seqused_k, return_lse=True, **options):
        lengths = seqused_k.tolist()
        kept = [n - self.new for n in lengths]
        k_cache, v_cache, where = lay_out(self.layout, k, v, kept)
        pads = self.layout.pads or (0,) * len(kept)
        seqlens = torch.tensor([n + pad for n, pad in zip(kept, pads)], dtype=INT32, device=q.device)
        new = {}
        if self.new:
            at = torch.tensor(kept)[:, None] + torch.arange(self.new)
            new = {name: t[torch.arange(len(kept))[:, None], at] for name, t in (("k", k), ("v", v))}
        return attention_with_kvcache(
            q, k_cache, v_cache, **new, cache_seqlens=seqlens, backend=self.target.backend, num_splits=self.num_splits,
            return_lse=return_lse, **where, **options,
        )  # fmt: skip


def problem(target, dtype, lengths, seqlen_q, *, heads_kv=2, group=1, dim=64, dim_v=None, seed=0, fp8=False, pads=None):
    """(q, k, v, seqused_k): a padded batch, NaN past each length."""
    g = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths, default=0)
    q = torch.randn(batch, seqlen_q, heads_kv * group, dim, generator=g)
    k = torch.randn(batch, longest, heads_kv, dim, generator=g)
    v = torch.randn(batch, longest, heads_kv, dim_v or dim, generator=g)
    q, k, v = (t.to(target.device, dtype) for t in (q, k, v))
    for b, n in enumerate(lengths):
        k[b, n:] = v[b, n:] = math.nan
    return q, k, v, torch.tensor(lengths, dtype=INT32, device=target.device)


def exact_in_fp8(layout, k, v):
    """k and v as an fp8 cache of this layout stands for them, in float32."""
    results = []
    for rows, descale in zip((k, v), descales(layout, k, v)):
        factor = descale[:, None, :, None] if descale.dim() == 2 else descale[:, None]
        results.append((rows.float() / factor).to(FP8).float() * factor)
    return results


SIDE = st.integers(0, 90)
# Compile-time axes, covered rather than crossed: head dims, group, page, what the cache has, mask and score.
KINDS = {
    "plain-64": {},
    "gqa-128-appended": {"dim": 128, "group": 4, "causal": True, "new": True, "rows": True},
    "gqa-odd-group-page-16": {"group": 3, "page": 16, "causal": True, "new": True},
    "page-1-window": {"page": 1, "group": 2, "window": (SIDE, SIDE)},
    "page-24-left": {"page": 24, "window": (SIDE, st.none()), "new": True},
    "leftpad-80x48-softcap-sink": {"dim": 80, "dim_v": 48, "group": 2, "pads": True, "softcap": True, "sink": True,
                                   "causal": True},
    "page-8-leftpad-sink": {"page": 8, "pads": True, "sink": True, "new": True, "causal": True},
    "fp8": {"group": 4, "fp8": True},
    "fp8-page-16-128": {"dim": 128, "group": 2, "page": 16, "fp8": True, "causal": True},
    "256": {"dim": 256, "causal": True},
    "5x7": {"dim": 5, "dim_v": 7, "group": 2, "new": True},
}  # fmt: skip


@st.composite
def calls(draw, kinds, longest, seqlens_q):
    """(lengths, seqlen_q, appended, layout, options, splits, seed) of a kind."""
    batch = draw(st.integers(1, 3))
    new = draw(st.integers(1, 5)) if kinds.get("new") else 0
    lengths = draw(st.lists(st.integers(0, 20) | st.integers(0, longest), min_size=batch, max_size=batch))
    pads = draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)) if kinds.get("pads") else None
    rows = draw(st.permutations(range(batch + 2))) if kinds.get("rows") else None
    options = {"causal": kinds.get("causal", False)}
    if "window" in kinds:
        options["window"] = tuple(draw(side) for side in kinds["window"])
    if kinds.get("softcap"):
        options["softcap"] = draw(st.sampled_from((0.5, 5.0, 50.0)))
    layout = Layout(
        page=kinds.get("page", 0),
        room=draw(st.integers(0, 70)),
        pads=pads and tuple(pads),
        rows=rows and tuple(rows[:batch]),
        fp8=kinds.get("fp8", False),
        seed=draw(st.integers(0, 999)),
    )
    seqlen_q = draw(st.sampled_from(seqlens_q))
    splits = draw(st.sampled_from((0, 0, 1, 2, 5)))
    return [n + new for n in lengths], seqlen_q, new, layout, options, splits, draw(st.integers(0, 999))


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_every_layout_is_attention_over_the_valid_keys(target, dtype, kinds):
    """Within the row budget of float64. What is not a valid key is NaN: page, padding, tail, another row."""

    # Each power of two of query rows is a kernel of its own.
    seqlens_q = (1, 5) if target.compiles else (1, 1, 2, 5, 16)

    @given(calls(kinds, 100 if target.interpreted else 700, seqlens_q))
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


def a_problem(target, dtype=torch.float16, lengths=(70, 33, 0), seqlen_q=3, **changed):
    changed = {"heads_kv": 1 if target.interpreted else 2, "group": 2, **changed}
    return problem(target, dtype, list(lengths), seqlen_q, **changed)


def test_paged_equals_gathered_bit_for_bit_in_any_order_of_pages(target, dtype):
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    q, k, v, used = a_problem(target, dtype)
    whole = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
    for page in (8, 1) if target.interpreted else (1, 16, 24, 256):
        for seed in range(2):
            got = ThroughCache(target, Layout(page, seed=seed))(q, k, v, seqused_k=used, causal=True)
            assert all(map(torch.equal, got, whole)), (page, seed)


def test_append_then_attend_equals_attention_over_the_concatenation(target, dtype):
    """And the cache then holds the appended rows, at their place, and nothing else has changed."""
    q, k, v, used = a_problem(target, dtype, lengths=(70, 33, 3))
    whole = ThroughCache(target, Layout())(q, k, v, seqused_k=used, causal=True)
    for layout in (Layout(room=5), Layout(page=16, room=40), Layout(pads=(3, 0, 9)), Layout(rows=(4, 0, 2))):
        k_cache, v_cache, where = lay_out(layout, k, v, [n - 3 for n in used.tolist()])
        k_full, v_full, _ = lay_out(layout, k, v, used.tolist())
        at = (used.cpu() - 3)[:, None] + torch.arange(3)
        k_new, v_new = (t[torch.arange(3)[:, None], at] for t in (k, v))
        seqlens = used - 3 + where.get("cache_leftpad", 0)
        got = attention_with_kvcache(
            q, k_cache, v_cache, k_new, v_new, cache_seqlens=seqlens, causal=True, return_lse=True,
            backend=target.backend, **where,
        )  # fmt: skip
        if not target.gathers:
            assert all(map(torch.equal, got, whole)), layout
        assert same_bits(k_cache, k_full), layout
        assert same_bits(v_cache, v_full), layout


def test_split_equals_whole(target):
    """In float32, statistics to 1e-6 of themselves: a chunk merged twice, or at another's weight, is far off."""
    q, k, v, used = a_problem(target, torch.float32, lengths=(150, 33, 0) if target.interpreted else (3000, 33, 0))
    for options in ({}, {"causal": True, "window": (100, None)}, {"sink": torch.ones(q.shape[2], device=q.device)}):
        whole, whole_lse = ThroughCache(target, Layout(), num_splits=1)(q, k, v, seqused_k=used, **options)
        for splits in (0, 2, 7, 64):
            out, lse = ThroughCache(target, Layout(), num_splits=splits)(q, k, v, seqused_k=used, **options)
            torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(out, whole, rtol=1e-5, atol=2e-6)


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


def test_the_number_of_programs_changes_no_bit(target, monkeypatch):
    """It follows from the GPU; which chunks meet in a program, and who merges last, follow from it."""
    if target.backend != "triton":
        pytest.skip("the reference has no programs")
    from fa4_triton import decode_launch

    q, k, v, used = a_problem(target, lengths=(150, 33, 0) if target.interpreted else (3000, 33, 0))
    results = []
    for programs in (1, 2, 5) if target.interpreted else (1, 2, 5, 97, 1000):
        monkeypatch.setattr(decode_launch, "_programs", lambda device, share, programs=programs: programs)
        decode_launch._call_of.cache_clear()
        results.append(ThroughCache(target, Layout())(q, k, v, seqused_k=used))
    decode_launch._call_of.cache_clear()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


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
                attention_with_kvcache(
                    q[:, rows], k_cache, v_cache, k[:, rows], v[:, rows], cache_seqlens=done, causal=True,
                    return_lse=True, backend=target.backend, **where,
                )
            )  # fmt: skip
            done = rows.stop
        outs, lses = zip(*parts)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    length = 75 if target.interpreted else 400
    q, k, v, _ = a_problem(target, dtype, lengths=(length,) * 2, seqlen_q=length)
    check_forward(chunked, q, k, v, causal=True).require()


def rotated(x, cos, sin, positions, interleaved):
    """The rotary embedding as a product of complex numbers, in float64; positions (batch, rows)."""
    half = cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[positions][:, :, None]
    part = x[..., : 2 * half].double()
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, x[..., 2 * half :].double()], -1).to(x.dtype)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary_turns_the_new_rows_and_the_query_at_their_positions(target, dtype, causal, rotary_dim, interleaved):
    """A row's position is its place in the cache, padding counted; without a mask all query rows stand at the first.

    As flash-attn has it (2 and 3): a cache that one of them filled is read by the other.
    """
    lengths, pads, new = (30, 7), (4, 0), 3
    q, k, v, _ = a_problem(target, dtype, lengths=(33, 10), seqlen_q=3)
    k[1, 10:] = v[1, 10:] = 0.0
    angles = torch.rand(50, rotary_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
    cos, sin = (f(angles).to(q.device, torch.float32) for f in (torch.cos, torch.sin))
    start = torch.tensor(lengths, device=q.device)[:, None]
    seqlens = torch.tensor([n + pad for n, pad in zip(lengths, pads)], dtype=INT32, device=q.device)
    steps = torch.arange(new, device=q.device)
    rows = torch.arange(2, device=q.device)[:, None]
    k_new, v_new = k[rows, start + steps], v[rows, start + steps]
    at = seqlens[:, None] + steps
    for layout in (Layout(pads=pads), Layout(page=8, pads=pads)):
        k_cache, v_cache, where = lay_out(layout, k, v, lengths)
        out, lse = attention_with_kvcache(
            q, k_cache, v_cache, k_new, v_new, cache_seqlens=seqlens, rotary_cos=cos, rotary_sin=sin,
            rotary_interleaved=interleaved, causal=causal, return_lse=True, backend=target.backend, **where,
        )  # fmt: skip
        turned = k.clone()
        turned[rows, start + steps] = rotated(k_new, cos, sin, at, interleaved)
        q_turned = rotated(q, cos, sin, at if causal else at[:, :1].expand_as(at), interleaved)
        used = torch.tensor([n + new for n in lengths], dtype=INT32, device=q.device)
        want = expected(q_turned, turned, v, seqused_k=used, causal=causal)
        # Rows rotated in float32 and float64 round to neighbours: a unit in the last place of q or k moves a score.
        slack = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
        assert (out - want["out"].value).abs().max() < slack
        assert (lse - want["lse"].value).abs().max() < 4 * slack
        k_want, _, _ = lay_out(layout, turned, v, used.tolist())
        torch.testing.assert_close(k_cache, k_want, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("seqlen_q", [0, 3])
def test_rotary_turns_the_query_where_no_row_is_appended(target, seqlen_q):
    """k and v of 0 rows: the query stands at the positions behind the cache, and is as rotated as ever."""
    q, k, v, used = a_problem(target, lengths=(30, 7), seqlen_q=seqlen_q)
    angles = torch.rand(50, 16, generator=torch.Generator().manual_seed(1)) * 6.3
    cos, sin = (f(angles).to(q.device, torch.float32) for f in (torch.cos, torch.sin))
    k_cache, v_cache, _ = lay_out(Layout(room=9), k, v, [30, 7])
    before = k_cache.clone()
    out = attention_with_kvcache(
        q, k_cache, v_cache, k[:, :0], v[:, :0], cache_seqlens=used, rotary_cos=cos, rotary_sin=sin, causal=True,
        backend=target.backend,
    )  # fmt: skip
    at = used[:, None] + torch.arange(seqlen_q, device=q.device)
    want = expected(rotated(q, cos, sin, at, True), k, v, seqused_k=used, causal=True)["out"]
    torch.testing.assert_close(out.double(), want.value.double(), rtol=0, atol=3e-3)
    assert same_bits(k_cache, before)


def test_rotary_positions_past_the_tables_are_the_last_one(target, monkeypatch):
    """Where nobody reads the lengths: no stray read, and the same as with the last rows repeated."""
    unchecked(target, monkeypatch)
    q, k, v, used = a_problem(target, lengths=(30, 7), seqlen_q=3)
    angles = torch.rand(9, 8, generator=torch.Generator().manual_seed(1)).to(q.device)
    results = []
    for table in (angles, torch.cat([angles, angles[-1:].expand(40, -1)])):
        caches = lay_out(Layout(room=9), k, v, [30, 7])[:2]
        out = attention_with_kvcache(
            q, *caches, k[:, :2], v[:, :2], cache_seqlens=used, rotary_cos=table.cos(), rotary_sin=table.sin(),
            causal=True, backend=target.backend,
        )  # fmt: skip
        results.append((out, *caches))
    assert all(map(same_bits, *results))


def every_value(device):
    """float32 values at, beside and between all e4m3 ones, beyond their range, and NaN."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    values = bytes_.view(FP8).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, s * math.inf)) for s in (1, -1)]
    extremes = torch.tensor([448.0, 449.0, 463.9, 464.0, 500.0, 1e6, 3e38, math.inf, -math.inf, -448.0, -1e9, math.nan])
    tiny = torch.tensor([0.0, -0.0, 1e-45, 2.0**-10, -(2.0**-10), 2.0**-11, 1e-30])
    return torch.cat([values, middles, *beside, extremes, tiny]).to(device)


def test_fp8_append_rounds_to_nearest_even_saturates_and_keeps_nan(target):
    """Byte for byte what a saturating conversion gives, for every value of e4m3, the middles, and beyond."""
    values = every_value(target.device)
    values = torch.cat([values, values.new_zeros(-len(values) % 64)])
    rows = values.view(1, -1, 1, 64)
    cache = torch.zeros(1, rows.shape[1], 1, 64, dtype=FP8, device=target.device)
    caches = [cache.clone(), cache.clone()]
    attention_with_kvcache(rows[:, :1], *caches, rows, rows, cache_seqlens=0, backend=target.backend)
    want = values.cpu().clamp(-448, 448).to(FP8).view(torch.uint8)
    for got in caches:
        got = got.flatten().cpu().view(torch.uint8)
        assert torch.equal(got & 0x7F, want & 0x7F)
        nan = (want & 0x7F) == 0x7F  # whose sign is nobody's promise
        assert torch.equal(got[~nan], want[~nan])


def test_fp8_append_divides_by_the_descale(target, dtype):
    layout = Layout(fp8=True, page=16, seed=3)
    q, k, v, used = a_problem(target, dtype, lengths=(40, 9))
    k_cache, v_cache, where = lay_out(layout, k, v, [37, 6])
    k_full, v_full, _ = lay_out(layout, k, v, [40, 9])
    rows, at = torch.arange(2)[:, None], torch.tensor([[37, 38, 39], [6, 7, 8]])
    attention_with_kvcache(
        q, k_cache, v_cache, k[rows, at], v[rows, at], cache_seqlens=used - 3, backend=target.backend, **where
    )
    assert same_bits(k_cache, k_full)
    assert same_bits(v_cache, v_full)


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


def test_a_length_that_grows_with_every_step_prepares_nothing_anew(target):
    """Neither a problem nor a launch: a step would cost a hundred microseconds of host time more."""
    q, k, v, _ = a_problem(target, lengths=(50, 50), seqlen_q=1)
    k_cache, v_cache, _ = lay_out(Layout(room=9), k, v, [50, 50])
    new = (k[:, :1], v[:, :1])
    prepared = []
    for n in (50, 51, 52):
        attention_with_kvcache(q, k_cache, v_cache, *new, cache_seqlens=n, backend=target.backend)
        calls = [kvcache._problem_of.cache_info().misses]
        if target.backend == "triton":
            from fa4_triton import decode_launch

            calls.append(decode_launch._call_of.cache_info().misses)
        prepared.append(calls)
    assert prepared[0] == prepared[1] == prepared[2]


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
    q = torch.randn(batch, seqlen_q, 2, 16, device=target.device, dtype=torch.float16)
    cache = torch.full((batch, 20, 2, 16), math.nan, device=target.device, dtype=torch.float16)
    sink = torch.tensor([0.5, -math.inf], device=target.device)
    for table in (None, torch.zeros(batch, 0, dtype=INT32, device=target.device)):
        if table is not None:
            cache = cache[:1].reshape(-1, 4, 2, 16)[:0].new_zeros(1, 8, 2, 16)
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


# Paged K and V through `attention`.


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


# Refusals.


def rows(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def index(*values, dtype=INT32):
    return torch.tensor(values, dtype=dtype)


def contiguous(**changed):
    """A valid call of 4 query heads on 2 KV heads that appends 2 rows, with arguments changed."""
    new = {"k": rows(2, 2, 2, 16), "v": rows(2, 2, 2, 24)}
    caches = {"k_cache": rows(2, 9, 2, 16) + 7, "v_cache": rows(2, 9, 2, 24) + 7}
    return {"q": rows(2, 3, 4, 16), **caches, **new, "cache_seqlens": index(3, 7), **changed}


def paged(**changed):
    """The same on pages of 8 rows."""
    caches = {"k_cache": rows(5, 8, 2, 16) + 7, "v_cache": rows(5, 8, 2, 24) + 7}
    return contiguous(**{**caches, "page_table": index([0, 3], [2, 4]), **changed})


def rotary(**changed):
    return contiguous(**{"rotary_cos": rows(20, 8), "rotary_sin": rows(20, 8), **changed})


def fp8(**changed):
    caches = {"k_cache": rows(2, 9, 2, 16).to(FP8), "v_cache": rows(2, 9, 2, 24).to(FP8)}
    return contiguous(**{**caches, "k_descale": rows(2, 2) + 1, "v_descale": rows(2) + 1, **changed})


def padded(positions, **changed):
    """Padding counts in positions: 9 suffice for 7 rows, 5 of them padding, and 2 new ones; 8 do not."""
    tables = {"rotary_cos": rows(positions, 8), "rotary_sin": rows(positions, 8)}
    return rotary(**{**tables, "cache_seqlens": 7, "cache_leftpad": index(5, 6), **changed})


VALID = {"contiguous": contiguous(), "paged": paged(), "rotary": rotary(), "fp8": fp8(), "padded": padded(9)}
half = torch.float16
BAD = {
    "q is a list": (contiguous(q=[1.0]), TypeError, "q", "torch.Tensor"),
    "k_cache is None": (contiguous(k_cache=None), TypeError, "k_cache", "torch.Tensor"),
    "out is a number": (contiguous(out=1), TypeError, "out", "torch.Tensor"),
    "no lengths": (contiguous(cache_seqlens=None), TypeError, "cache_seqlens", "an int"),
    "lengths a bool": (contiguous(cache_seqlens=True), TypeError, "cache_seqlens", "an int"),
    "lengths a float": (contiguous(cache_seqlens=3.0), TypeError, "cache_seqlens", "an int"),
    "lengths of int64": (contiguous(cache_seqlens=index(3, 7, dtype=torch.int64)), TypeError, "cache_seqlens", "int32"),
    "lengths of another batch": (contiguous(cache_seqlens=index(3)), ValueError, "cache_seqlens", "(2,)"),
    "length below 0": (contiguous(cache_seqlens=-1), ValueError, "cache_seqlens", "0 to 7"),
    "no room for the new rows": (contiguous(cache_seqlens=8), ValueError, "cache_seqlens", "0 to 7"),
    "no room in one sequence": (contiguous(cache_seqlens=index(3, 8)), ValueError, "cache_seqlens", "0 to 7"),
    "one length below 0": (contiguous(cache_seqlens=index(-1, 3)), ValueError, "cache_seqlens", "0 to 7"),
    "more new rows than room": (
        contiguous(k=rows(2, 10, 2, 16), v=rows(2, 10, 2, 24), cache_seqlens=index(0, 0)), ValueError, "k", "holds 9"
    ),
    "q of rank 3": (contiguous(q=rows(3, 4, 16)), ValueError, "q", "(batch, seqlen, heads, head_dim)"),
    "q of integers": (contiguous(q=rows(2, 3, 4, 16, dtype=torch.int64)), TypeError, "q", "torch.bfloat16"),
    "head_dim 257": (contiguous(q=rows(2, 3, 4, 257)), ValueError, "q", "1 to 256"),
    "no query heads": (contiguous(q=rows(2, 3, 0, 16)), ValueError, "q", "at least 1"),
    "k_cache of rank 3": (contiguous(k_cache=rows(9, 2, 16)), ValueError, "k_cache", "(batch, seqlen, heads_kv"),
    "v_cache of rank 5": (contiguous(v_cache=rows(1, 2, 9, 2, 24)), ValueError, "v_cache", "(batch, seqlen, heads_kv"),
    "k_cache of another dtype": (contiguous(k_cache=rows(2, 9, 2, 16, dtype=half)), TypeError, "k_cache", "float8"),
    "one cache of fp8": (contiguous(v_cache=rows(2, 9, 2, 24).to(FP8)), TypeError, "v_cache", "k_cache's"),
    "k_cache elsewhere": (contiguous(k_cache=rows(2, 9, 2, 16).to("meta")), ValueError, "k_cache", "q is on cpu"),
    "k_cache of another head_dim": (contiguous(k_cache=rows(2, 9, 2, 8)), ValueError, "k_cache", "q's 16"),
    "v_cache of other rows": (contiguous(v_cache=rows(2, 8, 2, 24)), ValueError, "v_cache", "last dimension"),
    "v_cache of other heads": (contiguous(v_cache=rows(2, 9, 4, 24)), ValueError, "v_cache", "last dimension"),
    "head_dim_v 257": (contiguous(v_cache=rows(2, 9, 2, 257)), ValueError, "v_cache", "1 to 256"),
    "heads that do not divide": (
        contiguous(k_cache=rows(2, 9, 3, 16), v_cache=rows(2, 9, 3, 24)), ValueError, "k_cache", "heads_q=4"
    ),
    "another batch in the cache": (
        contiguous(k_cache=rows(3, 9, 2, 16), v_cache=rows(3, 9, 2, 24)), ValueError, "k_cache", "cache_batch_idx"
    ),
    "a cache that strides": (contiguous(k_cache=rows(2, 9, 2, 32)[..., ::2]), ValueError, "k_cache", "stride"),
    "k without v": (contiguous(v=None), ValueError, "v", "both or neither"),
    "v without k": (contiguous(k=None), ValueError, "k", "both or neither"),
    "k of another dtype": (contiguous(k=rows(2, 2, 2, 16, dtype=half)), TypeError, "k", "q's"),
    "k of another shape": (contiguous(k=rows(2, 2, 4, 16)), ValueError, "k", "(2, 2, 2, 16)"),
    "k of rank 3": (contiguous(k=rows(2, 2, 16)), ValueError, "k", "(batch, new rows"),
    "v of other rows": (contiguous(v=rows(2, 1, 2, 24)), ValueError, "v", "(2, 2, 2, 24)"),
    "page_table of int64": (paged(page_table=index([0], [1], dtype=torch.int64)), TypeError, "page_table", "int32"),
    "page_table of rank 1": (paged(page_table=index(0, 1)), ValueError, "page_table", "(batch, pages)"),
    "page_table of another batch": (paged(page_table=index([0, 1])), ValueError, "page_table", "(2, 2)"),
    "pages of 12 rows": (
        paged(k_cache=rows(5, 12, 2, 16), v_cache=rows(5, 12, 2, 24)), ValueError, "k_cache", "multiples of 8"
    ),
    "pages of 0 rows": (
        paged(k_cache=rows(5, 0, 2, 16), v_cache=rows(5, 0, 2, 24)), ValueError, "k_cache", "multiples of 8"
    ),
    "a page that does not exist": (paged(page_table=index([0, 1], [5, 1])), ValueError, "page_table", "0 to 4"),
    "a page below 0": (paged(page_table=index([0, 1], [-1, 1])), ValueError, "page_table", "0 to 4"),
    "cache_batch_idx with pages": (paged(cache_batch_idx=index(0, 1)), ValueError, "cache_batch_idx", "page_table"),
    "cache_batch_idx of int64": (
        contiguous(cache_batch_idx=index(0, 1, dtype=torch.int64)), TypeError, "cache_batch_idx", "int32"
    ),
    "cache_batch_idx of another batch": (contiguous(cache_batch_idx=index(0)), ValueError, "cache_batch_idx", "(2,)"),
    "cache_batch_idx past the cache": (
        contiguous(cache_batch_idx=index(0, 2)), ValueError, "cache_batch_idx", "0 to 1"
    ),
    "cache_leftpad of floats": (contiguous(cache_leftpad=rows(2)), TypeError, "cache_leftpad", "int32"),
    "cache_leftpad past the length": (contiguous(cache_leftpad=index(4, 0)), ValueError, "cache_leftpad", "0 to 3"),
    "cos without sin": (rotary(rotary_sin=None), ValueError, "rotary_sin", "both or neither"),
    "rotary without k": (rotary(k=None, v=None), ValueError, "rotary_cos", "k and v"),
    "rotary_dim beyond head_dim": (
        rotary(rotary_cos=rows(20, 9), rotary_sin=rows(20, 9)), ValueError, "rotary_cos", "up to 16"
    ),
    "rotary of rank 1": (rotary(rotary_cos=rows(8)), ValueError, "rotary_cos", "(positions, rotary_dim / 2)"),
    "rotary of integers": (
        rotary(rotary_cos=rows(20, 8, dtype=INT32), rotary_sin=rows(20, 8, dtype=INT32)), TypeError, "rotary_cos",
        "floating-point",
    ),
    "sin of another shape": (rotary(rotary_sin=rows(20, 4)), ValueError, "rotary_sin", "(20, 8)"),
    "sin of another dtype": (rotary(rotary_sin=rows(20, 8, dtype=half)), TypeError, "rotary_sin", "rotary_cos's"),
    "too few positions": (
        rotary(rotary_cos=rows(8, 8), rotary_sin=rows(8, 8), cache_seqlens=7), ValueError, "rotary_cos", "reaches 9"
    ),
    "too few positions for a sequence": (
        rotary(rotary_cos=rows(8, 8), rotary_sin=rows(8, 8)), ValueError, "rotary_cos", "reaches 9"
    ),
    "too few positions for the query": (
        rotary(rotary_cos=rows(9, 8), rotary_sin=rows(9, 8), causal=True, cache_seqlens=7), ValueError, "rotary_cos",
        "reaches 10",
    ),
    "too few positions for a sequence's query": (
        rotary(rotary_cos=rows(9, 8), rotary_sin=rows(9, 8), causal=True), ValueError, "rotary_cos", "reaches 10"
    ),
    "too few positions, of which some are padding": (padded(8), ValueError, "rotary_cos", "reaches 9"),
    "too few positions for a padded sequence": (
        padded(8, cache_seqlens=index(3, 7), cache_leftpad=index(0, 6)), ValueError, "rotary_cos", "reaches 9"
    ),
    "a descale without fp8": (contiguous(k_descale=rows(2)), ValueError, "k_descale", "float8"),
    "a descale of float16": (fp8(k_descale=rows(2, dtype=half)), TypeError, "k_descale", "float32"),
    "a descale of another shape": (fp8(v_descale=rows(2, 4)), ValueError, "v_descale", "(heads_kv,)"),
    "out of another shape": (contiguous(out=rows(2, 3, 4, 16)), ValueError, "out", "(2, 3, 4, 24)"),
    "out of another dtype": (contiguous(out=rows(2, 3, 4, 24, dtype=half)), TypeError, "out", "q's"),
    "out that strides": (contiguous(out=rows(2, 3, 4, 48)[..., ::2]), ValueError, "out", "stride"),
    "out that overlaps itself": (
        contiguous(out=rows(1, 3, 4, 24).expand(2, 3, 4, 24)), ValueError, "out", "place of its own"
    ),
    "out that requires a gradient": (
        contiguous(out=rows(2, 3, 4, 24).requires_grad_()), ValueError, "out", "no_grad"
    ),
    "a page table without pages": (
        paged(k_cache=rows(0, 8, 2, 16), v_cache=rows(0, 8, 2, 24), k=None, v=None), ValueError, "cache_seqlens",
        "0 to 0",
    ),
    "a length without a cache": (
        contiguous(k_cache=rows(0, 9, 2, 16), v_cache=rows(0, 9, 2, 24), k=None, v=None, cache_seqlens=3,
                   cache_batch_idx=index(0, 0)),
        ValueError, "cache_seqlens", "0 to 0",
    ),
    "sink of a wrong length": (contiguous(sink=rows(2)), ValueError, "sink", "(heads_q,)"),
    "sink of integers": (contiguous(sink=rows(4, dtype=INT32)), TypeError, "sink", "floating-point"),
    "sink of fp8": (contiguous(sink=rows(4).to(FP8)), TypeError, "sink", "16 bits"),
    "rotary of fp8": (
        rotary(rotary_cos=rows(20, 8).to(FP8), rotary_sin=rows(20, 8).to(FP8)), TypeError, "rotary_cos", "16 bits"
    ),
    "num_splits below 0": (contiguous(num_splits=-1), ValueError, "num_splits", "64"),
    "num_splits above 64": (contiguous(num_splits=65), ValueError, "num_splits", "64"),
    "num_splits a float": (contiguous(num_splits=1.0), TypeError, "num_splits", "integers"),
    "scale 0": (contiguous(softmax_scale=0.0), ValueError, "softmax_scale", "> 0"),
    "scale NaN": (contiguous(softmax_scale=math.nan), ValueError, "softmax_scale", "finite"),
    "softcap below 0": (contiguous(softcap=-1.0), ValueError, "softcap", ">= 0"),
    "a window of one side": (contiguous(window=(1,)), ValueError, "window", "(left, right)"),
    "causal an integer": (contiguous(causal=1), TypeError, "causal", "bool"),
    "interleaved a string": (rotary(rotary_interleaved="no"), TypeError, "rotary_interleaved", "bool"),
    "an unknown backend": (contiguous(backend="cuda"), ValueError, "backend", "'triton'"),
    "a backend without a cache": (contiguous(backend="cute"), NotImplementedError, "cute", "cute"),
    "q requires a gradient": (contiguous(q=rows(2, 3, 4, 16).requires_grad_()), ValueError, "q", "no_grad"),
    "a cache that requires a gradient": (
        contiguous(v_cache=rows(2, 9, 2, 24).requires_grad_()), ValueError, "v_cache", "no_grad"
    ),
    "a sink that requires a gradient": (contiguous(sink=rows(4).requires_grad_()), ValueError, "sink", "no_grad"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "argument", "accepted"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name_and_the_cache_is_untouched(call, error, argument, accepted):
    caches = [call[name] for name in ("k_cache", "v_cache") if isinstance(call[name], torch.Tensor)]
    before = [cache.detach().clone() for cache in caches]
    with pytest.raises(error) as caught:
        attention_with_kvcache(**call)
    assert argument in str(caught.value)
    assert accepted in str(caught.value)
    for cache, kept in zip(caches, before):
        if cache.device.type != "meta":
            assert torch.equal(cache.float(), kept.float())


@pytest.mark.parametrize("call", VALID.values(), ids=VALID.keys())
def test_the_calls_above_are_valid_but_for_what_they_change(call):
    attention_with_kvcache(**call)


def test_a_gradient_that_nothing_records_is_fine():
    with torch.no_grad():
        attention_with_kvcache(**contiguous(q=rows(2, 3, 4, 16).requires_grad_()))


def unchecked(target, monkeypatch):
    """Index tensors' contents unread, as on a GPU."""
    monkeypatch.setattr(kvcache, "contents_are_checked", lambda device: False)


def test_an_append_past_the_capacity_writes_nothing(target, monkeypatch):
    """The lengths lie on the device, where nobody reads them: other sequences append as if they were alone."""
    unchecked(target, monkeypatch)
    for page in (0, 8):
        k = torch.randn(4, 24, 1, 16, device=target.device)
        k_cache, v_cache, where = lay_out(Layout(page), k, k, [24] * 4)
        before = k_cache.clone()
        new = torch.randn(4, 3, 1, 16, device=target.device)
        seqlens = torch.tensor([22, -1, 2**31 - 1, 21], dtype=INT32, device=target.device)
        attention_with_kvcache(new, k_cache, v_cache, new, new, cache_seqlens=seqlens, backend=target.backend, **where)
        k[3, 21:] = new[3]
        after, _, _ = lay_out(Layout(page), k, k, [24] * 4)
        assert same_bits(k_cache, after)
        assert same_bits(v_cache, after)
        assert not same_bits(k_cache, before)


def test_wild_pages_and_rows_are_written_to_by_no_one(target, monkeypatch):
    """A number of a page that does not exist is clamped where it is read; a write would hit another's page."""
    unchecked(target, monkeypatch)
    new = torch.randn(2, 1, 1, 16, device=target.device)
    for where in ({"page_table": [[99], [-7]]}, {"cache_batch_idx": [5, -1]}):
        cache = torch.randn(3, 8, 1, 16, device=target.device)
        before = cache.clone()
        where = {name: torch.tensor(value, dtype=INT32, device=target.device) for name, value in where.items()}
        out = attention_with_kvcache(new, cache, cache, new, new, cache_seqlens=4, backend=target.backend, **where)
        assert torch.equal(cache, before), where
        assert out.isfinite().all()


def test_a_row_is_appended_whatever_the_page_of_the_next_one(target, monkeypatch):
    """The next one's wild page is clamped to that of the row itself."""
    unchecked(target, monkeypatch)
    cache = torch.zeros(2, 1, 1, 16, device=target.device)
    new = torch.randn(1, 3, 1, 16, device=target.device)
    table = torch.tensor([[-5, 1, 99]], dtype=INT32, device=target.device)
    attention_with_kvcache(
        new, cache, cache.clone(), new, new, cache_seqlens=0, page_table=table, backend=target.backend
    )
    assert torch.equal(cache[1], new[0, 1:2])
    assert not cache[0].any()


def test_wild_lengths_and_paddings_read_nothing_outside_of_the_cache(target, monkeypatch):
    """Lengths are clamped into the cache, and paddings to the lengths; NaN lies on both sides of it."""
    unchecked(target, monkeypatch)
    q = torch.randn(3, 1, 2, 16, device=target.device)
    memory = torch.full((5, 24, 1, 16), math.nan, device=target.device)
    memory[1:4] = torch.randn(3, 24, 1, 16, device=target.device)
    seqlens, pads = (
        torch.tensor(t, dtype=INT32, device=target.device)
        for t in ([2**31 - 1, -(2**31), 20], [-(2**31), 7, 2**31 - 1])
    )
    contiguous = memory[1:4]
    pages, table = memory.view(15, 8, 1, 16)[3:12], torch.arange(9, dtype=INT32, device=target.device).view(3, 3)
    for cache, where in ((contiguous, {}), (pages, {"page_table": table})):
        out, lse = attention_with_kvcache(
            q, cache, cache, cache_seqlens=seqlens, cache_leftpad=pads, return_lse=True, backend=target.backend, **where
        )
        check_forward(lambda *_, out=out, lse=lse, **__: (out[:1], lse[:1]), q[:1], *[contiguous[:1]] * 2).require()
        assert (out[1:] == 0).all()
        assert (lse[1:] == -math.inf).all()


def test_a_cache_without_pages_or_rows_holds_no_key_whatever_the_lengths_say(target, monkeypatch):
    """Kernels clamp an index to the last one that exists: here to -1, memory before the cache."""
    unchecked(target, monkeypatch)
    poison = torch.full((2, 8, 1, 16), math.nan, device=target.device)
    q = torch.randn(2, 1, 2, 16, device=target.device)
    lengths, zeros = (torch.full((2,), n, dtype=INT32, device=target.device) for n in (8, 0))
    for where in ({"page_table": zeros[:, None]}, {"cache_batch_idx": zeros}):
        cache = poison[1:1]
        out, lse = attention_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, return_lse=True, backend=target.backend, **where
        )
        assert (out == 0).all(), where
        assert (lse == -math.inf).all(), where
    monkeypatch.setattr(problem_module, "contents_are_checked", lambda device: False)
    out = target(q, poison[1:1], poison[1:1], page_table=zeros[:, None], seqused_k=lengths)
    assert (out == 0).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"cache_seqlens": index(3, 15)}, "cache_seqlens"),
        ({"cache_seqlens": index(3, -5)}, "cache_seqlens"),
        ({"cache_leftpad": index(4, 99)}, "cache_leftpad"),
        ({"page_table": index([0, 1], [77, 1])}, "page_table"),
    ],
)
def test_contents_on_a_device_are_clamped_or_under_dispatch_check_refused(monkeypatch, changed, argument):
    """Without the check the result is unspecified, and the device survives (compute-sanitizer runs this test)."""
    call = paged(**changed)
    call = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    attention_with_kvcache(**call)
    torch.cuda.synchronize()
    monkeypatch.setenv("DISPATCH_CHECK", "1")
    with pytest.raises(ValueError, match=argument):
        attention_with_kvcache(**call)


# In PyTorch, on a GPU.


def step_inputs(device, lengths=(300, 17), page=0, dtype=torch.bfloat16):
    g = torch.Generator(device).manual_seed(0)
    q, new = (torch.randn(2, 1, heads, 64, device=device, dtype=dtype, generator=g) for heads in (8, 2))
    k, v = (torch.randn(2, 640, 2, 64, device=device, dtype=dtype, generator=g) for _ in range(2))
    k_cache, v_cache, where = lay_out(Layout(page), k, v, [640, 640])
    return q, k_cache, v_cache, new, torch.tensor(lengths, dtype=INT32, device=device), where


def test_compile_keeps_the_call_in_one_graph_and_mutates_the_cache():
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    q, k_cache, v_cache, new, seqlens, _ = step_inputs(device, dtype=torch.float32)

    def step(q, k_cache, v_cache, seqlens, window):
        out = attention_with_kvcache(
            q * 2, k_cache, v_cache, new, new, cache_seqlens=seqlens, window=(window, None), softmax_scale=0.3
        )
        return out + 1, k_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for window in (50, 60):
        mine, theirs = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
        want = step(q, *mine, seqlens, window)
        got = compiled(q, *theirs, seqlens, window)
        assert all(map(torch.allclose, got, want))
        assert all(map(torch.equal, mine, theirs))


def test_autocast_casts_nothing(target):
    """A cache in autocast's dtype could not be given back to the caller, nor one in float32 be written in place."""
    q, k, v, used = a_problem(target, torch.float32)
    want = ThroughCache(target, Layout())(q, k, v, seqused_k=used)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        got = ThroughCache(target, Layout())(q, k, v, seqused_k=used)
    assert all(map(torch.equal, got, want))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("page", [0, 16])
def test_a_step_neither_synchronises_nor_compiles_when_lengths_change_and_can_be_captured(page, monkeypatch):
    from fa4_triton import decode_launch

    q, k_cache, v_cache, new, seqlens, where = step_inputs("cuda", page=page)

    def step():
        return attention_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens, causal=True, **where)

    step()
    torch.cuda.synchronize()
    compiled = []
    real = decode_launch.compile_planned
    monkeypatch.setattr(decode_launch, "compile_planned", lambda *args: compiled.append(args) or real(*args))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in (5, 620):
            seqlens.fill_(n)
            step()
        attention_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens, causal=True, num_splits=7, **where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for n in (3, 500, 638):
        seqlens.fill_(n)
        graph.replay()
        assert torch.equal(captured, step()), n


@pytest.mark.gpu
@needs_gpu
def test_streams_that_run_at_once_do_not_meet_in_the_work_space():
    """Arrivals of two launches in one counter would merge chunks that are not there yet."""
    q, k_cache, v_cache, _, _, _ = step_inputs("cuda")
    k_cache, v_cache = (c.repeat(1, 20, 1, 1) for c in (k_cache, v_cache))
    want = [attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n) for n in (12000, 9000)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, n in zip(streams, (12000, 9000)):
            with torch.cuda.stream(stream):
                got.append(attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


def test_the_counters_of_a_captured_launch_stay_its_own_when_the_reserve_is_filled_again():
    """A graph holds their address alone: freed, they would be another tensor's memory at the next replay."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from fa4_triton.decode_launch import ARRIVALS, _Reserve

    reserve = _Reserve(torch.device("cpu"))
    reserve.fill()
    taken = reserve.take(ARRIVALS // 2 + 1)
    assert not taken.any()
    memory = StorageWeakRef(taken.untyped_storage())
    first = taken.data_ptr()
    del taken  # as a launch does
    reserve.fill()
    assert not memory.expired()
    assert reserve.free.numel() == ARRIVALS
    assert reserve.take(1).data_ptr() != first


@pytest.mark.gpu
@needs_gpu
def test_the_capacity_costs_neither_programs_nor_much_memory(monkeypatch):
    """A grid, or a work space, made for the capacity would grow with it."""
    from fa4_triton import decode_launch

    grids = []
    real = decode_launch._launch

    def launch(plan, device, grid, *rest):
        grids.append(grid)
        real(plan, device, grid, *rest)

    monkeypatch.setattr(decode_launch, "_launch", launch)
    q = torch.randn(4, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(1, 2**20, 1, 64, device="cuda", dtype=torch.bfloat16).expand(4, -1, -1, -1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_with_kvcache(q, cache, cache, cache_seqlens=100)
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20
    assert max(grids) <= 4 * torch.cuda.get_device_properties(0).multi_processor_count


@pytest.mark.gpu
@needs_gpu
def test_a_cache_beyond_2_to_the_31_elements(target):
    """32-bit offsets wrap around there, in rows and in pages."""
    if target.backend != "triton":
        pytest.skip("plain PyTorch")
    n = 2**31 // (8 * 128) + 4096
    cache = torch.zeros(1, n, 8, 128, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(500, 8, 128, device="cuda", dtype=torch.bfloat16)
    cache[0, -500:] = tail
    q = torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    want = attention_with_kvcache(q, tail[None], tail[None], cache_seqlens=500)
    pad = torch.tensor([n - 500], dtype=INT32, device="cuda")
    assert torch.equal(attention_with_kvcache(q, cache, cache, cache_seqlens=n, cache_leftpad=pad), want)
    pages = cache.view(-1, 16, 8, 128)
    table = torch.arange(pages.shape[0] - 32, pages.shape[0], device="cuda", dtype=INT32)[None]
    pad = torch.tensor([512 - 500], dtype=INT32, device="cuda")
    got = attention_with_kvcache(q, pages, pages, cache_seqlens=512, page_table=table, cache_leftpad=pad)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_every_kernel_compiles_within_the_shared_memory_of_every_architecture(architecture, monkeypatch):
    """A launch would fail with "out of resources" on a GPU that nobody here has."""
    compiler = pytest.importorskip("triton.backends.compiler", reason="Triton is not installed")
    import fa4_triton
    from fa4_triton import decode_launch, launch, tiles

    target = compiler.GPUTarget("cuda", architecture, 32)
    compiled = []

    def compile_only(plan, device, grid, arguments, layout):
        compiled.append((plan.kernel.__name__, decode_launch.compile_planned(plan, arguments(False), target, layout)))

    monkeypatch.setattr(fa4_triton, "_unavailable", lambda device: None)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    monkeypatch.setattr(decode_launch, "_launch", compile_only)
    decode_launch._call_of.cache_clear()
    for dim, seqlen_q, dtype in ((128, 1, torch.bfloat16), (256, 2, torch.bfloat16), (128, 40, FP8)):
        q, new = (torch.zeros(2, seqlen_q, heads, dim, dtype=torch.bfloat16) for heads in (8, 2))
        cache, table = torch.zeros(9, 16, 2, dim).to(dtype), torch.zeros(2, 4, dtype=INT32)
        attention_with_kvcache(q, cache, cache, new, new, cache_seqlens=3, page_table=table, backend="triton")
    decode_launch._call_of.cache_clear()
    assert [name for name, _ in compiled] == ["append_rows", "attention_decode"] * 2 + [
        "append_rows",
        "attention_prefill",
    ]
    limit = tiles.SHARED_MEMORY[tiles.family_of(target)]
    for name, kernel in compiled:
        assert kernel.metadata.shared <= limit * 1024, f"{name}: {kernel.metadata.shared} bytes of {limit} KiB"
