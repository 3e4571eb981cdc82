"""Gradients as autograd sees them: through O and LSE, for what asks for one, once, in any layout."""

import pytest
import torch
import torch.utils.checkpoint
from oracle import oracle

from dispatch import attention
from fa4_core.checks import compare, expected
from fa4_core.strategies import Case

FEATURES = {
    "plain": {},
    "causal gqa sink": {"causal": True, "heads_q": 4, "heads_kv": 2, "sink": "normal"},
    "window softcap": {"window": (2, 1), "softcap": 1.5},
    "more queries than keys": {"causal": True, "lengths": ((7, 3),), "sink": "normal"},
    "varlen seqused": {"varlen": True, "lengths": ((3, 4), (5, 2)), "used": ((2, 5), (3, 2)), "tail": (1, 2)},
}


def finite(call):
    """The call with 0 for NaN in the rows that take no part, which numerical differences would move."""
    return call._replace(q=call.q.nan_to_num(0.0), k=call.k.nan_to_num(0.0), v=call.v.nan_to_num(0.0))


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_gradcheck_on_the_reference(features):
    """Against numerical differences: neither float64's formulas in fa4_core/checks.py nor autograd have a part."""
    case = Case(**{"dtype": torch.float64, "head_dim": 3, "head_dim_v": 2, "lengths": ((4, 5),),
                   "sink_dtype": torch.float64, **features})  # fmt: skip
    call = finite(case.build())
    leaves = [
        t.detach().requires_grad_() for t in (call.q, call.k, call.v, call.options.pop("sink", None)) if t is not None
    ]

    def results(q, k, v, sink=None):
        out, lse = attention(q, k, v, sink=sink, return_lse=True, **call.options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(results, leaves)


@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_gradients_through_out_and_lse(target, dtype, through):
    """Each alone, too: an absent gradient reaches the operator as None."""
    case = Case(dtype=dtype, head_dim=64, head_dim_v=64, heads_q=2, lengths=((50, 70),), causal=True, sink="normal")
    call = case.build(target.device)
    dout = call.dout if through != "lse" else None
    dlse = call.dlse if through != "out" else None
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v, call.options["sink"])]
    out, lse = target(*leaves[:3], return_lse=True, **{**call.options, "sink": leaves[3]})
    results = {"out": (out, dout), "lse": (lse, dlse)}
    chosen = list(results.values()) if through == "both" else [results[through]]
    grads = torch.autograd.grad([r for r, _ in chosen], leaves, [g for _, g in chosen])
    want = expected(call.q, call.k, call.v, dout=dout, dlse=dlse, **call.options)
    for name, grad in zip(("dq", "dk", "dv", "dsink"), grads):
        finding = compare(name, grad, want[name])
        assert finding.passed, finding.message


def test_the_gradients_equal_autograds_through_the_oracle(target):
    """The tests' own float64 attention, differentiated by autograd: apart from the formulas the budgets come from."""
    case = Case(dtype=target.widest, head_dim=64, head_dim_v=64, heads_q=4, heads_kv=2, lengths=((40, 50),) * 2,
                window=(20, 5), softcap=5.0, sink="normal")  # fmt: skip
    call = case.build(target.device)

    def grads(function, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (call.q, call.k, call.v, call.options["sink"])]
        out, lse = function(*leaves[:3], window=(20, 5), softcap=5.0, sink=leaves[3])
        loss = (out * call.dout).sum() + (lse * call.dlse).sum()
        return torch.autograd.grad(loss, leaves)

    mine = grads(lambda *a, **o: target(*a, return_lse=True, **o), target.widest)
    cpu = call
    call = cpu._replace(**{name: getattr(cpu, name).cpu() for name in ("q", "k", "v", "dout", "dlse")})
    call.options["sink"] = call.options["sink"].cpu()
    for got, want in zip(mine, grads(oracle, torch.float64)):
        tolerance = 2e-4 if target.widest == torch.float32 else 3e-2
        torch.testing.assert_close(got.cpu().double(), want, atol=tolerance, rtol=tolerance)


