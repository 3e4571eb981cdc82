"""The tests' own truth: dense float64 attention with gradients by autograd. Shares nothing with the package."""

import torch


def oracle(q, k, v, causal=False, window=(None, None), softmax_scale=None, softcap=0.0, sink=None):
    """(out, lse) in float64 for dense q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv); lse (B, Hq, Sq)."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    group, (len_q, len_k) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    left, right = (None if side == -1 else side for side in window)
    distance = torch.arange(len_k) - (torch.arange(len_q)[:, None] + len_k - len_q)
    visible = torch.ones(len_q, len_k, dtype=torch.bool)
    visible &= distance >= -left if left is not None else True
    visible &= distance <= (0 if causal else right) if causal or right is not None else True
    scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    logit = torch.full((q.shape[1],), -torch.inf, device=q.device) if sink is None else sink
    scores = torch.cat([scores, logit.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    return torch.einsum("bhij,bhjd->bihd", p[..., :-1], v), lse


def packed_oracle(q, k, v, ends_q, ends_k, **options):
    """The same for packed sequences (total, H, D): a loop over them. Returns out (total, Hq, Dv), lse (Hq, total)."""
    spans = zip(zip(ends_q, ends_q[1:]), zip(ends_k, ends_k[1:]))
    results = [oracle(q[None, a:b], k[None, c:d], v[None, c:d], **options) for (a, b), (c, d) in spans]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], -1)
