"""Calls on a KV cache that are refused by name, before anything is written."""

from __future__ import annotations

import math

import pytest
import torch
from caches import FP8, INT32, contiguous, index, paged, rows
from targets import CACHE_CALLS, SERVED, Target

from dispatch import attention_with_kvcache


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
    "scale beyond float64": (contiguous(softmax_scale=10**400), ValueError, "softmax_scale", "in float32"),
    "softcap beyond float32": (contiguous(softcap=1e39), ValueError, "softcap", "in float32"),
    "softcap far below the scale": (contiguous(softcap=1e-40), ValueError, "softcap", "softmax_scale="),
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


def test_what_a_target_lacks_is_counted_and_goes_elsewhere():
    """Of these tests: a backend that refused every call would pass them all by another's results."""
    got = Target("cute", "cpu").with_kvcache(**contiguous())
    assert torch.equal(got, attention_with_kvcache(**contiguous()))
    (why,) = CACHE_CALLS
    assert why != SERVED
    assert why.startswith("backend='cute': ")
    CACHE_CALLS.clear()  # or conftest.py would skip this test
