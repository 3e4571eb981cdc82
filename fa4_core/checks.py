"""Checks of an attention function against float64: an error budget for every row of the output and of the gradients.

A row's budget is twice the error that plain PyTorch makes in that row, plus the rounding that no implementation of the
dtype can avoid. A budget over the whole tensor would hide a wrong mask on long rows, whose values are small. A row is
one query of one head for out, lse and dq; one key of one KV head for dk and dv; one head for dsink.

Plain PyTorch is softmax(q k^T) v and its derivative written out with dense matrices in float32, where P, dS and the
results are rounded to the input dtype. float64 is the same formulas, unrounded. Both hold S x S scores: for checks.
Source: the budget's form is that of FlashAttention's own tests (Dao et al.), here for each row apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20, torch.float64: 2.0**-44}
"""The dtype's share of a row: two roundings, except for float32, where it is 16 of them, for the order of the sums and
for products made of three TF32 ones (2^-22 each). Plain TF32 products (2^-11) are 40 times outside."""


def _score_unit(dtype: torch.dtype) -> float:
    """Error of a score, relative to |q| |k|: scores and softmax are float32 for every 16-bit and float32 input."""
    return UNIT[torch.float64 if dtype == torch.float64 else torch.float32]


def _underflow(dtype: torch.dtype) -> float:
    """Where P, dS and results stop being relatively exact: float16's subnormals; elsewhere float32 may flush them."""
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)


class Expected(NamedTuple):
    """What a result must be: the float64 value and how far each row may be from it (broadcasts over the value)."""

    value: Tensor
    budget: Tensor


@dataclass(frozen=True)
class Finding:
    """One result compared. `ratio` is the worst row's error over its budget: at most 1 where the result passes."""

    name: str
    ratio: float
    message: str

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Report:
    """The findings of one check, one for each result."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def ratio(self) -> float:
        """The worst error over its budget among all results."""
        return max(finding.ratio for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(finding.message for finding in self.findings)

    def require(self) -> Report:
        """Returns itself, or raises AssertionError with the failing results' worst rows."""
        if not self.passed:
            raise AssertionError("\n".join(f.message for f in self.findings if not f.passed))
        return self


def check_forward(attention: Callable, q: Tensor, k: Tensor, v: Tensor, **options) -> Report:
    """Runs `attention` and compares out and lse with float64.

    Args:
        attention: `dispatch.attention`, or a function called the same way.
        q, k, v, options: the call, as `dispatch.attention` takes it (without return_lse).

    Returns:
        A Report with findings "out" and "lse"; `report.require()` raises AssertionError where a row is off.
    """
    with torch.no_grad():
        out, lse = attention(q, k, v, return_lse=True, **options)
    return compare_all({"out": out, "lse": lse}, expected(q, k, v, **options))


def check_backward(
    attention: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **options,
) -> Report:
    """Runs `attention` and its backward and compares out, lse, dq, dk, dv and dsink with float64.

    Args:
        attention, q, k, v, options: as for `check_forward`.
        dout: gradient that arrives at out; None when none does.
        dlse: gradient that arrives at lse, float32; None when none does. At least one of the two is needed.

    Returns:
        A Report with a finding for each result.
    """
    got = run(attention, q, k, v, dout=dout, dlse=dlse, **options)
    return compare_all(got, expected(q, k, v, dout=dout, dlse=dlse, **options))


def run(
    attention: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **options,
) -> dict[str, Tensor]:
    """The results of a call by name: out, lse, and with a dout or dlse also dq, dk, dv and, given a sink, dsink."""
    leaves = {"q": q, "k": k, "v": v}
    if options.get("sink") is not None:
        leaves["sink"] = options.pop("sink")
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    out, lse = attention(**leaves, return_lse=True, **options)
    arriving = [(result, grad) for result, grad in ((out, dout), (lse, dlse)) if grad is not None]
    results, gradients = zip(*arriving)
    grads = torch.autograd.grad(results, tuple(leaves.values()), gradients)
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def compare_all(got: dict[str, Tensor], want: dict[str, Expected]) -> Report:
    """Compares results by name; `want` may hold more of them than `got`."""
    return Report(tuple(compare(name, result, want[name]) for name, result in got.items()))


