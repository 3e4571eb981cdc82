"""Lengths and indices that lie on a device and are wrong: nothing is written for them, and no read leaves the cache.

Run as a whole under compute-sanitizer's memcheck on a GPU, too.
"""

from __future__ import annotations

import math

import pytest
import torch
from caches import INT32, Layout, index, lay_out, needs_gpu, paged, same_bits, unchecked

from dispatch import attention_with_kvcache
from fa4_core import problem as problem_module
from fa4_core.checks import check_forward

pytestmark = pytest.mark.serves("kv_cache")


def randn(target, *shape):
    """As `torch.randn`, of a head dimension and a dtype that the target's KV caches may have."""
    return torch.randn(*shape, target.cache_dim, device=target.device).to(target.widest)


def test_an_append_past_the_capacity_writes_nothing(target, monkeypatch):
    """The lengths lie on the device, where nobody reads them: other sequences append as if they were alone."""
    unchecked(target, monkeypatch)
    for page in (0, 8):
        k = randn(target, 4, 24, 1)
        k_cache, v_cache, where = lay_out(Layout(page), k, k, [24] * 4)
        before = k_cache.clone()
        new = randn(target, 4, 3, 1)
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
    new = randn(target, 2, 1, 1)
    for where in ({"page_table": [[99], [-7]]}, {"cache_batch_idx": [5, -1]}):
        cache = randn(target, 3, 8, 1)
        before = cache.clone()
        where = {name: torch.tensor(value, dtype=INT32, device=target.device) for name, value in where.items()}
        out = attention_with_kvcache(new, cache, cache, new, new, cache_seqlens=4, backend=target.backend, **where)
        assert torch.equal(cache, before), where
        assert out.isfinite().all()


@pytest.mark.serves("every_kv_cache")
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
    q = randn(target, 3, 1, 2)
    memory = torch.full((5, 24, 1, target.cache_dim), math.nan, dtype=q.dtype, device=target.device)
    memory[1:4] = randn(target, 3, 24, 1)
    seqlens, pads = (
        torch.tensor(t, dtype=INT32, device=target.device)
        for t in ([2**31 - 1, -(2**31), 20], [-(2**31), 7, 2**31 - 1])
    )
    contiguous = memory[1:4]
    pages = memory.view(15, 8, 1, -1)[3:12]
    table = {"page_table": torch.arange(9, dtype=INT32, device=target.device).view(3, 3)}
    for cache, where, padded in ((contiguous, {}, True), (pages, table, False), (pages, table, True)):
        out, lse = target.with_kvcache(
            q, cache, cache, cache_seqlens=seqlens, cache_leftpad=pads if padded else None, return_lse=True, **where
        )
        check_forward(lambda *_, out=out, lse=lse, **__: (out[:1], lse[:1]), q[:1], *[contiguous[:1]] * 2).require()
        keyless = slice(1, 3 if padded else 2)
        assert (out[keyless] == 0).all()
        assert (lse[keyless] == -math.inf).all()
        assert out.isfinite().all()


@pytest.mark.serves("every_kv_cache")
@pytest.mark.parametrize("packed", [False, True])
def test_wild_pages_and_lengths_of_prompts_read_nothing_outside_of_the_pages(target, packed, monkeypatch):
    """NaN lies on both sides of the pages; a packed prompt's rows may be nobody's, which gives zeros."""
    if packed and target.backend == "reference":
        pytest.skip("the reference takes cu_seqlens as they are: it reads them, and they are checked where it can")
    monkeypatch.setattr(problem_module, "contents_are_checked", lambda device: False)
    memory = torch.full((6, 8, 1, 16), math.nan, device=target.device)
    memory[1:5] = torch.randn(4, 8, 1, 16, device=target.device)
    wild = [99, 3, 2**31 - 1, -(2**31), -1, 0]
    used, ends, *pages = (torch.tensor(wild[i:] + wild[:i], dtype=INT32, device=target.device) for i in (0, 2, 1, 3, 4))
    options = {"seqused_k": used, "page_table": torch.stack(pages, 1), "causal": True, "return_lse": True}
    if packed:
        options |= {"seqused_k": used[1:], "page_table": options["page_table"][1:], "cu_seqlens_q": ends}
    q = torch.randn(*((70,) if packed else (6, 70)), 1, 16, device=target.device)
    out, lse = target(q, memory[1:5], memory[1:5], **options)
    assert out.isfinite().all()
    assert not lse.isnan().any()


def test_a_cache_without_pages_or_rows_holds_no_key_whatever_the_lengths_say(target, monkeypatch):
    """Kernels clamp an index to the last one that exists: here to -1, memory before the cache."""
    unchecked(target, monkeypatch)
    q = randn(target, 2, 1, 2)
    poison = torch.full((2, 8, 1, target.cache_dim), math.nan, dtype=q.dtype, device=target.device)
    lengths, zeros = (torch.full((2,), n, dtype=INT32, device=target.device) for n in (8, 0))
    for where in ({"page_table": zeros[:, None]}, {"cache_batch_idx": zeros}):
        cache = poison[1:1]
        out, lse = attention_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, return_lse=True, backend=target.backend, **where
        )
        assert (out == 0).all(), where
        assert (lse == -math.inf).all(), where
    if "every_kv_cache" in target.serves:
        monkeypatch.setattr(problem_module, "contents_are_checked", lambda device: False)
        out = target(q, poison[1:1], poison[1:1], page_table=zeros[:, None], seqused_k=lengths)
        assert (out == 0).all()


def halves(t):
    """Zeros that the cute backend's KV caches may be of, in place of float32 ones."""
    return torch.zeros(*t.shape[:-1], 64, dtype=torch.float16) if t.is_floating_point() else t


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("make", [halves, lambda t: t], ids=["float16", "float32"])
@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"cache_seqlens": index(3, 15)}, "cache_seqlens"),
        ({"cache_seqlens": index(3, -5)}, "cache_seqlens"),
        ({"cache_leftpad": index(4, 99)}, "cache_leftpad"),
        ({"page_table": index([0, 1], [77, 1])}, "page_table"),
    ],
)
def test_contents_on_a_device_are_clamped_or_under_dispatch_check_refused(monkeypatch, changed, argument, make):
    """Without the check the result is unspecified, and the device survives (compute-sanitizer runs this test)."""
    call = paged(**changed)
    call = {name: make(t).cuda() for name, t in call.items()}
    attention_with_kvcache(**call)
    torch.cuda.synchronize()
    monkeypatch.setenv("DISPATCH_CHECK", "1")
    with pytest.raises(ValueError, match=argument):
        attention_with_kvcache(**call)
