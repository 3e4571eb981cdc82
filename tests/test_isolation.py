"""What a NaN or an infinity may reach: nothing crosses a sequence, a batch element, a KV head or a length.

Rows past seqused and past the last sequence hold NaN in every drawn case already (fa4_core/strategies.py).
"""

import math

import pytest
import torch
from oracle import oracle

from fa4_core.checks import run
from fa4_core.strategies import Case

LENGTHS = ((33, 70), (65, 20), (64, 64))
PER_TENSOR = ["q", "k", "v"]


def results(target, call, **tensors):
    call = call._replace(**tensors)
    options = {**call.options, "deterministic": True}
    return run(target, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **options)


def packed(target, dtype=torch.float16, **changed):
    case = Case(dtype=dtype, head_dim=64, head_dim_v=64, heads_q=2, lengths=LENGTHS, varlen=True, **changed)
    return case.build(target.device)


def with_nan(tensor, index):
    poisoned = tensor.clone()
    poisoned[index] = math.nan
    return poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_never_shows_in_its_neighbours(target, causal, value):
    """Bit for bit, results and gradients: a tile that straddles two sequences reads the neighbour's rows."""
    call = packed(target, causal=causal)
    clean = results(target, call)
    (q0, q1), (k0, k1) = (33, 98), (70, 90)
    poisoned = {name: getattr(call, name).clone() for name in ("q", "k", "v", "dout")}
    for name, (start, end) in zip(("q", "k", "v", "dout"), ((q0, q1), (k0, k1), (k0, k1), (q0, q1))):
        poisoned[name][start:end] = value
    dirty = results(target, call, **poisoned)
    for name in ("out", "dq"):
        assert torch.equal(dirty[name][:q0], clean[name][:q0]), name
        assert torch.equal(dirty[name][q1:], clean[name][q1:]), name
    assert torch.equal(dirty["lse"][:, :q0], clean["lse"][:, :q0])
    assert torch.equal(dirty["lse"][:, q1:], clean["lse"][:, q1:])
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][:k0], clean[name][:k0]), name
        assert torch.equal(dirty[name][k1:], clean[name][k1:]), name


@pytest.mark.parametrize("tensor", PER_TENSOR)
def test_a_batch_element_and_a_kv_head_never_show_in_others(target, tensor):
    """Bit for bit. Element 1 and KV head 1 (query heads 2 and 3) are NaN throughout."""
    case = Case(dtype=torch.float16, head_dim=64, head_dim_v=64, heads_q=4, heads_kv=2, lengths=((65, 70),) * 3)
    call = case.build(target.device)
    clean = results(target, call)
    dirty = results(target, call, **{tensor: with_nan(getattr(call, tensor), 1)})
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(dirty[name][::2], clean[name][::2]), name
    heads = slice(2, 4) if tensor == "q" else 1
    dirty = results(target, call, **{tensor: with_nan(getattr(call, tensor), (slice(None), slice(None), heads))})
    for name in ("out", "dq"):
        assert torch.equal(dirty[name][:, :, :2], clean[name][:, :, :2]), name
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][:, :, 0], clean[name][:, :, 0]), name


def one_sequence(target, dtype, **changed):
    case = Case(dtype=dtype, head_dim=64, head_dim_v=64, lengths=((130, 150),), causal=True, **changed)
    return case.build(target.device)


def test_a_nan_in_a_query_reaches_its_row_only(target, dtype):
    call = one_sequence(target, dtype)
    clean, clean_lse = target(call.q, call.k, call.v, return_lse=True, **call.options)
    q = with_nan(call.q, (0, 65, 0, 3))
    out, lse = target(q, call.k, call.v, return_lse=True, **call.options)
    others = torch.arange(130) != 65
    assert out[0, 65].isnan().all()
    assert lse[0, 0, 65].isnan()
    assert torch.equal(out[:, others], clean[:, others])
    assert torch.equal(lse[..., others], clean_lse[..., others])


