"""Attention over a KV cache: the checks, the torch operator, and the reference in plain PyTorch.

A call appends new rows to the cache in place, and attends over what the cache then holds. The semantics stand in
docs/semantics.md; the signature follows flash-attn's `flash_attn_with_kvcache`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fa4_core import ops
from fa4_core.problem import (
    DEFAULT_RESCALE_THRESHOLD,
    DTYPES,
    MAX_HEAD_DIM,
    UNBOUNDED,
    Inputs,
    Kinds,
    Problem,
    check_numbers,
    check_page_size,
    check_pages,
    contents_are_checked,
)

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0
MAX_SPLITS = 64


class CacheInputs(NamedTuple):
    """The tensors of one call, as `dispatch.attention_with_kvcache` takes them; None where the call has none."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    cache_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    sink: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CacheProblem:
    """One checked call; calls of one signature share it, and it compares and hashes by identity.

    `attend` is the attention itself, once the rows are appended: `batch` sequences of `seqlen_q` queries on up to
    `seqlen_k` = capacity keys. `n_blocks` counts the cache's pages, or its batch elements when it is contiguous, and
    `page_size` is their rows. `positions` and `rotary_dim` are those of the rotary embedding, 0 without
    rotary embedding; with it, the rows of q stand at consecutive positions under a mask and all at the first one
    without.
    """

    attend: Problem
    cache_dtype: torch.dtype
    appended: int
    n_blocks: int
    page_size: int
    positions: int
    rotary_dim: int
    rotary_interleaved: bool
    num_splits: int

    @property
    def capacity(self) -> int:
        """Rows that one sequence's cache holds."""
        return self.attend.seqlen_k

    @property
    def consecutive(self) -> bool:
        """Whether a sequence's query rows stand at consecutive positions for the rotary embedding."""
        return self.attend.kinds.window_left or self.attend.kinds.window_right

    @property
    def reach(self) -> int:
        """Positions of the rotary embedding that the call's rows take, from the first new one on."""
        rows = self.attend.seqlen_q
        return max(self.appended, rows if self.consecutive else min(rows, 1))


