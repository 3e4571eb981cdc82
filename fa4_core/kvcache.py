"""Attention over a KV cache: the checks, the torch operator, and the reference in plain PyTorch.

A call appends new rows to the cache in place, and attends over what the cache then holds. The semantics stand in
docs/semantics.md; the signature follows flash-attn's `flash_attn_with_kvcache`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fa4_core import ops
from fa4_core.allocation import allocator
from fa4_core.problem import (
    DEFAULT_RESCALE_THRESHOLD,
    DTYPES,
    MAX_HEAD_DIM,
    UNBOUNDED,
    Inputs,
    Kinds,
    Meta,
    Problem,
    Signature,
    Stride,
    check_numbers,
    check_page_size,
    check_pages,
    check_types,
    contents_are_checked,
    is_contiguous,
    signature_of,
)

if TYPE_CHECKING:
    from fa4_core.backends import Backend

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
    `page_size` is their rows. `signature` is that of `CacheInputs` and, last, of `out`, None where the call makes
    it. `aligned`: whether q, the caches and `out` lie at multiples of 16 bytes. `positions` and `rotary_dim` are those
    of the rotary embedding, 0 without; with it, the rows of q stand at consecutive positions under a mask and all at
    the first one without.
    """

    attend: Problem
    signature: Signature
    cache_dtype: torch.dtype
    appended: int
    n_blocks: int
    page_size: int
    positions: int
    rotary_dim: int
    rotary_interleaved: bool
    num_splits: int
    aligned: bool = True

    def meta(self, name: str) -> Meta | None:
        """What the signature says of an argument; None where the call has none."""
        meta = self.signature[_NAMES.index(name)]
        return None if meta is None else Meta(*meta)

    @property
    def appends(self) -> bool:
        """Whether there are rows to append or, with none of them, a query to rotate."""
        return self.attend.batch > 0 and (self.appended > 0 or self.rotary_dim > 0)

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


class CacheOptions(NamedTuple):
    """What a call has besides tensors and cache_seqlens: as `dispatch.attention_with_kvcache` takes it, but for the
    windows, -1 for unbounded."""

    softmax_scale: float | None = None
    softcap: float = 0.0
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    rotary_interleaved: bool = True
    num_splits: int = 0
    backend: str = "auto"


def _check_length(problem: CacheProblem, length: int) -> None:
    room = problem.capacity - problem.appended
    if not 0 <= length <= room:
        new = f" and {problem.appended} are appended" if problem.appended else ""
        raise ValueError(
            f"cache_seqlens: got {length}, accepted are 0 to {room}: the cache holds {problem.capacity} rows{new}"
        )
    if problem.rotary_dim and length + problem.reach > problem.positions:
        raise ValueError(f"rotary_cos: {problem.positions} positions, but the call reaches {length + problem.reach}")


def _is(name: str, meta: Meta, shape: tuple[int, ...], what: str, q: Meta) -> None:
    if tuple(meta.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(meta.shape)}, accepted is {what} = {shape}")
    if meta.device != q.device:
        raise ValueError(f"{name}: on {meta.device}, but q is on {q.device}")


def _is_index(name: str, meta: Meta, shape: tuple[int, ...], what: str, q: Meta) -> None:
    if meta.dtype != torch.int32:
        raise TypeError(f"{name}: dtype {meta.dtype} is not accepted, only torch.int32")
    _is(name, meta, shape, what, q)


def _both(first: str, second: str, a: Meta | None, b: Meta | None) -> None:
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        raise ValueError(f"{missing}: missing, but {given} was given; both or neither are accepted")


def check_cache_signature(signature: Signature, options: CacheOptions, aligned: bool = True) -> CacheProblem:
    """Checks what calls of one signature share and returns their problem.

    Args:
        signature: of `CacheInputs` and, last, of `out`.
        options: the call's.
        aligned: as in `CacheProblem`.

    Raises:
        TypeError: an argument has a wrong dtype.
        ValueError: a shape, device, stride or number is out of what is accepted. Messages name the argument.
    """
    q, k_cache, v_cache, k, v, seqlens, page_table, batch_idx, leftpad, cos, sin, k_descale, v_descale, sink, out = (
        None if meta is None else Meta(*meta) for meta in signature
    )
    assert q is not None
    assert k_cache is not None
    assert v_cache is not None
    softmax_scale, softcap, window_left, window_right, rotary_interleaved, num_splits, _ = options
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
    if out is not None:
        _check_out(out, (batch, seqlen_q, heads_q, head_dim_v), q)
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
        strides=(q.stride, k_cache.stride, v_cache.stride),
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
        signature=signature,
        cache_dtype=k_cache.dtype,
        appended=appended,
        n_blocks=n_blocks,
        page_size=page_size,
        positions=positions,
        rotary_dim=rotary_dim,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        aligned=aligned,
    )


