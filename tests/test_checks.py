"""The checks themselves: they agree with the tests' oracle, accept PyTorch's attention and refuse wrong ones."""

import math

import pytest
import torch
from hypothesis import given
from oracle import oracle, packed_oracle

from dispatch import attention
from fa4_core.checks import Expected, check_backward, check_forward, compare, expected
from fa4_core.strategies import Case, cases


@given(case=cases(varlen=False, used_sides=(False, False), longest=40, max_head_dim=24))
def test_expected_values_equal_the_oracles_with_gradients_by_autograd(case):
    """Written apart: formulas here, autograd through torch.softmax there."""
    call = case.build()
    sink = call.options.get("sink")
    leaves = [t.double().requires_grad_() for t in (call.q, call.k, call.v, sink) if t is not None]
    rules = {name: call.options[name] for name in ("causal", "window", "softmax_scale", "softcap")}
    out, lse = oracle(*leaves[:3], sink=leaves[3] if sink is not None else None, **rules)
    loss = (out * call.dout.double()).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * call.dlse.double()).sum()
    grads = torch.autograd.grad(loss, leaves)
    want = expected(call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options)
    for name, value in zip(("out", "lse", "dq", "dk", "dv", "dsink"), (out, lse, *grads)):
        torch.testing.assert_close(want[name].value, value.detach(), atol=1e-10, rtol=1e-9)


def test_expected_values_of_packed_sequences_equal_a_loop_of_oracles():
    call = Case(lengths=((9, 4), (0, 3), (5, 12)), varlen=True, heads_q=2, causal=True, sink="normal").build()
    ends = call.options["cu_seqlens_q"].tolist(), call.options["cu_seqlens_k"].tolist()
    out, lse = packed_oracle(call.q, call.k, call.v, *ends, causal=True, sink=call.options["sink"])
    want = expected(call.q, call.k, call.v, **call.options)
    torch.testing.assert_close(want["out"].value, out)
    torch.testing.assert_close(want["lse"].value, lse)


def torchs_own(q, k, v, *, causal, return_lse, **_):
    """PyTorch's scaled_dot_product_attention in the dtype of the call; the LSE from float32 scores."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return out.transpose(1, 2), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", ["normal", "large"])
def test_pytorchs_own_attention_passes(dtype, causal, scores):
    """A budget that a careful implementation cannot keep would be of no use.

    The backward in float32 only: PyTorch's on the CPU adds 16-bit blocks up in 16 bits, where the budget asks for one
    sum in float32.
    """
    case = Case(dtype=dtype, head_dim=64, head_dim_v=64, heads_q=2, heads_kv=2, lengths=((150, 150),) * 2,
                causal=causal, scores=scores)  # fmt: skip
    call = case.build()
    check_forward(torchs_own, call.q, call.k, call.v, **call.options).require()
    if dtype == torch.float32:
        check_backward(torchs_own, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options).require()


@pytest.fixture
def flushing():
    """This processor as a GPU: what falls below float32's normal numbers is 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers to zero")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("keys", [255, 600])
def test_probabilities_that_are_flushed_to_zero_pass(flushing, keys, seed):
    """One query far from nearly all keys: their P of some 2^-130 are lost, times a dP of hundreds, in dK."""
    case = Case(dtype=torch.float32, head_dim=64, head_dim_v=64, heads_q=2, heads_kv=2, lengths=((1, keys),),
                scores="large", seed=seed)  # fmt: skip
    call = case.build()
    check_backward(attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options).require()


def edited(**edits):
    """An attention whose results pass through `edits` (by name: out, lse) or whose arguments do (any other name)."""

    def wrong(q, k, v, *, return_lse, **options):
        arguments = {"q": q, "k": k, "v": v, **options}
        changed = {name: edit(arguments[name]) for name, edit in edits.items() if name in arguments}
        out, lse = attention(**{**arguments, **changed}, return_lse=True)
        return edits.get("out", lambda t: t)(out), edits.get("lse", lambda t: t)(lse)

    return wrong


def put(where, value):
    def edit(tensor):
        tensor = tensor.clone()
        tensor[where] = value
        return tensor

    return edit