class _Meta(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def make_cache_problem(
    inputs: CacheInputs,
    *,
    length: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
) -> CacheProblem:
    """Checks a call and returns its problem; nothing is written before.

    Args:
        inputs: the call's tensors.
        length: cache_seqlens where it is an int, else None.
        softmax_scale, softcap, window_left, window_right: as `fa4_core.problem.make_problem` takes them.
        rotary_interleaved, num_splits: as `dispatch.attention_with_kvcache` takes them.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, stride, number or index is out of what is accepted. Messages name the argument.
    """
    for name, cache in (("k_cache", inputs.k_cache), ("v_cache", inputs.v_cache)):
        # Not a question of signature, but of this tensor: what is copied would not be written in place.
        if cache.dim() == 4 and cache.stride(-1) != 1 and cache.shape[-1] != 1:
            raise ValueError(f"{name}: its last dimension has stride {cache.stride(-1)}, accepted is 1")
    problem = _problem_of(
        tuple([None if t is None else (t.shape, t.dtype, t.device) for t in inputs]),
        softmax_scale,
        softcap,
        window_left,
        window_right,
        rotary_interleaved,
        num_splits,
    )
    # Not a question of signature either: an int that grows with every step must not make a new problem each time.
    if length is not None:
        _check_length(problem, length)
    if contents_are_checked(problem.attend.device):
        _check_contents(problem, inputs, length or 0)
    return problem


def _check_length(problem: CacheProblem, length: int) -> None:
    room = problem.capacity - problem.appended
    if not 0 <= length <= room:
        new = f" and {problem.appended} are appended" if problem.appended else ""
        raise ValueError(
            f"cache_seqlens: got {length}, accepted are 0 to {room}: the cache holds {problem.capacity} rows{new}"
        )
    if problem.rotary_dim and length + problem.reach > problem.positions:
        raise ValueError(f"rotary_cos: {problem.positions} positions, but the call reaches {length + problem.reach}")


def _is(name: str, meta: _Meta, shape: tuple[int, ...], what: str, q: _Meta) -> None:
    if tuple(meta.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(meta.shape)}, accepted is {what} = {shape}")
    if meta.device != q.device:
        raise ValueError(f"{name}: on {meta.device}, but q is on {q.device}")


def _is_index(name: str, meta: _Meta, shape: tuple[int, ...], what: str, q: _Meta) -> None:
    if meta.dtype != torch.int32:
        raise TypeError(f"{name}: dtype {meta.dtype} is not accepted, only torch.int32")
    _is(name, meta, shape, what, q)


def _both(first: str, second: str, a: _Meta | None, b: _Meta | None) -> None:
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        raise ValueError(f"{missing}: missing, but {given} was given; both or neither are accepted")


@functools.lru_cache(maxsize=4096)
def _problem_of(
    metas: tuple[tuple | None, ...],
    softmax_scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
    rotary_interleaved: bool,
    num_splits: int,
) -> CacheProblem:
    q, k_cache, v_cache, k, v, seqlens, page_table, batch_idx, leftpad, cos, sin, k_descale, v_descale, sink = (
        None if meta is None else _Meta(*meta) for meta in metas
    )
    assert q is not None
    assert k_cache is not None
    assert v_cache is not None
    paged = page_table is not None
    batch, seqlen_q, heads_q, head_dim = _check_query(q)
    n_blocks, page_size, heads_kv, head_dim_v = _check_cache(q, k_cache, v_cache, paged)
    if paged:
        check_page_size("k_cache", page_size)
        if len(page_table.shape) != 2:
            raise ValueError(f"page_table: got shape {tuple(page_table.shape)}, accepted is (batch, pages)")
        _is_index("page_table", page_table, (batch, page_table.shape[1]), "(batch, pages)", q)
        if batch_idx is not None:
            raise ValueError("cache_batch_idx: a paged cache is not accepted; page_table says whose pages are whose")
    capacity = page_table.shape[1] * page_size if paged else page_size
    if batch and not n_blocks:
        capacity = 0  # whatever a table says: kernels clamp to the last page, and there is none
    if batch_idx is not None:
        _is_index("cache_batch_idx", batch_idx, (batch,), "(batch,)", q)
    elif not paged and n_blocks != batch:
        raise ValueError(f"k_cache: batch={n_blocks} differs from q's {batch}; other sizes need cache_batch_idx")
    if leftpad is not None:
        _is_index("cache_leftpad", leftpad, (batch,), "(batch,)", q)
    if seqlens is not None:
        _is_index("cache_seqlens", seqlens, (batch,), "(batch,)", q)
    appended = _check_new(q, k, v, batch, heads_kv, head_dim_v)
    if appended > capacity:
        raise ValueError(f"k: {appended} rows, but the cache holds {capacity}")
    positions, rotary_dim = _check_rotary(q, cos, sin, k)
    _check_descale("k_descale", k_descale, k_cache, batch, heads_kv, q)
    _check_descale("v_descale", v_descale, v_cache, batch, heads_kv, q)
    if sink is not None:
        if sink.dtype not in DTYPES:
            raise TypeError(f"sink: dtype {sink.dtype} is not accepted, only floating-point ones of 16 bits or more")
        _is("sink", sink, (heads_q,), "(heads_q,)", q)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits: got {num_splits}, accepted are 0 (by each row's length) to {MAX_SPLITS}")
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    check_numbers(scale, softcap, window_left, window_right, DEFAULT_RESCALE_THRESHOLD)
    attend = Problem(
        kinds=Kinds(
            dtype=q.dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            group=heads_q // heads_kv,
            varlen=False,
            seqused_q=False,
            seqused_k=True,
            paged=paged,
            window_left=window_left != UNBOUNDED,
            window_right=window_right != UNBOUNDED,
            softcap=softcap != 0.0,
            sink=sink is not None,
            kv_cache=True,
        ),
        device=q.device,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=capacity,
        heads_q=heads_q,
        heads_kv=heads_kv,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=scale,
        softcap=softcap,
        window_left=min(window_left, seqlen_q + capacity),
        window_right=min(window_right, seqlen_q + capacity),
        rescale_threshold=DEFAULT_RESCALE_THRESHOLD,
        deterministic=True,
    )
    return CacheProblem(
        attend=attend,
        cache_dtype=k_cache.dtype,
        appended=appended,
        n_blocks=n_blocks,
        page_size=page_size,
        positions=positions,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
    )


def _check_query(q: _Meta) -> tuple[int, int, int, int]:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: dtype {q.dtype} is not accepted, only {', '.join(map(str, DTYPES))}")
    if len(q.shape) != 4:
        raise ValueError(f"q: got shape {tuple(q.shape)}, accepted is (batch, seqlen, heads, head_dim)")
    batch, seqlen, heads, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: head_dim={head_dim}, accepted are 1 to {MAX_HEAD_DIM}")
    if heads == 0:
        raise ValueError("q: heads_q=0, accepted is at least 1")
    return batch, seqlen, heads, head_dim


def _check_cache(q: _Meta, k_cache: _Meta, v_cache: _Meta, paged: bool) -> tuple[int, int, int, int]:
    """Returns blocks, rows of a block, heads_kv and head_dim_v."""
    layout = "(n_pages, page_size, heads_kv, head_dim)" if paged else "(batch, seqlen, heads_kv, head_dim)"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if len(cache.shape) != 4:
            raise ValueError(f"{name}: got shape {tuple(cache.shape)}, accepted is {layout}")
        if cache.dtype not in (q.dtype, FP8):
            raise TypeError(f"{name}: dtype {cache.dtype}, accepted are q's {q.dtype} and {FP8}")
        if cache.device != q.device:
            raise ValueError(f"{name}: on {cache.device}, but q is on {q.device}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache: dtype {v_cache.dtype} differs from k_cache's {k_cache.dtype}")
    n_blocks, rows, heads_kv, head_dim = k_cache.shape
    if head_dim != q.shape[-1]:
        raise ValueError(f"k_cache: head_dim={head_dim} differs from q's {q.shape[-1]}")
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        raise ValueError(f"v_cache: got shape {tuple(v_cache.shape)}, k_cache's is {tuple(k_cache.shape)}; "
                         "only the last dimension may differ")  # fmt: skip
    head_dim_v = v_cache.shape[-1]
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        raise ValueError(f"v_cache: head_dim={head_dim_v}, accepted are 1 to {MAX_HEAD_DIM}")
    heads_q = q.shape[-2]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(f"k_cache: heads_kv={heads_kv} does not divide heads_q={heads_q}")
    return n_blocks, rows, heads_kv, head_dim_v


def _check_new(q: _Meta, k: _Meta | None, v: _Meta | None, batch: int, heads_kv: int, head_dim_v: int) -> int:
    """Returns how many rows a sequence appends."""
    _both("k", "v", k, v)
    if k is None or v is None:
        return 0
    for name, new, dim in (("k", k, q.shape[-1]), ("v", v, head_dim_v)):
        if len(new.shape) != 4:
            raise ValueError(f"{name}: got shape {tuple(new.shape)}, accepted is (batch, new rows, heads_kv, head_dim)")
        if new.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {new.dtype} differs from q's {q.dtype}")
        _is(name, new, (batch, k.shape[1], heads_kv, dim), "(batch, new rows, heads_kv, head_dim)", q)
    return k.shape[1]


def _check_rotary(q: _Meta, cos: _Meta | None, sin: _Meta | None, k: _Meta | None) -> tuple[int, int]:
    """Returns positions and rotary dimension."""
    _both("rotary_cos", "rotary_sin", cos, sin)
    if cos is None or sin is None:
        return 0, 0
    if k is None:
        raise ValueError("rotary_cos: given without k and v; it rotates q and the rows that are appended")
    if len(cos.shape) != 2 or cos.shape[0] < 1 or not 1 <= cos.shape[1] <= q.shape[-1] // 2:
        raise ValueError(
            f"rotary_cos: got shape {tuple(cos.shape)}, accepted is (positions, rotary_dim / 2) with "
            f"rotary_dim up to {q.shape[-1]}"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.dtype not in DTYPES:
            raise TypeError(f"{name}: dtype {table.dtype} is not accepted, only floating-point ones of 16 bits or more")
        _is(name, table, tuple(cos.shape), "(positions, rotary_dim / 2)", q)
    if sin.dtype != cos.dtype:
        raise TypeError(f"rotary_sin: dtype {sin.dtype} differs from rotary_cos's {cos.dtype}")
    return cos.shape[0], 2 * cos.shape[1]


def _check_descale(name: str, descale: _Meta | None, cache: _Meta, batch: int, heads_kv: int, q: _Meta) -> None:
    if descale is None:
        return
    if cache.dtype != FP8:
        raise ValueError(f"{name}: belongs to a cache of {FP8}, this one holds {cache.dtype}")
    if descale.dtype != torch.float32:
        raise TypeError(f"{name}: dtype {descale.dtype} is not accepted, only torch.float32")
    if tuple(descale.shape) != (heads_kv,):
        _is(name, descale, (batch, heads_kv), "(heads_kv,) or (batch, heads_kv)", q)
    elif descale.device != q.device:
        raise ValueError(f"{name}: on {descale.device}, but q is on {q.device}")


def _check_contents(problem: CacheProblem, inputs: CacheInputs, length: int) -> None:
    """Checks what index tensors hold: where they lie on the CPU, or under DISPATCH_CHECK=1."""
    batch, room = problem.attend.batch, problem.capacity - problem.appended
    lengths = [length] * batch if inputs.cache_seqlens is None else inputs.cache_seqlens.tolist()
    for i, n in enumerate(lengths):
        if not 0 <= n <= room:
            raise ValueError(f"cache_seqlens: entry {i} is {n}, accepted are 0 to {room}: the cache holds "
                             f"{problem.capacity} rows, and {problem.appended} are appended")  # fmt: skip
    pads = [0] * batch if inputs.cache_leftpad is None else inputs.cache_leftpad.tolist()
    for i, (pad, n) in enumerate(zip(pads, lengths)):
        if not 0 <= pad <= n:
            raise ValueError(f"cache_leftpad: entry {i} is {pad}, accepted are 0 to {n}, the rows in the cache")
    if inputs.cache_batch_idx is not None:
        for i, block in enumerate(inputs.cache_batch_idx.tolist()):
            if not 0 <= block < problem.n_blocks:
                raise ValueError(f"cache_batch_idx: entry {i} is {block}, accepted are 0 to {problem.n_blocks - 1}")
    if inputs.page_table is not None:
        used = [(n + problem.appended + problem.page_size - 1) // problem.page_size for n in lengths]
        check_pages(inputs.page_table, used, problem.n_blocks)
    if inputs.rotary_cos is not None:
        for i, n in enumerate(lengths):
            if n + problem.reach > problem.positions:
                raise ValueError(
                    f"rotary_cos: {problem.positions} positions, but sequence {i} reaches {n + problem.reach}"
                )


_LIBRARY = torch.library.Library("fa4", "FRAGMENT")
# Results are its arguments, since `out` may be the caller's own tensor.
_ARGUMENTS = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor? cache_seqlens, Tensor? page_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? k_descale, Tensor? v_descale, Tensor? sink, Tensor(c!) out, Tensor(d!)? lse, "
    "SymInt? length, Tensor? values, SymInt window_left, SymInt window_right, bool rotary_interleaved, "
    "SymInt num_splits, str backend) -> ()"
)
_PLAIN, _SCORED = "attention_with_kvcache", "attention_with_kvcache.scored"
_LIBRARY.define(_PLAIN + _ARGUMENTS)
# With `values`, which lie on the CPU. A CUDA graph would go on with those that it was captured with, so the one that
# torch.compile makes leaves this overload out.
_LIBRARY.define(_SCORED + _ARGUMENTS, tags=(torch.Tag.cudagraph_unsafe,))
_N_TENSORS = len(CacheInputs._fields)


def _run(
    inputs: CacheInputs, out: Tensor, lse: Tensor | None, length: int | None, scale: float | None, softcap: float,
    left: int, right: int, rotary_interleaved: bool, num_splits: int, name: str,
) -> None:  # fmt: skip
    problem = make_cache_problem(
        inputs,
        length=length,
        softmax_scale=scale,
        softcap=softcap,
        window_left=left,
        window_right=right,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
    )
    ops.backend_of(problem.attend, name).attend_cache(problem, inputs, length or 0, out, lse)


def _operator(*args) -> None:
    inputs = CacheInputs(*args[:_N_TENSORS])
    out, lse, length, values, *rest = args[_N_TENSORS:]
    scale, softcap = (None, 0.0) if values is None else values.tolist()[:2]
    with torch.autocast(inputs.q.device.type, enabled=False):
        _run(inputs, out, lse, length, None if scale != scale else scale, softcap, *rest)


def _fake(*args) -> None:
    # One tensor on the meta device brings the whole call here, past the checks that stand before a launch.
    for name, tensor in zip(CacheInputs._fields, args):
        if tensor is not None and tensor.device != args[0].device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {args[0].device}")


for _name in (_PLAIN, _SCORED):
    _LIBRARY.impl(_name, _operator, "CPU")
    _LIBRARY.impl(_name, _operator, "CUDA")
    torch.library.register_fake(f"fa4::{_name}", _fake, lib=_LIBRARY)


def refuse_gradients(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raises ValueError where autograd would record a call that has no gradients."""
    for name, tensor in zip(names, tensors) if torch.is_grad_enabled() else ():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but a KV cache and paged keys have none; call it under torch.no_grad()"
            )


def attend(
    inputs: CacheInputs,
    out: Tensor | None,
    length: int | None,
    softmax_scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
    rotary_interleaved: bool,
    num_splits: int,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Runs one call; arguments as `dispatch.attention_with_kvcache` checked their types. Returns out and lse."""
    q = inputs.q
    refuse_gradients((*inputs._fields, "out"), (*inputs, out))
    if q.dim() != 4 or inputs.v_cache.dim() != 4:
        _problem_of(tuple([None if t is None else (t.shape, t.dtype, t.device) for t in inputs]),
                    None, 0.0, -1, -1, True, 0)  # raises  # fmt: skip
    shape = (*q.shape[:3], inputs.v_cache.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
    else:
        _check_out(out, shape, q)
    lse = None
    if with_lse:
        lse = torch.empty((shape[0], shape[2], shape[1]), dtype=ops.lse_dtype(q.dtype), device=q.device)
    rest = (window_left, window_right, rotary_interleaved, num_splits, backend)
    if ops.is_plain(*inputs, out):
        _run(inputs, out, lse, length, softmax_scale, softcap, *rest)
    else:
        values = ops.pack_values(softmax_scale, softcap, DEFAULT_RESCALE_THRESHOLD)
        operator = ops.overload_for(torch.ops.fa4.attention_with_kvcache, values)
        operator(*inputs, out, lse, length, values, *rest)
    return out, lse


def _check_out(out: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if out.dtype != q.dtype:
        raise TypeError(f"out: dtype {out.dtype} differs from q's {q.dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, accepted is (batch, seqlen, heads_q, head_dim_v) = {shape}"
        )
    if out.device != q.device:
        raise ValueError(f"out: on {out.device}, but q is on {q.device}")
    if out.shape[-1] != 1 and out.stride(-1) != 1:
        raise ValueError(f"out: its last dimension has stride {out.stride(-1)}, accepted is 1")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), shape)):
        raise ValueError(
            f"out: strides {out.stride()} of shape {shape}: accepted is a place of its own for each element"
        )


# The reference.


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[1] columns of x (batch, rows, heads, head_dim), in float32.

    positions: (batch, rows), clamped into the table. interleaved: columns 2i and 2i + 1 are a pair, else i and
    i + rotary_dim / 2. Source: Su et al., "RoFormer" (2021).
    """
    working = torch.promote_types(x.dtype, torch.float32)
    at = positions.clamp(0, cos.shape[0] - 1).long()
    c, s = (table.to(working)[at][:, :, None] for table in (cos, sin))
    dim = 2 * cos.shape[1]
    part, rest = x[..., :dim].to(working), x[..., dim:]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    turned = a * c - b * s, b * c + a * s
    part = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([part.to(x.dtype), rest], -1)


def reference_inputs(problem: CacheProblem, inputs: CacheInputs, length: int) -> tuple[Problem, Inputs]:
    """Appends in place; returns the attention that is left as a dense call over the gathered caches.

    Nothing is read back from a device: there, whole capacities are gathered.
    """
    attend, device = problem.attend, inputs.q.device
    lengths = inputs.cache_seqlens
    if lengths is None:
        lengths = torch.full((attend.batch,), length, dtype=torch.int32, device=device)
    pads = torch.zeros_like(lengths) if inputs.cache_leftpad is None else inputs.cache_leftpad
    q, k, v = inputs.q, inputs.k, inputs.v
    if k is not None and v is not None:
        if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
            tables = (inputs.rotary_cos, inputs.rotary_sin)
            start = lengths[:, None]
            k = rotate(k, *tables, start + torch.arange(k.shape[1], device=device), problem.rotary_interleaved)
            steps = torch.arange(q.shape[1], device=device) * problem.consecutive
            q = rotate(q, *tables, start + steps, problem.rotary_interleaved)
        _append(problem, inputs, inputs.k_cache, k, inputs.k_descale, lengths)
        _append(problem, inputs, inputs.v_cache, v, inputs.v_descale, lengths)
    filled = (lengths.clamp(0, problem.capacity) + problem.appended).clamp(max=problem.capacity)
    pads = torch.minimum(pads.clamp(min=0), filled)
    used = (filled - pads).to(torch.int32)
    longest = problem.capacity
    if device.type == "cpu":
        longest = int(used.max()) if attend.batch else 0
    keys = pads[:, None] + torch.arange(longest, device=device)
    at = _rows_of(problem, inputs, torch.minimum(keys, (filled[:, None] - 1).clamp(min=0)))
    k, v = (
        _gather(cache, at, descale, ops.lse_dtype(q.dtype))
        for cache, descale in ((inputs.k_cache, inputs.k_descale), (inputs.v_cache, inputs.v_descale))
    )
    return replace(attend, seqlen_k=longest), Inputs(q, k, v, inputs.sink, seqused_k=used)


def _descale(descale: Tensor) -> Tensor:
    """(batch or 1, heads_kv)"""
    return descale if descale.dim() == 2 else descale[None]


def _rows_of(problem: CacheProblem, inputs: CacheInputs, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(block, row in it) of cache positions (batch, n), clamped into the cache."""
    positions = positions.long()
    if inputs.page_table is not None:
        page = (positions // problem.page_size).clamp(max=max(inputs.page_table.shape[1] - 1, 0))
        blocks = inputs.page_table.long().gather(1, page) if inputs.page_table.shape[1] else torch.zeros_like(page)
        return blocks.clamp(0, max(problem.n_blocks - 1, 0)), positions % problem.page_size
    blocks = torch.arange(problem.attend.batch, device=positions.device)
    if inputs.cache_batch_idx is not None:
        blocks = inputs.cache_batch_idx.long().clamp(0, max(problem.n_blocks - 1, 0))
    return blocks[:, None].expand_as(positions), positions.clamp(max=max(problem.page_size - 1, 0))


def _gather(cache: Tensor, at: tuple[Tensor, Tensor], descale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if cache.shape[0] == 0 or cache.shape[1] == 0:
        return cache.new_zeros((*at[0].shape, *cache.shape[2:]), dtype=dtype)
    # Indexing works on an fp8 tensor's bytes everywhere.
    rows = cache.view(torch.uint8)[at].view(FP8) if cache.dtype == FP8 else cache[at]
    rows = rows.to(dtype)
    return rows if descale is None else rows * _descale(descale)[:, None, :, None]


def _append(
    problem: CacheProblem, inputs: CacheInputs, cache: Tensor, rows: Tensor, descale: Tensor | None, lengths: Tensor
) -> None:
    """Writes rows (batch, new, heads, dim) behind each sequence; one that does not fit, or whose place is none, keeps
    its cache."""
    if rows.numel() == 0:
        return
    if cache.dtype == FP8:
        scaled = rows.float() if descale is None else rows.float() / _descale(descale)[:, None, :, None]
        rows = scaled.clamp(-MAX_FP8, MAX_FP8).to(FP8).view(torch.uint8)
        cache = cache.view(torch.uint8)
    positions = lengths[:, None].long() + torch.arange(problem.appended, device=rows.device)
    # Compared without a sum, which could wrap around.
    fits = (lengths >= 0) & (lengths <= problem.capacity - problem.appended)
    positions = positions.clamp(0, max(problem.capacity - 1, 0))
    blocks, inside = _rows_of(problem, inputs, positions)
    fits = fits[:, None].expand_as(positions)
    if inputs.page_table is not None:
        pages = inputs.page_table.long().gather(1, positions // problem.page_size)
        fits = fits & (pages == blocks)
    if inputs.cache_batch_idx is not None:
        fits = fits & (inputs.cache_batch_idx.long()[:, None] == blocks)
    # A row that has no place repeats one that has: written back where it is clamped to, it could undo another.
    sources = torch.where(fits, torch.arange(problem.appended, device=rows.device), fits.int().argmax(1, keepdim=True))
    for i, source in enumerate(sources):
        at = (blocks[i, source], inside[i, source])
        cache[at] = torch.where(fits[i, source][:, None, None], rows[i, source], cache[at])