def compare(name: str, got: Tensor, want: Expected) -> Finding:
    """Finds the row of `got` that is furthest outside its budget.

    An element passes within its row's budget, or where it is float64's value rounded to its dtype. A NaN passes only
    where float64 has one, and a NaN of float64's must be there.
    """
    value, budget = want.value, want.budget.expand_as(want.value)
    if got.shape != value.shape:
        return Finding(name, math.inf, f"{name}: shape {tuple(got.shape)}, expected {tuple(value.shape)}")
    if got.numel() == 0:
        return Finding(name, 0.0, f"{name}: empty, as expected")
    found = got.to(torch.float64)
    error = (found - value).abs()
    same = (got == value.to(got.dtype)) | (got.isnan() & value.isnan())
    ratio = torch.where(same, 0.0, error / budget)
    ratio = torch.where(ratio.isnan() | (~same & ~error.isfinite()), math.inf, ratio)
    where = torch.unravel_index(ratio.argmax(), ratio.shape)
    worst = ratio[where].item()
    at = ", ".join(str(i.item()) for i in where)
    message = (
        f"{name}[{at}]: {found[where].item():.6g}, float64 gives {value[where].item():.6g}; "
        f"the error {error[where].item():.3g} is {worst:.3g} of the row's budget {budget[where].item():.3g}"
    )
    wrong = int((ratio > 1.0).sum())
    if wrong:
        message += f"; {wrong} of {ratio.numel()} elements are outside theirs"
    return Finding(name, worst, message)


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    **_: object,
) -> dict[str, Expected]:
    """What float64 gives for a call, with the budget of each row, by result: out, lse, dq, dk, dv, dsink.

    Gradients are there when `dout` or `dlse` is given. Options that change no result (hints, threshold, backend) are
    accepted and ignored. Rows that take part in nothing are expected to be 0 (lse: -inf) and have gradient 0.
    """
    rules = _Rules(
        scale=1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        softcap=softcap or 0.0,
        left=_bound(window[0]),
        right=0.0 if causal else _bound(window[1]),
        dtype=q.dtype,
    )
    backward = dout is not None or dlse is not None
    f64 = {"dtype": torch.float64, "device": q.device}
    rows = q.shape[:-1]
    results = {"out": torch.zeros((*rows, v.shape[-1]), **f64), "lse": torch.full(rows, -math.inf, **f64)}
    if backward:
        results |= {"dq": torch.zeros(q.shape, **f64), "dk": torch.zeros(k.shape, **f64)}
        results |= {"dv": torch.zeros(v.shape, **f64)}
        if sink is not None:
            results["dsink"] = torch.zeros(sink.shape, **f64)
    budgets = {name: torch.zeros_like(r if name in ("lse", "dsink") else r[..., :1]) for name, r in results.items()}
    dlse_rows = None if dlse is None else dlse.transpose(-1, -2)
    group = q.shape[-2] // k.shape[-2]
    for at_q, at_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        for head in range(k.shape[-2]):
            heads = slice(head * group, (head + 1) * group)
            block = _Block(
                q=q[at_q][:, heads].transpose(0, 1),
                k=k[at_k][:, head],
                v=v[at_k][:, head],
                sink=None if sink is None else sink[heads],
                dout=None if dout is None else dout[at_q][:, heads].transpose(0, 1),
                dlse=None if dlse_rows is None else dlse_rows[at_q][:, heads].transpose(0, 1),
            )
            for name, (value, budget) in _expected_block(block, rules, backward).items():
                for whole, part in ((results[name], value), (budgets[name], budget)):
                    if name == "dsink":  # the only result that all sequences add to
                        whole[heads] += part
                    elif name in ("dk", "dv"):
                        whole[(*at_k, head)] = part
                    else:
                        whole[(*at_q, heads)] = part.transpose(0, 1)
    if sink is not None and "dsink" in results:
        budgets["dsink"] += UNIT[sink.dtype] * results["dsink"].abs()
    for both in (results, budgets):
        both["lse"] = both["lse"].transpose(-1, -2)
    return {name: Expected(results[name], budgets[name]) for name in results}


def _bound(side: int | None) -> float:
    return math.inf if side is None or side == -1 else side


class _Rules(NamedTuple):
    """The call's numbers; left and right are inf where the window is open."""

    scale: float
    softcap: float
    left: float
    right: float
    dtype: torch.dtype