def _check_query(q: Meta) -> tuple[int, int, int, int]:
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


def _check_cache(q: Meta, k_cache: Meta, v_cache: Meta, paged: bool) -> tuple[int, int, int, int]:
    """Returns blocks, rows of a block, heads_kv and head_dim_v."""
    layout = "(n_pages, page_size, heads_kv, head_dim)" if paged else "(batch, seqlen, heads_kv, head_dim)"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if len(cache.shape) != 4:
            raise ValueError(f"{name}: got shape {tuple(cache.shape)}, accepted is {layout}")
        if cache.dtype not in (q.dtype, FP8):
            raise TypeError(f"{name}: dtype {cache.dtype}, accepted are q's {q.dtype} and {FP8}")
        if cache.device != q.device:
            raise ValueError(f"{name}: on {cache.device}, but q is on {q.device}")
        if cache.stride[-1] != 1 and cache.shape[-1] != 1:  # what is copied would not be written in place
            raise ValueError(f"{name}: its last dimension has stride {cache.stride[-1]}, accepted is 1")
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


def _check_new(q: Meta, k: Meta | None, v: Meta | None, batch: int, heads_kv: int, head_dim_v: int) -> int:
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


def _check_rotary(q: Meta, cos: Meta | None, sin: Meta | None, k: Meta | None) -> tuple[int, int]:
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


def _check_descale(name: str, descale: Meta | None, cache: Meta, batch: int, heads_kv: int, q: Meta) -> None:
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
_NAMES = (*CacheInputs._fields, "out")
_ROTARY = ("rotary_cos", "rotary_sin")
_VECTORS = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "sink")


class _Call(NamedTuple):
    """What calls of one signature share.

    cuda_index: of the device, None elsewhere. as_is: whether the backend takes the tensors as they lie. out, lse: make
    the results.
    """

    problem: CacheProblem
    backend: Backend
    cuda_index: int | None
    as_is: bool
    out: Callable[[], Tensor]
    lse: Callable[[], Tensor]


def _are_aligned(inputs: CacheInputs, out: Tensor | None) -> bool:
    """As `CacheProblem.aligned`."""
    bits = 0
    for tensor in (*inputs[:3], out):
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % 16 == 0


@functools.lru_cache(maxsize=4096)
def _call_of(signature: Signature, options: CacheOptions, aligned: bool) -> _Call | None:
    """Checks what equal signatures share, and chooses the backend; None where no operator is for the device.

    aligned: as in `CacheProblem`. Raises as both do.
    """
    check_types(_NAMES, signature, ("q", "k_cache", "v_cache"), tuple)
    if any(meta is not None and meta[3].type not in ops.DEVICE_TYPES for meta in signature):
        return None
    problem = check_cache_signature(signature, options, aligned)
    attend, device = problem.attend, problem.attend.device
    backend = ops.backend_of(attend, options.backend, problem)
    q, _, _, k, v, seqlens, pages, batch_idx, leftpad, cos, sin, _, _, sink, _ = signature
    rows = (meta for meta in (q, k, v, pages, cos, sin) if meta is not None)
    vectors = (meta for meta in (seqlens, batch_idx, leftpad, sink) if meta is not None)
    as_is = all(_has_plain_rows(*meta[:2]) for meta in rows) and all(is_contiguous(*meta[:2]) for meta in vectors)
    return _Call(
        problem=problem,
        backend=backend,
        cuda_index=device.index if device.type == "cuda" else None,
        as_is=as_is,
        out=allocator(attend.out_shape, attend.kinds.dtype, device),
        lse=allocator(attend.lse_shape, ops.lse_dtype(attend.kinds.dtype), device),
    )


ops.on_new_chooser.append(_call_of.cache_clear)


def _has_plain_rows(shape: tuple[int, ...], stride: Stride) -> bool:
    return stride[-1] == 1 or shape[-1] == 1