def tf32(tensor):
    """The 10 bits of mantissa that a TF32 product keeps, with the gradient passed through."""
    kept = (tensor.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return tensor + (kept - tensor.detach())


class HalfGradient(torch.autograd.Function):
    """A backward that loses the second query head's share of a gradient."""

    @staticmethod
    def forward(ctx, q):
        return q.view_as(q)

    @staticmethod
    def backward(ctx, grad):
        return torch.cat((grad[:, :, :1], 0 * grad[:, :, 1:]), 2)


LONG = Case(dtype=torch.bfloat16, head_dim=64, head_dim_v=64, heads_q=2, lengths=((60, 1500),), causal=True)
FP32 = Case(head_dim=64, head_dim_v=64, heads_q=2, lengths=((60, 90),), causal=True, sink="normal")
WRONG = {
    "a NaN in one element": (LONG, edited(out=put((0, 59, 0, 3), math.nan)), "out"),
    "a row that is 0": (LONG, edited(out=put((0, 59, 0), 0.0)), "out"),
    "a long row that is a tenth off": (LONG, edited(out=lambda t: t * 1.1), "out"),
    "a scale 1 % off": (FP32, edited(softmax_scale=lambda _: 0.125 * 1.01), "out"),
    "no sink": (FP32, edited(sink=lambda t: t - 100.0), "lse"),
    "log2 units": (FP32, edited(lse=lambda t: t / math.log(2)), "lse"),
    "an lse of -inf": (FP32, edited(lse=put((0, 1, 5), -math.inf)), "lse"),
    "one key too few on the right": (FP32, edited(causal=lambda _: False, window=lambda _: (None, 1)), "out"),
    "tf32 products": (FP32, edited(q=tf32, k=tf32), "out"),
    "a float32 call in bfloat16": (FP32, edited(v=lambda t: t.bfloat16().float()), "out"),
    "a lost gradient": (FP32, edited(q=HalfGradient.apply), "dq"),
    "a gradient twice": (FP32, edited(k=lambda t: t + (t - t.detach())), "dk"),
    "a sink's gradient twice": (FP32, edited(sink=lambda t: t + (t - t.detach())), "dsink"),
}


@pytest.mark.parametrize(("case", "wrong", "where"), WRONG.values(), ids=WRONG.keys())
def test_wrong_attention_is_refused(case, wrong, where):
    call = case.build()
    report = check_backward(wrong, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options)
    assert where in [finding.name for finding in report.findings if not finding.passed]
    with pytest.raises(AssertionError, match="float64 gives"):
        report.require()


def test_a_key_lost_on_a_long_row_is_refused_where_a_budget_over_the_tensor_would_pass():
    """Row 0 sees one key and is about 1; row 1499 sees 1,500 and is about 1/40: its error would hide in row 0's."""
    case = Case(dtype=torch.bfloat16, head_dim=64, head_dim_v=64, lengths=((1500, 1500),), causal=True)
    call = case.build()
    k, v = call.k.clone(), call.v.clone()
    k[:, 507], v[:, 507] = 0.0, 0.0

    def lossy(q, *_, **options):
        out, lse = attention(q, call.k, call.v, **options)
        out[:, 1200:] = attention(q, k, v, **options)[0][:, 1200:]
        return out, lse

    report = check_forward(lossy, call.q, call.k, call.v, **call.options)
    assert not report.findings[0].passed
    want = expected(call.q, call.k, call.v, **call.options)["out"].value
    whole = (lossy(call.q, return_lse=True, **call.options)[0].double() - want).abs().max()
    assert whole < 2.0**-7 * want.abs().max()


def test_a_nan_of_float64s_must_be_there():
    """A NaN that an implementation loses is as wrong as one that it makes."""
    want = Expected(torch.tensor([math.nan, 1.0], dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64))
    assert compare("out", torch.tensor([math.nan, 1.05]), want).passed
    assert not compare("out", torch.tensor([0.0, 1.0]), want).passed
    assert not compare("out", torch.tensor([math.nan, math.nan]), want).passed


def test_infinities_must_have_the_right_sign():
    want = Expected(torch.tensor([math.inf, -math.inf], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert compare("lse", torch.tensor([math.inf, -math.inf]), want).passed
    assert not compare("lse", torch.tensor([-math.inf, -math.inf]), want).passed
    assert not compare("lse", torch.tensor([math.inf, 0.0]), want).passed


def test_a_wrong_shape_fails_and_says_so():
    finding = compare("out", torch.zeros(2, 3), Expected(torch.zeros(3, 2).double(), torch.zeros(3, 1).double()))
    assert not finding.passed
    assert "shape (2, 3), expected (3, 2)" in finding.message


def test_a_message_names_the_worst_element():
    want = Expected(torch.zeros(2, 3).double(), torch.full((2, 1), 0.5).double())
    finding = compare("dk", torch.tensor([[0.0, 0.0, 0.0], [0.1, 4.0, 0.6]]), want)
    assert finding.ratio == 8.0
    assert finding.message.startswith("dk[1, 1]: 4, float64 gives 0")
    assert "2 of 6 elements" in finding.message