class _Block(NamedTuple):
    """One sequence, one KV head: q and dout (group, Sq, .), k and v (Sk, .), sink (group,), dlse (group, Sq)."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    dout: Tensor | None
    dlse: Tensor | None

    def to(self, dtype: torch.dtype) -> _Block:
        return _Block(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


Index = tuple[int | slice, ...]


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> Iterator[tuple[Index, Index]]:
    """Where each sequence's rows lie in q and in k."""
    sides = []
    for tensor, cu, used in ((q, cu_seqlens_q, seqused_q), (k, cu_seqlens_k, seqused_k)):
        if cu is None:
            spans = [((i,), 0, tensor.shape[1]) for i in range(tensor.shape[0])]
        else:
            ends = cu.tolist()
            spans = [((), start, end) for start, end in zip(ends, ends[1:])]
        counts = [end - start for _, start, end in spans] if used is None else used.tolist()
        sides.append([(*at, slice(start, start + n)) for (at, start, _), n in zip(spans, counts)])
    return zip(*sides)


class _Forward(NamedTuple):
    """The forward of one block: P and, where scores are capped, the cap's derivative (group, Sq, Sk)."""

    p: Tensor
    bend: Tensor | float
    out: Tensor
    lse: Tensor
    p_sink: Tensor


def _hidden(rules: _Rules, len_q: int, len_k: int, device: torch.device) -> Tensor:
    """(Sq, Sk), True where the window, aligned bottom-right, hides the key."""
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    j = torch.arange(len_k, device=device)
    return (j < i - rules.left) | (j > i + rules.right)


