"""Merging attention over parts of the keys: equal to attention over all of them, gradients included."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import oracle

from dispatch import attention, attention_with_kvcache, merge_attention

INT32 = torch.int32
# The merge is the same for every backend; those that serve a KV cache need it.
pytestmark = pytest.mark.serves("every_kv_cache")


def inputs(target, dtype, length=90, seqlen_q=7, heads_q=4, heads_kv=2, seed=0, dims=(32, 16)):
    g = torch.Generator().manual_seed(seed)
    dim, dim_v = dims
    shapes = ((2, seqlen_q, heads_q, dim), (2, length, heads_kv, dim), (2, length, heads_kv, dim_v))
    return [torch.randn(shape, generator=g).to(target.device, dtype) for shape in shapes]


def in_parts(target, q, k, v, cuts, sink=None):
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, k.shape[1]))]
    outs, lses = zip(*[target(q, k[:, part], v[:, part], return_lse=True) for part in parts])
    return merge_attention(outs, lses, sink)


@pytest.mark.parametrize("with_sink", [False, True])
def test_merged_parts_equal_the_whole(target, dtype, with_sink):
    """Parts of any length, empty ones too; the sink counts once."""
    sink = torch.tensor([0.5, -1.0, 3.0, -math.inf], device=target.device) if with_sink else None

    @given(st.lists(st.integers(0, 90), max_size=3), st.integers(0, 99))
    def check(cuts, seed):
        q, k, v = inputs(target, dtype, seed=seed)
        out, lse = in_parts(target, q, k, v, sorted(cuts), sink)
        assert out.dtype == dtype
        want, want_lse = oracle(q, k, v, sink=sink)
        # Each part was rounded to the dtype once; the merge adds a rounding, relative to the largest share. On a GPU
        # float32 products are made of three TF32 ones.
        atol = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)

    check()


def test_gradients_through_the_merge_equal_those_of_the_whole(target):
    """For q, k, v and sink, through out and lse: parts share q, and an empty part has nothing to say."""
    if target.interpreted:
        pytest.skip("the parts' gradients are test_gradients' business; the merge is plain PyTorch")
    sink = torch.tensor([0.5, -1.0, 3.0, 0.0], device=target.device)
    leaves = [t.requires_grad_() for t in (*inputs(target, torch.float32), sink)]
    out, lse = in_parts(target, *leaves[:3], cuts=(0, 30, 31), sink=leaves[3])
    g = torch.Generator().manual_seed(1)
    arriving = [torch.randn(t.shape, generator=g).to(target.device) for t in (out, lse)]
    got = torch.autograd.grad([out, lse], leaves, arriving)
    want = torch.autograd.grad(oracle(*leaves[:3], sink=leaves[3]), leaves, [a.double() for a in arriving])
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), got, want):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(1, 2, 3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    lses = [torch.randn(1, 3, 2, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    sink = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
    call = lambda *t: merge_attention(t[:3], t[3:6], t[6])  # noqa: E731
    assert torch.autograd.gradcheck(call, (*outs, *lses, sink))


@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_that_saw_no_key_in_a_part_or_in_any(with_sink):
    """No NaN, neither in results nor in gradients; without any key 0 and -inf, or the sink's logit."""
    out = torch.randn(1, 3, 2, 4)
    out[:, 0] = 0.0
    lse = torch.randn(1, 2, 3)
    lse[..., 0] = -math.inf
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    sink = torch.tensor([0.5, -math.inf]) if with_sink else None
    leaves = [t.requires_grad_() for t in (out, lse, *nothing)]
    merged, merged_lse = merge_attention([leaves[0], leaves[2]], [leaves[1], leaves[3]], sink)
    alone, alone_lse = merge_attention([out], [lse], sink)
    assert torch.equal(merged, alone)
    assert torch.equal(merged_lse, alone_lse)
    assert (merged[:, 0] == 0).all()
    assert merged_lse[0, :, 0].tolist() == ([0.5, -math.inf] if with_sink else [-math.inf] * 2)
    if not with_sink:
        torch.testing.assert_close(merged, out)
    finite = torch.where(merged_lse.isinf(), 0.0, merged_lse)
    for grad in torch.autograd.grad(merged.sum() + finite.sum(), leaves):
        assert grad.isfinite().all()


def test_an_lse_that_holds_a_sink_counts_it_once_per_part():
    """Why `sink` is an argument of the merge: this is what goes wrong otherwise."""
    q, k, v = (torch.randn(1, n, 1, 8) for n in (2, 6, 6))
    sink = torch.ones(1)
    parts = [attention(q, k[:, p], v[:, p], sink=sink, return_lse=True) for p in (slice(0, 3), slice(3, 6))]
    wrong, _ = merge_attention(*zip(*parts))
    right, _ = merge_attention(
        *zip(*[attention(q, k[:, p], v[:, p], return_lse=True) for p in (slice(0, 3), slice(3, 6))]), sink
    )
    whole = attention(q, k, v, sink=sink)
    torch.testing.assert_close(right, whole)
    assert not torch.allclose(wrong, whole, atol=1e-3)


