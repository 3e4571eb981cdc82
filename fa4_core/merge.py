"""Merging attention over parts of the keys into attention over all of them, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fa4_core.problem import DTYPES


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `dispatch.merge_attention`; the arguments are checked. Sums run in the order of the parts, in float32."""
    working = torch.promote_types(outs[0].dtype, torch.float32)
    parts = torch.stack([lse.to(working) for lse in lses])
    if sink is not None:
        logit = sink.to(working)[:, None].expand(parts.shape[1:])
        parts = torch.cat([parts, logit[None]])
    # A row that saw no key anywhere: with -inf replaced it gives neither NaN nor a gradient.
    empty = (parts == -math.inf).all(0)
    parts = parts.masked_fill(empty, 0.0)
    lse = torch.logsumexp(parts, 0)
    shares = torch.exp(parts - lse).masked_fill(empty, 0.0).transpose(-1, -2)[..., None]
    out = shares[0] * outs[0]
    for share, part in zip(shares[1:], outs[1:]):
        out = out + share * part
    return out.to(outs[0].dtype), lse.masked_fill(empty, -math.inf)


def check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None) -> None:
    """Checks the arguments of `dispatch.merge_attention`.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: numbers of parts, shapes or devices do not match.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if isinstance(parts, Tensor) or not isinstance(parts, Sequence):
            raise TypeError(f"{name}: got {type(parts).__name__}, accepted is a list or tuple of tensors")
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}: entry {i} is a {type(part).__name__}, accepted is a torch.Tensor")
            if part.dtype not in DTYPES:
                raise TypeError(
                    f"{name}: entry {i} has dtype {part.dtype}, accepted are floating-point ones of 16 bits or more"
                )
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs, lses: got {len(outs)} and {len(lses)} parts, accepted are equally many, at least 1")
    first = outs[0]
    if first.dim() not in (3, 4):
        raise ValueError(f"outs: entry 0 has shape {tuple(first.shape)}, accepted are (batch, seqlen, heads, head_dim) "
                         "and (total, heads, head_dim)")  # fmt: skip
    rows = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for i, (out, lse) in enumerate(zip(outs, lses)):
        if out.dtype != first.dtype:
            raise TypeError(f"outs: entry {i} has dtype {out.dtype}, entry 0 has {first.dtype}")
        for name, part, shape in (("outs", out, tuple(first.shape)), ("lses", lse, rows)):
            if tuple(part.shape) != shape:
                raise ValueError(f"{name}: entry {i} has shape {tuple(part.shape)}, accepted is {shape}")
            if part.device != first.device:
                raise ValueError(f"{name}: entry {i} is on {part.device}, but entry 0 of outs on {first.device}")
    if sink is not None:
        if not isinstance(sink, Tensor):
            raise TypeError(f"sink: got {type(sink).__name__}, accepted is a torch.Tensor")
        if sink.dtype not in DTYPES:
            raise TypeError(f"sink: dtype {sink.dtype} is not accepted, only floating-point ones of 16 bits or more")
        if tuple(sink.shape) != (first.shape[-2],):
            raise ValueError(f"sink: got shape {tuple(sink.shape)}, accepted is (heads,) = ({first.shape[-2]},)")
        if sink.device != first.device:
            raise ValueError(f"sink: on {sink.device}, but outs on {first.device}")