def _with_plain_rows(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or _has_plain_rows(tensor.shape, tensor.stride()) else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


@functools.lru_cache(maxsize=4096)
def _with_signature(problem: CacheProblem, signature: Signature) -> CacheProblem:
    return replace(problem, signature=signature)


def _fitted(problem: CacheProblem, inputs: CacheInputs, out: Tensor | None) -> tuple[CacheProblem, CacheInputs]:
    """The problem as backends take it (see `Backend.attend_cache`): what does not lie so is copied."""
    rows = {name: _with_plain_rows(getattr(inputs, name)) for name in ("q", "k", "v", "page_table", *_ROTARY)}
    vectors = {name: _contiguous(getattr(inputs, name)) for name in _VECTORS}
    inputs = inputs._replace(**rows, **vectors)
    return _with_signature(problem, signature_of((*inputs, out))), inputs


def _run(
    call: _Call, inputs: CacheInputs, length: int | None, out: Tensor | None, lse: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Runs one call that is checked but for its lengths; makes out and lse where they are wanted and not there."""
    problem, backend, index, as_is, make_out, make_lse = call
    if index is not None and torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _run(call, inputs, length, out, lse, with_lse)
    # No question of signature: an int that grows with every step must not make a new problem each time.
    if length is not None:
        _check_length(problem, length)
    if contents_are_checked(problem.attend.device):
        _check_contents(problem, inputs, length or 0)
    if not as_is:
        problem, inputs = _fitted(problem, inputs, out)
    out = make_out() if out is None else out
    lse = make_lse() if lse is None and with_lse else lse
    backend.attend_cache(problem, inputs, length or 0, out, lse)
    return out, lse


def _operator(*args) -> None:
    inputs = CacheInputs(*args[:_N_TENSORS])
    out, lse, length, values, left, right, interleaved, num_splits, backend = args[_N_TENSORS:]
    scale, softcap = (None, 0.0) if values is None else values.tolist()[:2]
    options = CacheOptions(None if scale != scale else scale, softcap, left, right, interleaved, num_splits, backend)
    call = _call_of(signature_of((*inputs, out)), options, _are_aligned(inputs, out))
    assert call is not None  # the dispatcher has brought it here
    with torch.autocast(inputs.q.device.type, enabled=False):
        _run(call, inputs, length, out, lse, False)


def _fake(*args) -> None:
    # One tensor on the meta device brings the whole call here, past the checks that stand before a launch.
    for name, tensor in zip(CacheInputs._fields, args):
        if tensor is not None and tensor.device != args[0].device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {args[0].device}")


for _name in (_PLAIN, _SCORED):
    for _key in map(str.upper, ops.DEVICE_TYPES):
        _LIBRARY.impl(_name, _operator, _key)
    torch.library.register_fake(f"fa4::{_name}", _fake, lib=_LIBRARY)


def refuse_gradients(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raises ValueError where autograd would record a call that has no gradients."""
    for name, tensor in zip(names, tensors) if torch.is_grad_enabled() else ():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but a KV cache and paged keys have none; call it under torch.no_grad()"
            )


def attend(
    inputs: CacheInputs, out: Tensor | None, length: int | None, options: CacheOptions, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Runs one call. Returns out and lse.

    Args:
        inputs, out: as `dispatch.attention_with_kvcache` takes them, unchecked.
        length: cache_seqlens where that is an int.
        options: the call's, of checked types.
        with_lse: whether lse is wanted.
    """
    tensors = (*inputs, out)
    signature = ops.plain_signature(tensors)
    call = None if signature is None else _call_of(signature, options, _are_aligned(inputs, out))
    if call is None:
        check_types(_NAMES, tensors, ("q", "k_cache", "v_cache"))
    if torch.is_grad_enabled():
        refuse_gradients(_NAMES, tensors)
    if call is not None:
        return _run(call, inputs, length, out, None, with_lse)
    q, v_cache = inputs.q, inputs.v_cache
    if q.dim() != 4 or v_cache.dim() != 4:
        check_cache_signature(signature_of(tensors), CacheOptions())  # raises
    shape = (*q.shape[:3], v_cache.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
    else:
        _check_out(Meta(out.shape, out.stride(), out.dtype, out.device), shape, q)
    lse = None
    if with_lse:
        lse = torch.empty((shape[0], shape[2], shape[1]), dtype=ops.lse_dtype(q.dtype), device=q.device)
    scale, softcap, *rest = options
    values = ops.pack_values(scale, softcap, DEFAULT_RESCALE_THRESHOLD)
    operator = ops.overload_for(torch.ops.fa4.attention_with_kvcache, values)
    operator(*inputs, out, lse, length, values, *rest)
    return out, lse


def _check_out(out: Meta, shape: tuple[int, ...], q: Meta | Tensor) -> None:
    if out.dtype != q.dtype:
        raise TypeError(f"out: dtype {out.dtype} differs from q's {q.dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, accepted is (batch, seqlen, heads_q, head_dim_v) = {shape}"
        )
    if out.device != q.device:
        raise ValueError(f"out: on {out.device}, but q is on {q.device}")
    if out.shape[-1] != 1 and out.stride[-1] != 1:
        raise ValueError(f"out: its last dimension has stride {out.stride[-1]}, accepted is 1")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride, shape)):
        raise ValueError(f"out: strides {out.stride} of shape {shape}: accepted is a place of its own for each element")


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