def test_packed_parts_merge(target):
    cu = torch.tensor([0, 3, 7], dtype=INT32, device=target.device)
    q, k, v = (t[0] for t in inputs(target, torch.float32))
    whole_k = torch.tensor([0, 50, 90], dtype=INT32, device=target.device)
    whole, whole_lse = target(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=whole_k, return_lse=True)
    halves = []
    for first, second in ((20, 30), (30, 10)):
        start = (0, 50) if first == 20 else (20, 80)
        rows = torch.cat([torch.arange(start[0], start[0] + first), torch.arange(start[1], start[1] + second)])
        ends = torch.tensor([0, first, first + second], dtype=INT32, device=target.device)
        rows = rows.to(target.device)
        halves.append(target(q, k[rows], v[rows], cu_seqlens_q=cu, cu_seqlens_k=ends, return_lse=True))
    out, lse = merge_attention(*zip(*halves))
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.serves("kv_cache")
def test_a_shared_prefix_merges_with_each_sequences_own_cache(target):
    """Prefix caching: the prefix is read once for all sequences, each one's own keys from its cache."""
    q, k, v = inputs(target, target.widest, length=60, seqlen_q=1, dims=(64, 64))
    prefix_k, prefix_v = (t[:1, :40] for t in (k, v))
    k, v = (torch.cat([t[:1, :40].expand(2, -1, -1, -1), t[:, 40:]], 1) for t in (k, v))
    rows = q.transpose(0, 1)  # the batch as query rows of one sequence
    shared, shared_lse = target(rows, prefix_k, prefix_v, return_lse=True)
    own, own_lse = attention_with_kvcache(
        q, k[:, 40:].contiguous(), v[:, 40:].contiguous(), cache_seqlens=20, return_lse=True, backend=target.backend
    )
    out, lse = merge_attention([shared.transpose(0, 1), own], [shared_lse.permute(2, 1, 0), own_lse])
    want, want_lse = oracle(q, k, v)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5 if q.dtype == torch.float32 else 2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


def rows(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


OUT, LSE = rows(2, 5, 4, 8), rows(2, 4, 5)
BAD = {
    "outs a tensor": ((OUT, [LSE]), TypeError, "outs", "list or tuple"),
    "lses a tensor": (([OUT], LSE), TypeError, "lses", "list or tuple"),
    "a part that is no tensor": (([OUT, 1.0], [LSE, LSE]), TypeError, "outs", "torch.Tensor"),
    "an lse that is no tensor": (([OUT], [None]), TypeError, "lses", "torch.Tensor"),
    "no parts": (([], []), ValueError, "outs", "at least 1"),
    "more outs than lses": (([OUT, OUT], [LSE]), ValueError, "lses", "equally many"),
    "integers": (([rows(2, 5, 4, 8, dtype=INT32)], [LSE]), TypeError, "outs", "floating-point"),
    "an out of fp8": (([OUT.to(torch.float8_e4m3fn)], [LSE]), TypeError, "outs", "16 bits"),
    "a sink of fp8": (([OUT], [LSE], rows(4).to(torch.float8_e4m3fn)), TypeError, "sink", "16 bits"),
    "an out of rank 2": (([rows(5, 4)], [rows(4, 5)]), ValueError, "outs", "(batch, seqlen, heads, head_dim)"),
    "outs of two dtypes": (([OUT, OUT.half()], [LSE, LSE]), TypeError, "outs", "entry 0 has torch.float32"),
    "outs of two shapes": (([OUT, rows(2, 5, 4, 9)], [LSE, LSE]), ValueError, "outs", "(2, 5, 4, 8)"),
    "an lse heads last": (([OUT], [rows(2, 5, 4)]), ValueError, "lses", "(2, 4, 5)"),
    "an lse elsewhere": (([OUT], [LSE.to("meta")]), ValueError, "lses", "on cpu"),
    "a sink that is a number": (([OUT], [LSE], 0.5), TypeError, "sink", "torch.Tensor"),
    "a sink of another length": (([OUT], [LSE], rows(3)), ValueError, "sink", "(4,)"),
    "a sink of integers": (([OUT], [LSE], rows(4, dtype=INT32)), TypeError, "sink", "floating-point"),
    "a sink elsewhere": (([OUT], [LSE], rows(4).to("meta")), ValueError, "sink", "on cpu"),
}


@pytest.mark.parametrize(("call", "error", "argument", "accepted"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(call, error, argument, accepted):
    with pytest.raises(error) as caught:
        merge_attention(*call)
    assert argument in str(caught.value)
    assert accepted in str(caught.value)


def test_compile_merges_in_one_graph():
    parts = [torch.randn(2, 5, 4, 8) for _ in range(2)], [torch.randn(2, 4, 5) for _ in range(2)]
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*parts), merge_attention(*parts)):
        torch.testing.assert_close(a, b)
