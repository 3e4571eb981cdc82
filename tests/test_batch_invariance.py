"""A sequence's result depends on nothing but the sequence: bit for bit, in whatever company it comes."""

import pytest
import torch

from fa4_core.strategies import Case

KINDS = {
    "full": {},
    "causal gqa": {"causal": True, "heads_q": 4},
    "window softcap sink": {"window": (40, 3), "softcap": 5.0, "sink": "normal"},
}
LENGTHS = [(1, 1), (65, 65), (33, 200), (128, 128), (200, 90)]
LONG = 300


def whole(target, dtype, lengths, **kinds):
    case = Case(dtype=dtype, head_dim=64, head_dim_v=64, lengths=(lengths,), seed=7, **{"heads_q": 2, **kinds})
    return case.build(target.device)


def packed_call(call, target, before, after):
    """The call's one sequence, packed between sequences of the given (query, key) lengths."""
    random = torch.Generator().manual_seed(1)

    def joined(tensor, side):
        rows = [torch.randn((pair[side], *tensor.shape[2:]), generator=random) for pair in (*before, *after)]
        rows = [r.to(tensor.dtype).to(tensor.device) for r in rows]
        return torch.cat([*rows[: len(before)], tensor[0], *rows[len(before) :]])

    q, k, v = joined(call.q, 0), joined(call.k, 1), joined(call.v, 1)
    lengths = [*before, (call.q.shape[1], call.k.shape[1]), *after]
    cu = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).int().to(target.device) for side in (0, 1)]
    start = sum(pair[0] for pair in before)
    return q, k, v, {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}, slice(start, start + call.q.shape[1])


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_dense_equals_varlen_in_any_company(target, dtype, kinds):
    """Alone, first, last, between, beside a long neighbour; with max_seqlen absent, exact and ten times too large."""
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    long = 130 if target.interpreted else LONG
    for lengths in LENGTHS[1:3] if target.interpreted else LENGTHS:
        call = whole(target, dtype, lengths, **kinds)
        options = call.options
        alone, alone_lse = target(call.q, call.k, call.v, return_lse=True, **options)
        companies = [((), ()), ((), ((9, 20),)), (((70, 3),), ()), (((9, 0), (0, 9)), ((long, long),))]
        for before, after in companies[2:] if target.interpreted else companies:
            q, k, v, cu, mine = packed_call(call, target, before, after)
            longest = [int((c[1:] - c[:-1]).max()) for c in cu.values()]
            for factor in (None, 10) if target.interpreted else (None, 1, 10):
                hint = {f"max_seqlen_{side}": factor * n for side, n in zip("qk", longest)} if factor else {}
                out, lse = target(q, k, v, return_lse=True, **options, **cu, **hint)
                assert torch.equal(out[mine], alone[0]), (lengths, before, after, hint)
                assert torch.equal(lse[:, mine], alone_lse[0]), (lengths, before, after, hint)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_a_batch_element_equals_itself_alone(target, dtype, kinds):
    """A split or a tile chosen by the batch size would show here."""
    call = Case(dtype=dtype, head_dim=64, head_dim_v=64, lengths=((90, 130),) * 5, **{"heads_q": 2, **kinds}).build(
        target.device
    )
    together = target(call.q, call.k, call.v, **call.options)
    for i in (0, 4):
        alone = target(call.q[i : i + 1], call.k[i : i + 1], call.v[i : i + 1], **call.options)
        assert torch.equal(together[i : i + 1], alone)


def test_seqused_equals_the_shorter_sequence(target):
    """A cache with room for more keys gives the bits of one that ends with them."""
    if target.gathers:
        pytest.skip("the reference on a GPU computes on whole ranges of rows, and cuBLAS rounds by the shape")
    call = Case(dtype=torch.float16, head_dim=64, head_dim_v=64, heads_q=2, lengths=((40, 200),), causal=True).build(
        target.device
    )
    used = torch.tensor([90], dtype=torch.int32, device=target.device)
    out = target(call.q, call.k, call.v, causal=True, seqused_k=used)
    assert torch.equal(out, target(call.q, call.k[:, :90], call.v[:, :90], causal=True))


def test_two_calls_give_the_same_bits(target, dtype):
    """Forward always, backward on request: atomics in an unordered sum would show sooner or later."""
    call = Case(dtype=dtype, head_dim=64, head_dim_v=64, heads_q=4, lengths=((150, 150),) * 2, causal=True,
                sink="normal", deterministic=True).build(target.device)  # fmt: skip

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v, call.options["sink"])]
        options = {**call.options, "sink": leaves[3]}
        out, lse = target(*leaves[:3], return_lse=True, **options)
        return (out, lse, *torch.autograd.grad([out, lse], leaves, [call.dout, call.dlse]))

    first = gradients()
    for _ in range(1 if target.interpreted else 5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients()))
