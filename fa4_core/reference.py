"""Backend `reference`: attention in plain PyTorch, in chunks, on any device.

Scores exist for one chunk of rows and keys at a time, so memory is O(N) in the forward and in the backward, which
recomputes P from the LSE. Arithmetic is float32, or float64 for float64 inputs; P is not rounded to the input dtype.
The softmax follows the exact running maximum, so `rescale_threshold` changes nothing here.
Source: Dao et al., "FlashAttention" (2022), algorithms 1 and 4; semantics in docs/semantics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fa4_core.backends import Backend, Gradients
from fa4_core.kvcache import CacheInputs, CacheProblem, reference_inputs
from fa4_core.problem import UNBOUNDED, Inputs, Kinds, Problem

CHUNK_Q = 256
CHUNK_K = 1024

Rows = slice | Tensor
"""Rows of a flattened (rows, heads, head_dim) tensor; as an index tensor, the row count stands for "no row"."""


@dataclass(frozen=True)
class _Sequence:
    """One sequence of the call. Lengths are ints where the host knows them, else 0-d tensors that are never read."""

    rows_q: Rows
    rows_k: Rows
    len_q: int | Tensor
    len_k: int | Tensor


def _on_host(device: torch.device) -> bool:
    """Whether reading an index tensor on `device` is free of a synchronisation."""
    return device.type == "cpu"


def _sequences(problem: Problem, inputs: Inputs) -> Iterator[_Sequence]:
    """The call's sequences. Index tensors are read on the CPU; elsewhere whole row ranges are gathered."""
    sides = (
        (inputs.cu_seqlens_q, inputs.seqused_q, problem.seqlen_q, problem.max_seqlen_q),
        (inputs.cu_seqlens_k, inputs.seqused_k, problem.seqlen_k, problem.max_seqlen_k),
    )
    on_host = _on_host(problem.device)
    spans = []
    for cu, used, rows, longest in sides:
        if on_host:
            cu = cu.tolist() if cu is not None else None
            used = used.tolist() if used is not None else None
        starts = [i * rows for i in range(problem.batch)] if cu is None else cu[:-1]
        lengths = [rows] * problem.batch if cu is None else [cu[i + 1] - cu[i] for i in range(problem.batch)]
        if used is not None:
            lengths = [_clamped(used[i], length) for i, length in enumerate(lengths)]
        bound = rows if longest is None else min(longest, rows)
        total = rows if cu is not None else rows * problem.batch
        spans.append([_span(start, length, bound, total) for start, length in zip(starts, lengths)])
    for (rows_q, len_q), (rows_k, len_k) in zip(*spans):
        yield _Sequence(rows_q, rows_k, len_q, len_k)


def _clamped(length: int | Tensor, room: int | Tensor) -> int | Tensor:
    if isinstance(length, Tensor):
        # No tensor is made of an int here: its copy to a GPU would synchronise.
        length = length.clamp(min=0)
        return torch.minimum(length, room) if isinstance(room, Tensor) else length.clamp(max=room)
    return max(0, min(length, room))


def _span(start: int | Tensor, length: int | Tensor, bound: int, total: int) -> tuple[Rows, int | Tensor]:
    if isinstance(start, int) and isinstance(length, int):
        return slice(start, start + length), length
    device = next(t.device for t in (length, start) if isinstance(t, Tensor))
    position = torch.arange(bound, device=device)
    rows = (start + position).long()
    valid = (position < length) & (rows >= 0) & (rows < total)
    return torch.where(valid, rows, total), length


