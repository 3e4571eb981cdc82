"""What must hold between calls, whatever the kernel: each property is checked on drawn lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import packed_oracle

from fa4_core.checks import compare, expected, run
from fa4_core.strategies import Case

LENGTH = st.sampled_from((1, 16, 17, 64, 65)) | st.integers(1, 90)
SEED = st.integers(0, 1000)
D64 = {"dtype": torch.float16, "head_dim": 64, "head_dim_v": 64}


def within(name, got, call, options=None):
    """Asserts that `got` is within float64's budget of another, equivalent call."""
    want = expected(call.q, call.k, call.v, **(call.options if options is None else options))
    finding = compare(name, got, want[name])
    assert finding.passed, finding.message


@given(lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4).map(tuple), seed=SEED, causal=st.booleans())
def test_varlen_equals_a_loop_over_its_sequences(target, lengths, seed, causal):
    """Against the tests' own oracle: offsets into q, k or lse that are taken from a neighbour."""
    case = Case(**D64, heads_q=2, lengths=lengths, varlen=True, causal=causal, seed=seed)
    q, k, v, options, *_ = case.build(target.device)
    out, lse = target(q, k, v, return_lse=True, **options)
    ends = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    want, want_lse = packed_oracle(q, k, v, *ends, causal=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_future_keys_do_not_matter_under_causal(target, len_q, len_k, seed):
    """Bit for bit: rows before a changed key cannot know."""
    q, k, v, *_ = Case(**D64, lengths=((len_q, len_k),), seed=seed).build(target.device)
    cut = len_k // 2
    other_k, other_v = k.clone(), v.clone()
    other_k[:, cut:], other_v[:, cut:] = 5.0, -7.0
    before = max(0, min(len_q, len_q - len_k + cut))
    first, second = (target(q, k_, v_, causal=True)[:, :before] for k_, v_ in ((k, v), (other_k, other_v)))
    assert torch.equal(first, second)


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_key_order_does_not_matter_without_a_mask(target, len_q, len_k, seed):
    call = Case(**D64, lengths=((len_q, len_k),), seed=seed).build(target.device)
    order = torch.randperm(len_k, generator=torch.Generator().manual_seed(seed)).to(target.device)
    out, lse = target(call.q, call.k[:, order], call.v[:, order], return_lse=True)
    within("out", out, call)
    within("lse", lse, call)


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_a_constant_added_to_all_scores_of_a_row_changes_only_its_lse(target, len_q, len_k, seed):
    """The pivot must cancel. A last column of ones in K lets q add a constant that differs from row to row."""
    call = Case(**D64, lengths=((len_q, len_k),), seed=seed).build(target.device)
    call.k[..., -1] = 1.0
    call.q[..., -1] = 0.0
    moved = call.q.clone()
    # 64 * (0.125 * i) / sqrt(64): multiples of 1 up to 12, exact in float16.
    steps = torch.arange(len_q, device=target.device) % 13
    moved[..., -1] = 8.0 * steps.half()[None, :, None]
    out, lse = target(moved, call.k, call.v, return_lse=True)
    within("out", out, call)
    within("lse", lse - steps, call._replace(q=call.q))


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_a_sink_of_minus_infinity_is_no_sink(target, len_q, len_k, seed):
    """Also on rows without keys, where the sink's logit is the only one (seen elsewhere: NaN)."""
    case = Case(**D64, heads_q=2, lengths=((len_q, len_k),), causal=True, sink="off", seed=seed)
    call = case.build(target.device)
    plain = {name: value for name, value in call.options.items() if name != "sink"}
    got = run(target, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options)
    assert not got.pop("dsink").any()
    want = expected(call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **plain)
    for name, result in got.items():
        finding = compare(name, result, want[name])
        assert finding.passed, finding.message


@given(len_q=LENGTH, len_k=LENGTH, group=st.integers(2, 4), seed=SEED)
def test_kv_heads_repeated_equal_gqa(target, len_q, len_k, group, seed):
    """Query head h reads KV head h // group; dk and dv of the repeated heads add up to GQA's."""
    case = Case(**D64, heads_q=2 * group, heads_kv=2, lengths=((len_q, len_k),), causal=True, seed=seed)
    call = case.build(target.device)
    want = expected(call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, causal=True)
    k, v = (t.repeat_interleave(group, 2) for t in (call.k, call.v))
    got = run(target, call.q, k, v, dout=call.dout, dlse=call.dlse, causal=True)
    for name in ("out", "lse", "dq"):
        finding = compare(name, got[name], want[name])
        assert finding.passed, finding.message
    for name in ("dk", "dv"):
        total = got[name].double().unflatten(2, (2, group)).sum(3)
        torch.testing.assert_close(total, want[name].value, atol=2e-2, rtol=2e-2)


@given(len_q=LENGTH, len_k=LENGTH, scale=st.sampled_from((0.5, 2.0)), seed=SEED)
def test_a_scale_equals_scaled_queries(target, len_q, len_k, scale, seed):
    """Powers of two, exact in float16. A scale applied twice, or to the sink, shows."""
    call = Case(**D64, lengths=((len_q, len_k),), sink="normal", seed=seed).build(target.device)
    options = {**call.options, "softmax_scale": 0.125 * scale}
    within("out", target(call.q * scale, call.k, call.v, sink=call.options["sink"]), call, options)


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_a_huge_softcap_is_none(target, len_q, len_k, seed):
    call = Case(**D64, lengths=((len_q, len_k),), seed=seed).build(target.device)
    options = {**call.options, "softcap": 3000.0}
    out = target(call.q, call.k, call.v, **options)
    torch.testing.assert_close(out, target(call.q, call.k, call.v), atol=2e-3, rtol=2e-3)


@given(len_q=LENGTH, len_k=LENGTH, seed=SEED)
def test_values_of_one_give_one(target, len_q, len_k, seed):
    """Rows of P sum to 1, or the row sees no key and is 0. A denominator that misses a tile shows."""
    call = Case(**D64, lengths=((len_q, len_k),), causal=True, seed=seed).build(target.device)
    out = target(call.q, call.k, torch.ones_like(call.v), causal=True)
    sees_keys = torch.arange(len_q, device=target.device) >= len_q - len_k
    want = sees_keys.to(out.dtype)[None, :, None, None].expand_as(out)
    torch.testing.assert_close(out, want, atol=1e-3, rtol=0.0)


def test_a_strided_sink_and_strided_index_tensors_are_read_as_they_are(target):
    """A kernel that takes a vector's pointer alone reads the elements between, here NaN and lengths past the end."""
    case = Case(
        **D64, heads_q=2, lengths=((20, 30), (5, 9)), varlen=True, used=((18, 5), (30, 4)), sink="normal", seed=3
    )
    q, k, v, options, dout, _ = case.build(target.device)

    def spread(tensor):
        between = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 2**30)
        return torch.stack((tensor, between), 1)[:, 0]

    vectors = {name: t.detach() for name, t in options.items() if isinstance(t, torch.Tensor)}
    results = []
    for arranged in (vectors, {name: spread(t) for name, t in vectors.items()}):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, arranged["sink"])]
        out = target(*leaves[:3], **{**options, **arranged, "sink": leaves[3]})
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