@pytest.mark.parametrize("key", [0, 64, 100, 149])
def test_a_nan_in_a_key_reaches_every_row_that_sees_it_and_no_other(target, dtype, key):
    """Both ways: a maximum or a clamp that drops NaN returns plausible numbers instead (seen upstream)."""
    call = one_sequence(target, dtype)
    clean, clean_lse = target(call.q, call.k, call.v, return_lse=True, **call.options)
    k = with_nan(call.k, (0, key, 0, 5))
    out, lse = target(call.q, k, call.v, return_lse=True, **call.options)
    sees = torch.arange(130) + 20 >= key
    assert out[:, sees].isnan().all()
    assert lse[..., sees].isnan().all()
    assert torch.equal(out[:, ~sees], clean[:, ~sees])
    assert torch.equal(lse[..., ~sees], clean_lse[..., ~sees])


def test_a_nan_in_a_key_beyond_a_window_or_a_length_is_not_seen(target):
    call = Case(dtype=torch.float16, head_dim=64, head_dim_v=64, lengths=((130, 150),), window=(9, 9)).build(
        target.device
    )
    clean = target(call.q, call.k, call.v, **call.options)
    out = target(call.q, with_nan(call.k, (0, 75)), call.v, **call.options)
    diagonal = torch.arange(130) + 20
    sees = (diagonal - 9 <= 75) & (diagonal + 9 >= 75)
    assert out[:, sees].isnan().all()
    assert torch.equal(out[:, ~sees], clean[:, ~sees])


def test_a_nan_in_a_value_reaches_every_row_that_sees_it(target, dtype):
    """It may show in other rows of its sequence too, whose tile holds it masked, but never changes a finite result."""
    call = one_sequence(target, dtype)
    clean, clean_lse = target(call.q, call.k, call.v, return_lse=True, **call.options)
    out, lse = target(call.q, call.k, with_nan(call.v, (0, 100, 0, 7)), return_lse=True, **call.options)
    sees = torch.arange(130) + 20 >= 100
    assert out[0, sees, 0, 7].isnan().all()
    assert not out[0, :, 0, 8].isnan().any()
    kept = ~out.isnan()
    assert torch.equal(out[kept], clean[kept])
    assert torch.equal(lse, clean_lse)


def test_infinities_act_as_in_float64(target, dtype):
    """A score of -inf drops its key, one of +inf makes its row NaN, an infinite value shows where it has weight."""
    call = one_sequence(target, dtype)
    k, v, q = call.k.clone(), call.v.clone(), call.q.clone()
    k[0, 10, 0, 0] = -math.inf
    v[0, 20, 0, 1] = math.inf
    q[0, 77, 0, 2] = math.inf
    out, lse = target(q, k, v, return_lse=True, **call.options)
    want, want_lse = oracle(q.cpu(), k.cpu(), v.cpu(), causal=True)
    torch.testing.assert_close(out.double().cpu(), want, atol=2e-2, rtol=2e-2, equal_nan=True)
    finite = want_lse.isfinite()
    torch.testing.assert_close(lse.double().cpu()[finite], want_lse[finite], atol=1e-4, rtol=1e-4)
    assert not lse.cpu()[~finite].isfinite().any()


def test_rows_whose_scores_are_all_minus_infinity_count_as_rows_without_a_key(target):
    """O = 0, LSE = -inf, and P = 0 in the backward, where exp(s - LSE) is exp(-inf + inf)."""
    q = torch.ones(1, 3, 1, 16, dtype=torch.float16, device=target.device)
    k = torch.full((1, 2, 1, 16), -math.inf, dtype=torch.float16, device=target.device)
    v = torch.ones(1, 2, 1, 16, dtype=torch.float16, device=target.device, requires_grad=True)
    out, lse = target(q, k, v, return_lse=True)
    assert (out == 0.0).all()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert (v.grad == 0.0).all()


@pytest.mark.parametrize("arriving", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("sink", [None, "off"])
def test_what_arrives_at_the_lse_of_a_row_without_keys_goes_nowhere(target, sink, arriving):
    """Merging partial results by their LSE sends infinities there; 0 * inf in dS would reach every key of the tile."""
    case = Case(dtype=torch.float16, head_dim=64, head_dim_v=64, lengths=((80, 30),), causal=True, sink=sink)
    call = case.build(target.device)
    clean = results(target, call)
    dlse = call.dlse.clone()
    dlse[..., :50] = arriving
    dirty = results(target, call, dlse=dlse)
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)
