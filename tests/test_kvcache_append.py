"""What a call writes into a KV cache: its new rows, rotated, or as fp8, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from caches import FP8, INT32, Layout, ThroughCache, a_problem, lay_out, same_bits, unchecked

from dispatch import attention_with_kvcache
from fa4_core.checks import expected

pytestmark = pytest.mark.serves("kv_cache")


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
        out, lse = target.with_kvcache(
            q, k_cache, v_cache, k_new, v_new, cache_seqlens=seqlens, rotary_cos=cos, rotary_sin=sin,
            rotary_interleaved=interleaved, causal=causal, return_lse=True, **where,
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


@pytest.mark.serves("every_kv_cache")
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


@pytest.mark.serves("every_kv_cache")
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
