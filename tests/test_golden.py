"""Small cases with their results worked out by hand."""

import math

import pytest
import torch

E = math.e
# Two queries, two keys, scale 1: scores are the identity, so a row's weights are e / (e + 1) and 1 / (e + 1).
HIGH, LOW = E / (E + 1), 1 / (E + 1)
VALUES = [[1.0, 2.0], [3.0, 4.0]]


@pytest.fixture
def two_by_two(target):
    eye = torch.eye(2, dtype=target.widest, device=target.device)[None, :, None, :]
    v = torch.tensor(VALUES, dtype=target.widest, device=target.device)[None, :, None, :]
    return eye.clone(), eye.clone(), v


def close(got, want):
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-3  # of values up to 4
    want = torch.tensor(want, dtype=got.dtype).view(got.shape)
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=tolerance)


def test_two_by_two(target, two_by_two):
    out, lse = target(*two_by_two, softmax_scale=1.0, return_lse=True)
    close(out, [[HIGH + 3 * LOW, 2 * HIGH + 4 * LOW], [LOW + 3 * HIGH, 2 * LOW + 4 * HIGH]])
    close(lse, [math.log(E + 1)] * 2)


def test_two_by_two_causal(target, two_by_two):
    out, lse = target(*two_by_two, softmax_scale=1.0, causal=True, return_lse=True)
    close(out, [VALUES[0], [LOW + 3 * HIGH, 2 * LOW + 4 * HIGH]])
    close(lse, [1.0, math.log(E + 1)])


def test_two_by_two_sink(target, two_by_two):
    """A sink of log 1 = 0 adds 1 to the denominator and has no value; the softmax scale does not touch it."""
    out, lse = target(*two_by_two, softmax_scale=1.0, sink=torch.zeros(1, device=target.device), return_lse=True)
    total = E + 2
    close(out, [[(E + 3) / total, (2 * E + 4) / total], [(1 + 3 * E) / total, (2 + 4 * E) / total]])
    close(lse, [math.log(total)] * 2)


def test_two_by_two_softcap(target, two_by_two):
    """c tanh(s / c) with c = 1/2: scores of 1 become tanh(2) / 2, scores of 0 stay."""
    high = math.exp(math.tanh(2.0) / 2)
    _, lse = target(*two_by_two, softmax_scale=1.0, softcap=0.5, return_lse=True)
    close(lse, [math.log(high + 1)] * 2)


def test_two_by_two_gradients(target, two_by_two):
    """dO = 1: dP = (3, 7), dS = P (dP - P.dP) = -+4 HIGH LOW."""
    q, k, v = (t.requires_grad_() for t in two_by_two)
    target(q, k, v, softmax_scale=1.0).sum().backward()
    slope = 4 * HIGH * LOW
    close(q.grad, [[-slope, slope]] * 2)
    close(k.grad, [[-slope, -slope], [slope, slope]])
    close(v.grad, [[1.0, 1.0]] * 2)


def test_two_by_two_gradients_through_lse(target, two_by_two):
    """d lse_i / d s_ij = P_ij; V has no part in it."""
    q, k, v = (t.requires_grad_() for t in two_by_two)
    target(q, k, v, softmax_scale=1.0, return_lse=True)[1].sum().backward()
    close(q.grad, [[HIGH, LOW], [LOW, HIGH]])
    close(k.grad, [[HIGH, LOW], [LOW, HIGH]])
    close(v.grad, [[0.0, 0.0]] * 2)


def test_sink_gradient_by_hand(target, two_by_two):
    """d lse / d sink = its share 1 / (e + 2), in each of two rows."""
    sink = torch.zeros(1, device=target.device, requires_grad=True)
    target(*two_by_two, softmax_scale=1.0, sink=sink, return_lse=True)[1].sum().backward()
    close(sink.grad, [2 / (E + 2)])


def test_one_key_returns_its_value(target, dtype):
    """P is 1 exactly, whatever the score; rounding anywhere shows (float32 products are three TF32 ones: 2^-22)."""
    q, k, v = (torch.randn(1, 5 if i == 0 else 1, 1, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q, k, v = (t.to(dtype).to(target.device) for t in (q, k, v))
    tolerance = 2.0**-21 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(target(q, k, v), v.expand(1, 5, 1, 32), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("sink", [None, 0.7])
def test_rows_without_a_key(target, dtype, sink):
    """Causal with 3 queries and 1 key: rows 0 and 1 see nothing: O = 0, LSE = -inf or the sink's logit."""
    q, k, v = (torch.ones(1, n, 1, 32, dtype=dtype, device=target.device) for n in (3, 1, 1))
    sink = None if sink is None else torch.tensor([sink], device=target.device)
    out, lse = target(q, k, v, causal=True, sink=sink, return_lse=True)
    assert (out[0, :2] == 0.0).all()
    close(lse[0, 0, :2], [-math.inf if sink is None else sink.item()] * 2)
    assert (out[0, 2] > 0.0).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_empty_dimensions(target, shape):
    """Batch, queries or keys of 0 are valid; their gradients have the right shapes and are 0."""
    batch, len_q, len_k = shape
    q = torch.randn(batch, len_q, 4, 16, dtype=target.widest, device=target.device, requires_grad=True)
    k = torch.randn(batch, len_k, 2, 16, dtype=target.widest, device=target.device, requires_grad=True)
    v = torch.randn(batch, len_k, 2, 24, dtype=target.widest, device=target.device, requires_grad=True)
    out, lse = target(q, k, v, return_lse=True)
    assert out.shape == (batch, len_q, 4, 24)
    assert lse.shape == (batch, 4, len_q)
    if len_k == 0:
        assert (out == 0.0).all()
        assert (lse == -math.inf).all()
    out.sum().backward()
    for leaf in (q, k, v):
        assert leaf.grad.shape == leaf.shape
        if 0 in shape:
            assert not leaf.grad.any()


def test_result_dtypes_and_shapes(target, dtype):
    q = torch.randn(2, 5, 6, 40, device=target.device).to(dtype)
    k, v = (
        torch.randn(2, 7, 2, 40, device=target.device).to(dtype),
        torch.randn(2, 7, 2, 24, device=target.device).to(dtype),
    )
    out, lse = target(q, k, v, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 5, 6, 24), dtype)
    assert (lse.shape, lse.dtype) == ((2, 6, 5), torch.float32)
    cu_q, cu_k = (torch.tensor([0, 3, n], dtype=torch.int32, device=target.device) for n in (5, 7))
    out, lse = target(q[0], k[0], v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    assert (out.shape, lse.shape) == ((5, 6, 24), (6, 5))
    assert isinstance(target(q, k, v), torch.Tensor)