def leaves_of(target, **changed):
    case = Case(
        **{"dtype": torch.float16, "head_dim": 64, "head_dim_v": 64, "heads_q": 2, "lengths": ((20, 30),), **changed}
    )
    return case.build(target.device)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_only_what_requires_a_gradient_gets_one(target, wanted):
    call = leaves_of(target)
    tensors = {name: getattr(call, name) for name in "qkv"}
    tensors[wanted] = tensors[wanted].detach().requires_grad_()
    target(**tensors).sum().backward()
    assert tensors[wanted].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_without_gradients_nothing_is_saved(target):
    """Under no_grad, inference_mode, and for inputs that ask for none; the bits are those of a call with gradients."""
    call = leaves_of(target)
    with_grad = target(call.q.detach().requires_grad_(), call.k, call.v)
    assert with_grad.requires_grad
    plain = target(call.q, call.k, call.v)
    assert plain.grad_fn is None
    assert torch.equal(plain, with_grad)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = target(call.q.detach().requires_grad_(), call.k, call.v)
        assert out.grad_fn is None
        assert torch.equal(out, plain)


def test_a_call_in_inference_mode_does_not_spoil_later_ones(target):
    """Seen: the numbers' tensor was kept from inference mode, and autograd then refused to save it."""
    call = leaves_of(target)
    with torch.inference_mode():
        target(call.q, call.k, call.v, softcap=4.75)
    target(call.q.detach().requires_grad_(), call.k, call.v, softcap=4.75).sum().backward()


def test_differentiating_twice_raises(target):
    """Seen: a gradient penalty lost its second-order part in silence, since dO itself required no gradient."""
    call = leaves_of(target)
    q = call.q.detach().requires_grad_()
    out = target(q, call.k, call.v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (out.sum() + dq.square().sum()).backward()


def test_create_graph_alone_is_harmless(target):
    call = leaves_of(target)
    q = call.q.detach().requires_grad_()
    (first,) = torch.autograd.grad(target(q, call.k, call.v, deterministic=True).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(target(q, call.k, call.v, deterministic=True).sum(), q)
    assert torch.equal(first, second)


def test_an_input_changed_in_place_before_the_backward_raises(target):
    """Its saved value is gone; without autograd's version check the gradient would be silently wrong."""
    call = leaves_of(target)
    k = call.k.clone()
    out = target(call.q.detach().requires_grad_(), k, call.v)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_every_memory_layout(target):
    """An expanded dO (from sum()), transposed inputs, K and V broadcast over heads: strides of 0 and of any order."""
    call = leaves_of(target, heads_kv=2, causal=True)
    base = {name: getattr(call, name) for name in "qkv"}
    plain = {name: t.detach().requires_grad_() for name, t in base.items()}
    target(**plain, causal=True, deterministic=True).sum().backward()
    moved = {name: t.transpose(1, 2).contiguous().requires_grad_() for name, t in base.items()}
    target(**{name: t.transpose(1, 2) for name, t in moved.items()}, causal=True, deterministic=True).sum().backward()
    for name in "qkv":
        torch.testing.assert_close(moved[name].grad.transpose(1, 2), plain[name].grad, atol=1e-3, rtol=1e-3)
    one = base["v"][:, :, :1].detach().requires_grad_()
    target(base["q"], base["k"], one.expand_as(base["v"]), causal=True).sum().backward()
    assert one.grad.shape == one.shape


def test_the_sinks_gradient_has_its_dtype(target):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        call = leaves_of(target, sink="normal", sink_dtype=dtype)
        sink = call.options["sink"].requires_grad_()
        target(call.q, call.k, call.v, sink=sink).sum().backward()
        assert sink.grad.dtype == dtype


def test_activation_checkpointing(target):
    """Recomputation under saved-tensor hooks gives the same gradients."""
    call = leaves_of(target)
    q, r = (call.q.detach().clone().requires_grad_() for _ in range(2))
    target(q, call.k, call.v, deterministic=True).sum().backward()
    again = torch.utils.checkpoint.checkpoint(
        lambda x: target(x, call.k, call.v, deterministic=True), r, use_reentrant=False
    )
    again.sum().backward()
    assert torch.equal(q.grad, r.grad)


@pytest.mark.parametrize("how", ["torch.func.jvp", "a dual level"])
def test_forward_mode_differentiation_is_refused(how):
    """PyTorch would otherwise take a tangent of zero for the answer."""
    q, k, v, tangent = torch.randn(4, 1, 5, 2, 8, dtype=torch.float64)
    if how == "torch.func.jvp":
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda q: attention(q, k, v), (q,), (tangent,))
        return
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attention(torch.autograd.forward_ad.make_dual(q, tangent), k, v)
        assert torch.equal(attention(q, k, v), attention(q, k, v, backend="reference"))
