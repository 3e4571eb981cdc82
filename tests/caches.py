"""Builders for tests of KV caches: a drawn problem is a padded batch with used lengths, and lies in a cache somehow.

Contiguous, padded on the left, in other rows, in pages of any order, as fp8: everything that is no valid key is NaN.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from fa4_core import kvcache

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


@st.composite
def cache_calls(draw, kinds, lengths, seqlens_q, *, batch, new, pads, splits):
    """(lengths, seqlen_q, appended, layout, options, splits, seed) of a kind, a dict of compile-time axes.

    lengths: a strategy. batch, new, pads: the most sequences, appended rows, padded rows. seqlens_q, splits: values.
    """
    batch = draw(st.integers(1, batch))
    new = draw(st.integers(1, new)) if kinds.get("new") else 0
    kept = draw(st.lists(lengths, min_size=batch, max_size=batch))
    pads = draw(st.lists(st.integers(0, pads), min_size=batch, max_size=batch)) if kinds.get("pads") else None
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
    seqlen_q, split = draw(st.sampled_from(seqlens_q)), draw(st.sampled_from(splits))
    return [n + new for n in kept], seqlen_q, new, layout, options, split, draw(st.integers(0, 999))


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
        return self.target.with_kvcache(
            q, k_cache, v_cache, **new, cache_seqlens=seqlens, num_splits=self.num_splits, return_lse=return_lse,
            **where, **options,
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


def a_problem(target, dtype=torch.float16, lengths=(70, 33, 0), seqlen_q=3, **changed):
    changed = {"heads_kv": 1 if target.interpreted else 2, "group": 2, **changed}
    return problem(target, dtype, list(lengths), seqlen_q, **changed)


def exact_in_fp8(layout, k, v):
    """k and v as an fp8 cache of this layout stands for them, in float32."""
    results = []
    for rows, descale in zip((k, v), descales(layout, k, v)):
        factor = descale[:, None, :, None] if descale.dim() == 2 else descale[:, None]
        results.append((rows.float() / factor).to(FP8).float() * factor)
    return results


def unchecked(target, monkeypatch):
    """Index tensors' contents unread, as on a GPU."""
    monkeypatch.setattr(kvcache, "contents_are_checked", lambda device: False)


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


def step_inputs(device, lengths=(300, 17), page=0, dtype=torch.bfloat16):
    g = torch.Generator(device).manual_seed(0)
    q, new = (torch.randn(2, 1, heads, 64, device=device, dtype=dtype, generator=g) for heads in (8, 2))
    k, v = (torch.randn(2, 640, 2, 64, device=device, dtype=dtype, generator=g) for _ in range(2))
    k_cache, v_cache, where = lay_out(Layout(page), k, v, [640, 640])
    return q, k_cache, v_cache, new, torch.tensor(lengths, dtype=INT32, device=device), where