def _forward(block: _Block, rules: _Rules, hidden: Tensor, rounded: Callable[[Tensor], Tensor]) -> _Forward:
    scores, bend = block.q @ block.k.T * rules.scale, 1.0
    if rules.softcap:
        bent = torch.tanh(scores / rules.softcap)
        scores, bend = rules.softcap * bent, 1.0 - bent * bent
    logit = scores.new_full((scores.shape[0],), -math.inf) if block.sink is None else block.sink
    logit = logit[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat((scores.masked_fill(hidden, -math.inf), logit), -1)
    # A row whose logits are all -inf (no key, no sink) has no distribution: P = 0, LSE = -inf.
    none = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(none[..., 0], -math.inf)
    p, p_sink = p[..., :-1], p[..., -1]
    # P is rounded relative to its row's largest, so that a sink far above the keys does not underflow it in float16.
    peak = _peak(p)
    peak = peak.masked_fill(peak == 0.0, 1.0)
    return _Forward(p, bend, rounded(rounded(p / peak) @ block.v * peak), lse, p_sink)


class _Backward(NamedTuple):
    """The backward of one block: dS in units of the scaled scores, delta = rowsum(dO * O) - dLSE, the gradients."""

    ds: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor


def _backward(block: _Block, rules: _Rules, fwd: _Forward, rounded: Callable[[Tensor], Tensor]) -> _Backward:
    dout, dlse = block.dout, block.dlse
    dout = torch.zeros_like(fwd.out) if dout is None else dout
    delta = (dout * fwd.out).sum(-1) - (0.0 if dlse is None else dlse)
    delta = delta.masked_fill(fwd.lse == -math.inf, 0.0)
    ds = rounded(fwd.p * (dout @ block.v.T - delta[..., None]) * fwd.bend)
    dq = rounded(rules.scale * (ds @ block.k))
    dk = rounded(rules.scale * torch.einsum("gij,gid->jd", ds, block.q))
    dv = rounded(torch.einsum("gij,gid->jd", rounded(fwd.p), dout))
    return _Backward(ds, delta, dq, dk, dv, -(fwd.p_sink * delta).sum(-1))


def _peak(tensor: Tensor) -> Tensor:
    """max |.| over the last dimension, kept; 0 where it is empty."""
    if tensor.shape[-1] == 0:
        return tensor.new_zeros((*tensor.shape[:-1], 1))
    return tensor.abs().amax(-1, keepdim=True)


def _norm(error: Tensor, factor: Tensor) -> Tensor:
    """How far independent errors of the elements carry in error @ factor: the root of the sum of squares."""
    return ((error * error) @ (factor * factor)).sqrt()


def _expected_block(block: _Block, rules: _Rules, backward: bool) -> dict[str, Expected]:
    """Values and budgets of one block, by first-order error propagation around float64.

    What every implementation rounds: P, dS and the results to the dtype (`unit`, independent from element to element),
    O before it enters delta, and the scores, their exponentials and the sums in float32 (`noise`). A GPU also takes a P
    below float32's normal numbers for zero, whatever multiplies it (`lost`).
    """
    unit, noise, floor = UNIT[rules.dtype], _score_unit(rules.dtype), _underflow(rules.dtype)
    work = torch.float64 if rules.dtype == torch.float64 else torch.float32
    exact, plain = block.to(torch.float64), block.to(work)
    hidden = _hidden(rules, block.q.shape[1], block.k.shape[0], block.q.device)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(rules.dtype).to(work)

    true, rough = _forward(exact, rules, hidden, lambda t: t), _forward(plain, rules, hidden, rounded)
    lost = torch.finfo(work).tiny * (~hidden).to(torch.float64)
    reach = rules.scale * (exact.q.abs() @ exact.k.abs().T).masked_fill(hidden, 0.0)
    score_error = noise * (1.0 + _peak(reach) + rules.softcap)

    def budget(value: Tensor, approximation: Tensor, *terms: Tensor) -> Tensor:
        plain_error = (approximation.to(torch.float64) - value).abs().nan_to_num(0.0, 0.0)
        return 2.0 * _peak(plain_error) + unit * _peak(value) + floor + sum(_peak(t) for t in terms)

    spread = true.p @ exact.v.abs() + true.out.abs()
    p_error = unit * true.p + floor
    p_loss = lost @ exact.v.abs()
    out_budget = budget(true.out, rough.out, _norm(p_error, exact.v), score_error * spread, p_loss)
    found = {"out": Expected(true.out, out_budget)}
    lse_error = (rough.lse.to(torch.float64) - true.lse).abs().nan_to_num(0.0, 0.0)
    finite_lse = true.lse.nan_to_num(0.0, 0.0, 0.0).abs()
    found["lse"] = Expected(true.lse, 2.0 * lse_error + score_error[..., 0] + noise * finite_lse)
    if not backward:
        return found

    grads, rough_grads = _backward(exact, rules, true, lambda t: t), _backward(plain, rules, rough, rounded)
    dout = torch.zeros_like(true.out) if exact.dout is None else exact.dout
    # delta comes from the rounded O, whose own sum took a rounded P: the few roundings of O may all go one way, the
    # many of P do not.
    from_out, from_p = dout * true.out, true.p * (dout @ exact.v.T)
    delta_error = unit * (from_out.abs().sum(-1, keepdim=True) + from_p.square().sum(-1, keepdim=True).sqrt())
    # In float32: dP - delta and the cap's derivative; then P, which enters dS itself and, through O, delta.
    delta_size = from_out.abs().sum(-1, keepdim=True) + grads.delta.abs()[..., None]
    dp_size = dout.abs() @ exact.v.abs().T + delta_size
    steepness = 1.0 + (2.0 / rules.softcap if rules.softcap else 0.0)
    ds_size = grads.ds.abs()
    ds_error = (4.0 * noise * true.p + lost) * dp_size
    ds_error += steepness * score_error * (ds_size + true.p * ds_size.sum(-1, keepdim=True))
    found["dq"] = Expected(
        grads.dq,
        budget(
            grads.dq,
            rough_grads.dq,
            rules.scale * _norm(unit * ds_size + floor, exact.k),
            rules.scale * delta_error * ((true.p * true.bend) @ exact.k),
            rules.scale * (ds_error @ exact.k.abs()),
        ),
    )

    def over_group(left: Tensor, right: Tensor) -> Tensor:
        return (left.transpose(-1, -2) @ right).sum(0)

    dk_noise = (unit * ds_size + floor).square() + (true.p * true.bend * delta_error).square()
    found["dk"] = Expected(
        grads.dk,
        budget(
            grads.dk,
            rough_grads.dk,
            rules.scale * over_group(dk_noise, exact.q.square()).sqrt(),
            rules.scale * over_group(ds_error, exact.q.abs()),
        ),
    )
    found["dv"] = Expected(
        grads.dv,
        budget(
            grads.dv,
            rough_grads.dv,
            over_group(p_error.square(), dout.square()).sqrt(),
            over_group(true.p * score_error + lost, dout.abs()),
        ),
    )
    if block.sink is not None:
        share, size = true.p_sink, delta_size[..., 0]
        found["dsink"] = Expected(
            grads.dsink,
            2.0 * (rough_grads.dsink.to(torch.float64) - grads.dsink).abs()
            + (share * delta_error[..., 0]).square().sum(-1).sqrt()
            + (share * (noise + score_error[..., 0]) * size).sum(-1),
        )
    return found