def _take(flat: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Rows in the working dtype, heads first: (heads, rows, head_dim); a row that is none reads as zero."""
    if isinstance(rows, slice):
        return flat[rows].to(dtype).transpose(0, 1)
    none = (rows == flat.shape[0])[:, None, None]
    taken = (
        flat.new_zeros((rows.shape[0], *flat.shape[1:]))
        if flat.shape[0] == 0
        else flat[rows.clamp(max=flat.shape[0] - 1)]
    )
    return taken.to(dtype).masked_fill(none, 0.0).transpose(0, 1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])


def _canvas(tensor: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """A flat result tensor with one spare row, where rows that are none land."""
    return tensor.new_full((tensor.shape[0] + 1, *tensor.shape[1:]), fill, dtype=dtype)


def _visible(problem: Problem, seq: _Sequence, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """(rows, keys) bool: bottom-right aligned window, within both lengths."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    diagonal = i + (seq.len_k - seq.len_q)
    mask = (i < seq.len_q) & (j < seq.len_k)
    if problem.window_left != UNBOUNDED:
        mask = mask & (j >= diagonal - problem.window_left)
    if problem.window_right != UNBOUNDED:
        mask = mask & (j <= diagonal + problem.window_right)
    return mask


def _key_chunks(problem: Problem, seq: _Sequence, rows: slice, n_keys: int) -> Iterator[slice]:
    """Chunks of keys that some row of `rows` may see; all of them where the host does not know the lengths."""
    first, last = 0, n_keys
    if isinstance(seq.len_q, int) and isinstance(seq.len_k, int):
        shift = seq.len_k - seq.len_q
        if problem.window_left != UNBOUNDED:
            first = max(first, rows.start + shift - problem.window_left)
        if problem.window_right != UNBOUNDED:
            last = min(last, rows.stop + shift + problem.window_right)
    for start in range(first, last, CHUNK_K):
        yield slice(start, min(start + CHUNK_K, last))


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _scores(problem: Problem, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped scores (heads_kv, group, rows, keys), and the cap's derivative where there is a cap."""
    scores = torch.einsum("hgid,hjd->hgij", q, k) * problem.softmax_scale
    if not problem.kinds.softcap:
        return scores, None
    bent = torch.tanh(scores / problem.softcap)
    return problem.softcap * bent, 1.0 - bent * bent


def _split(problem: Problem, tensor: Tensor) -> Tensor:
    """(heads_q, rows, d) to (heads_kv, group, rows, d)."""
    return tensor.reshape(problem.heads_kv, problem.kinds.group, *tensor.shape[1:])


def _forward_sequence(problem: Problem, seq: _Sequence, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None):
    """O (heads_q, rows, head_dim_v) and LSE (heads_q, rows) of one sequence, heads first."""
    n_rows, n_keys = q.shape[1], k.shape[1]
    out = q.new_zeros((problem.heads_q, n_rows, v.shape[-1]))
    lse = q.new_full((problem.heads_q, n_rows), -math.inf)
    for rows in _chunks(n_rows, CHUNK_Q):
        q_rows = _split(problem, q[:, rows])
        o = q_rows.new_zeros((*q_rows.shape[:-1], v.shape[-1]))
        row_max = q_rows.new_full((*q_rows.shape[:-1], 1), -math.inf)
        row_sum = torch.zeros_like(row_max)
        for keys in _key_chunks(problem, seq, rows, n_keys):
            scores, _ = _scores(problem, q_rows, k[:, keys])
            scores = scores.masked_fill(~_visible(problem, seq, rows, keys, q.device), -math.inf)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            # A row that saw nothing yet keeps -inf as its maximum; exponents are then taken against 0.
            pivot = new_max.masked_fill(new_max == -math.inf, 0.0)
            p = torch.exp(scores - pivot)
            rescale = torch.exp(row_max - pivot)
            row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
            o = o * rescale + torch.einsum("hgij,hjd->hgid", p, v[:, keys])
            row_max = new_max
        if sink is not None:
            logit = _split(problem, sink[:, None, None])
            new_max = torch.maximum(row_max, logit)
            pivot = new_max.masked_fill(new_max == -math.inf, 0.0)
            rescale = torch.exp(row_max - pivot)
            row_sum = row_sum * rescale + torch.exp(logit - pivot)
            o = o * rescale
            row_max = new_max
        empty = row_sum == 0.0
        out[:, rows] = (o / row_sum.masked_fill(empty, 1.0)).flatten(0, 1)
        pivot = row_max.masked_fill(row_max == -math.inf, 0.0)
        lse[:, rows] = (pivot + torch.log(row_sum)).squeeze(-1).flatten(0, 1)
    return out, lse


def _backward_sequence(
    problem: Problem, seq: _Sequence, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dout: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one sequence, heads first. `slope` (heads_q, rows) is dLSE - rowsum(dO * O)."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _chunks(q.shape[1], CHUNK_Q):
        q_rows, dout_rows = _split(problem, q[:, rows]), _split(problem, dout[:, rows])
        lse_rows, slope_rows = _split(problem, lse[:, rows, None]), _split(problem, slope[:, rows, None])
        for keys in _key_chunks(problem, seq, rows, k.shape[1]):
            hidden = ~_visible(problem, seq, rows, keys, q.device) | (lse_rows == -math.inf)
            scores, bend = _scores(problem, q_rows, k[:, keys])
            p = torch.exp(scores - lse_rows).masked_fill(hidden, 0.0)
            dp = torch.einsum("hgid,hjd->hgij", dout_rows, v[:, keys])
            ds = p * (dp + slope_rows) * problem.softmax_scale
            ds = (ds if bend is None else ds * bend).masked_fill(hidden, 0.0)
            dq[:, rows] += torch.einsum("hgij,hjd->hgid", ds, k[:, keys]).flatten(0, 1)
            dk[:, keys] += torch.einsum("hgij,hgid->hjd", ds, q_rows)
            dv[:, keys] += torch.einsum("hgij,hgid->hjd", p, dout_rows)
    return dq, dk, dv


def _working_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.kinds.dtype == torch.float64 else torch.float32


class ReferenceBackend(Backend):
    """Plain PyTorch; serves every feature, on any device."""

    name = "reference"
    serves_kv_cache = True

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def missing(self, kinds: Kinds, device: torch.device) -> tuple[str, ...]:
        return ()

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = _working_dtype(problem)
        if inputs.page_table is not None:
            inputs = _gathered(problem, inputs)
        q, k, v = _flat(inputs.q), _flat(inputs.k), _flat(inputs.v)
        sink = None if inputs.sink is None else inputs.sink.to(dtype)
        out = _canvas(q.new_empty((*q.shape[:-1], v.shape[-1])), q.dtype)
        lse = _canvas(q[..., 0], dtype, -math.inf)
        for seq in _sequences(problem, inputs):
            o, row_lse = _forward_sequence(
                problem,
                seq,
                _take(q, seq.rows_q, dtype),
                _take(k, seq.rows_k, dtype),
                _take(v, seq.rows_k, dtype),
                sink,
            )
            out[seq.rows_q] = o.transpose(0, 1).to(q.dtype)
            lse[seq.rows_q] = row_lse.transpose(0, 1)
        lse = lse[:-1].reshape(*problem.out_shape[:-1]).transpose(-1, -2).contiguous()
        return out[:-1].reshape(problem.out_shape), lse

    def attend_cache(
        self, problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None
    ) -> None:
        result, result_lse = self.forward(*reference_inputs(problem, inputs, length))
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)

    def backward(
        self, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        if inputs.page_table is not None:
            raise NotImplementedError("paged K and V have no gradients")
        dtype = _working_dtype(problem)
        q, k, v, dout = _flat(inputs.q), _flat(inputs.k), _flat(inputs.v), _flat(dout)
        slope = -(dout.to(dtype) * _flat(out).to(dtype)).sum(-1)
        lse = lse.transpose(-1, -2).reshape(slope.shape)
        if dlse is not None:
            slope += dlse.transpose(-1, -2).reshape(slope.shape)
        # A row without keys passes nothing on, whatever arrives at its LSE: the sink's share of 0 times inf is NaN.
        slope = slope.masked_fill(lse == -math.inf, 0.0)
        grads = [_canvas(t, dtype) for t in (q, k, v)]
        sink = inputs.sink
        dsink = None if sink is None else sink.new_zeros(problem.heads_q, dtype=dtype)
        for seq in _sequences(problem, inputs):
            row_lse = _take(lse[..., None], seq.rows_q, dtype)[..., 0]
            row_slope = _take(slope[..., None], seq.rows_q, dtype)[..., 0]
            parts = _backward_sequence(
                problem,
                seq,
                _take(q, seq.rows_q, dtype),
                _take(k, seq.rows_k, dtype),
                _take(v, seq.rows_k, dtype),
                row_lse,
                _take(dout, seq.rows_q, dtype),
                row_slope,
            )
            for grad, rows, part in zip(grads, (seq.rows_q, seq.rows_k, seq.rows_k), parts):
                grad[rows] = part.transpose(0, 1)
            if sink is not None and dsink is not None:
                # Only a sink of -inf leaves a row without keys at an LSE of -inf: it takes no share there.
                share = torch.exp(sink.to(dtype)[:, None] - row_lse).masked_fill(row_lse == -math.inf, 0.0)
                dsink += (share * row_slope).sum(-1)
        dq, dk, dv = (grad[:-1].to(q.dtype).reshape(t.shape) for grad, t in zip(grads, inputs[:3]))
        if sink is None or dsink is None:
            return Gradients(dq, dk, dv, None)
        return Gradients(dq, dk, dv, dsink.to(sink.dtype))


def _gathered(problem: Problem, inputs: Inputs) -> Inputs:
    """Paged K and V as dense ones, (batch, keys that the table reaches, heads, dim); clamped into the pages."""
    assert inputs.page_table is not None
    n_pages = inputs.k.shape[0]
    pages = inputs.page_table.long().clamp(0, max(n_pages - 1, 0))
    shape = (problem.batch, problem.seqlen_k)
    if n_pages == 0:
        k, v = (t.new_zeros((*shape, *t.shape[2:])) for t in (inputs.k, inputs.v))
    else:
        k, v = (t[pages].reshape(*shape, *t.shape[2:]) for t in (inputs.k, inputs.v))
    return inputs._replace(k=k, v=v, page_table=None)


BACKEND = ReferenceBackend()
