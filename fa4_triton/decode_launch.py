"""From a checked KV-cache call, or a paged one, to the launches: kernel, tile, work space, number of programs.

An inference engine calls this thousands of times a second. What follows from a call's signature and strides (arguments
but for the pointers, grid, compiled kernel) is made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from fa4_core.allocation import contiguous_stride
from fa4_core.kvcache import FP8, CacheInputs, CacheProblem
from fa4_core.problem import Inputs, Problem, Stride
from fa4_core.work_space import work_space
from fa4_triton import interpreted
from fa4_triton import launch as host
from fa4_triton.append import append_rows
from fa4_triton.cache_tiles import MAX_ROWS, CacheTile, decode_tile, prefill_tile
from fa4_triton.compile import (
    POINTER_ALIGNMENT,
    Arguments,
    addresses,
    compile_kernel,
    loaded_once,
    named,
    run_compiled,
)
from fa4_triton.decode import MOST_CHUNKS, attention_decode
from fa4_triton.prefill import attention_prefill

APPEND_TILE = CacheTile(16, 0, 4, 1)


class _Plan(NamedTuple):
    """What calls of one kind share: as `launch._Plan`."""

    kernel: Any
    tile: CacheTile
    constants: dict[str, Any]
    compiled: dict[tuple, CompiledKernel]


@functools.cache
def _plan(kernel: Any, tile: CacheTile, constants: tuple, kinds: tuple, device: torch.device) -> _Plan:
    """One plan for each set of kinds on a device (a compiled handle belongs to one device)."""
    return _Plan(kernel, tile, dict(constants), {})


def compile_planned(plan: _Plan, args: tuple, target: Any, layout: tuple) -> CompiledKernel:
    """Compiles a kernel as `_launch` would for `target`, which need not be there."""
    options = {"num_warps": plan.tile.warps, "num_stages": plan.tile.stages}
    return compile_kernel(plan.kernel, args, plan.constants, options, target, layout[-1])


def _launch(plan: _Plan, device: torch.device, grid: int, arguments: Arguments, layout: tuple) -> None:
    """Launches `grid` programs on the device's current stream.

    layout: what the compiled kernel takes from the arguments beyond the plan's kinds; its last entry is "aligned".
    """
    if grid == 0:
        return
    if interpreted():
        plan.kernel[(grid,)](*named(plan.kernel, arguments(False)), **plan.constants)
        return
    compiled = plan.compiled.get(layout) or loaded_once(
        plan.compiled, layout, device, compile_planned, plan, arguments(False), host.target_of(device), layout
    )
    run_compiled(compiled, grid, device.index, (*arguments(True), *plan.constants.values()))


@functools.cache
def _teams(device: torch.device, per_multiprocessor: int, heads_kv: int) -> int:
    """Teams of programs, one for each KV head, that share the work of a decode. Results do not depend on it.

    per_multiprocessor: programs that one holds.
    """
    if device.type != "cuda":
        return 3  # interpreted or emulated: enough that a sequence's chunks meet several teams
    return max(1, per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count // heads_kv)


def _stride(meta: tuple | None) -> Stride | None:
    """The strides in a tensor's part of a signature."""
    return None if meta is None else meta[1]


def _addresses(tensors: Iterable[Tensor | None], rows: int) -> tuple[list[int | None], bool]:
    """The tensors' addresses, and whether those of the first `rows` tensors are aligned."""
    found = addresses(tensors)
    bits = 0
    for address in found[:rows]:
        bits |= address or 0
    return found, bits % POINTER_ALIGNMENT == 0


def _bytes(tensor: Tensor) -> Tensor:
    """An fp8 tensor as the bytes that the kernels read."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def _rows_of(strides: tuple | None) -> tuple:
    """What follows the pointer in `Strided`: strides of a (B, S, H, D) or (total, H, D) tensor, and no descriptor."""
    if strides is None:
        return (None, None, None, None)
    return (*host._row_strides(strides), None)


def _statistics_of(strides: tuple | None) -> tuple:
    """What follows the pointer in `Statistics`: strides of a (B, H, S) or (H, total) tensor."""
    if strides is None:
        return (None, None, None)
    return host._number_strides(strides)


def _descale_of(strides: tuple | None) -> tuple:
    """What follows the pointer in `Descale`: strides of a (batch, heads) or (heads,) tensor."""
    if strides is None:
        return (None, None)
    return (strides[0] if len(strides) == 2 else 0, strides[-1])


def _aligned(strides: Iterable[Stride | None]) -> bool:
    return host._strides_are_aligned(*[s for s in strides if s is not None])


_Tensors = tuple[Tensor | None, ...]
"""A launch's q, k, v, out, lse, sink, cu_q, used_q, used_k, leftpad, cache, pages, k_descale and v_descale, whether for
`attend_cache` or for `paged_forward`; None where it has none."""


class _Call(NamedTuple):
    """What calls of one signature and strides share."""

    plan: _Plan
    grid: int
    n_parts: int
    n_arrivals: int
    layout: tuple
    args: Callable[[tuple, Any, Any, int], tuple]
    """(the tensors or their addresses, parts, arrivals, length) to the kernel's arguments, in plain tuples."""


def _most_tiles(problem: Problem, tile_n: int) -> int:
    """Upper bound of the tiles of keys that the rows of one sequence see."""
    keys = problem.seqlen_k
    if problem.kinds.window_left:
        right = problem.window_right if problem.kinds.window_right else keys
        keys = min(keys, problem.window_left + problem.seqlen_q + right + 2 * tile_n)
    return max(1, triton.cdiv(keys, tile_n))


def _make_call(
    problem: Problem, n_blocks: int, page_size: int, added: int, num_splits: int, cache_dtype: torch.dtype,
    there: tuple[bool, ...], sink_dtype: torch.dtype | None, strides: tuple[tuple | None, ...], aligned: bool,
) -> _Call:  # fmt: skip
    """The launch of a call; there: which of `_Tensors` are given; strides: of those with more than one dimension;
    aligned: whether the addresses of rows are."""
    kinds, device = problem.kinds, problem.device
    heads_kv, packed = problem.heads_kv, problem.seqlen_q * kinds.group
    target = None if interpreted() else host.target_of(device)
    sizes = (kinds.dtype.itemsize, cache_dtype.itemsize, max(kinds.head_dim, kinds.head_dim_v))
    decodes = not kinds.varlen and not kinds.seqused_q and packed <= MAX_ROWS
    tile = decode_tile(*sizes, packed, target) if decodes else prefill_tile(*sizes, target)
    constants = [
        ("GROUP", kinds.group),
        ("DIM", kinds.head_dim),
        ("DIM_V", kinds.head_dim_v),
        ("ROWS", tile.rows),
        ("TILE_N", tile.n),
    ]
    n_parts = n_arrivals = blocks = slots = 0
    if decodes:
        pairs = problem.batch * heads_kv
        most_tiles = _most_tiles(problem, tile.n)
        slots = num_splits or min(MOST_CHUNKS, most_tiles)
        n_parts, n_arrivals = pairs * slots * packed * (kinds.head_dim_v + 2), pairs
        teams = min(_teams(device, tile.programs, heads_kv), problem.batch * slots)
        grid = teams * heads_kv if packed else 0
    else:
        # A sequence may end within a block.
        blocks = triton.cdiv(packed, tile.rows) * problem.batch
        if kinds.varlen:
            blocks = packed // tile.rows + problem.batch
        grid = blocks * heads_kv
    constants.append(("PAGE", page_size if kinds.paged else 0))
    flags = (kinds.dtype, cache_dtype, kinds.window_left, kinds.window_right, kinds.softcap)
    plan = _plan(attention_decode if decodes else attention_prefill, tile, tuple(constants), flags, device)
    at_q, at_k, at_v, at_out, at_lse, at_pages, at_k_descale, at_v_descale = strides
    q_of, k_of, v_of, out_of = map(_rows_of, (at_q, at_k, at_v, at_out))
    lse_of, k_descale_of, v_descale_of = _statistics_of(at_lse), _descale_of(at_k_descale), _descale_of(at_v_descale)
    rows_of = (
        None if at_pages is None else at_pages[0], problem.batch, problem.seqlen_q, problem.seqlen_k, n_blocks,
    )  # fmt: skip
    values = host._values(problem)
    splits_of = (slots, num_splits)

    def args(tensors: tuple, parts: Any, arrivals: Any, length: int) -> tuple:
        q, k, v, out, lse, sink, cu_q, used_q, used_k, leftpad, cache, pages, k_descale, v_descale = tensors
        return (
            (q, *q_of), (k, *k_of), (v, *v_of), (out, *out_of), (lse, *lse_of), sink,
            (cu_q, used_q, used_k, leftpad, cache, pages, *rows_of, length, added), values,
            (parts, arrivals, *splits_of) if decodes else blocks, heads_kv, (k_descale, *k_descale_of),
            (v_descale, *v_descale_of),
        )  # fmt: skip

    layout = (there, sink_dtype, aligned and _aligned(strides[:4]))
    return _Call(plan, grid, n_parts, n_arrivals, layout, args)


@functools.lru_cache(maxsize=4096)
def _call_of(problem: CacheProblem, lse: Stride | None, aligned: bool) -> _Call:
    """The launch of `attend_cache`; lse: its strides, None where it is not wanted; aligned: as in `_make_call`."""
    q, k, v, _, _, used_k, pages, cache, leftpad, _, _, k_descale, v_descale, sink, out = problem.signature
    there = (True, True, True, True, lse, sink, None, None, used_k, leftpad, cache, pages, k_descale, v_descale)
    at_q = contiguous_stride(q[0]) if problem.rotary_dim else q[1]  # a rotated query is a new tensor
    at_out = contiguous_stride(problem.attend.out_shape) if out is None else out[1]
    strides = (at_q, *map(_stride, (k, v)), at_out, lse, *map(_stride, (pages, k_descale, v_descale)))
    return _make_call(
        problem.attend, problem.n_blocks, problem.page_size, problem.appended, problem.num_splits, problem.cache_dtype,
        tuple([a is not None for a in there]), None if sink is None else sink[2], strides, aligned,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _paged_call_of(
    problem: Problem, n_blocks: int, page_size: int, pages: Stride, sink_dtype: torch.dtype | None, aligned: bool
) -> _Call:
    """The launch of `paged_forward`."""
    kinds = problem.kinds
    there = (*(True,) * 5, kinds.sink, kinds.varlen, kinds.seqused_q, True, False, False, True, False, False)
    results = contiguous_stride(problem.out_shape), contiguous_stride(problem.lse_shape)
    strides = (*problem.strides, *results, pages, None, None)
    return _make_call(problem, n_blocks, page_size, 0, 0, kinds.dtype, there, sink_dtype, strides, aligned)


def forget() -> None:
    """Drops what was prepared for calls seen before: for tests and tuners that replace a tile, a plan or a target."""
    for kept in (_call_of, _paged_call_of, _append_of):
        kept.cache_clear()


def _attend(call: _Call, device: torch.device, tensors: _Tensors, pointers: list[int | None], length: int) -> None:
    """Launches the attention; length: of every sequence where no tensor says it."""
    parts = arrivals = None
    if call.n_arrivals:
        parts, arrivals = work_space(call.n_parts, call.n_arrivals, device)

    def arguments(as_addresses: bool) -> tuple:
        if as_addresses:
            work = (None, None) if parts is None else (parts.data_ptr(), arrivals.data_ptr())
            return call.args(pointers, *work, length)
        q, k, v, *rest = tensors
        return call.args((q, _bytes(k), _bytes(v), *rest), parts, arrivals, length)

    _launch(call.plan, device, call.grid, arguments, call.layout)


def attend_cache(problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None) -> None:
    """Appends, and writes out and lse; arguments as in `Backend.attend_cache`."""
    attend = problem.attend
    q, k_cache, v_cache, _, _, used_k, pages, cache, leftpad, _, _, k_descale, v_descale, sink = inputs
    if problem.appends:
        q = append(problem, inputs, length)
    tensors = (
        q, k_cache, v_cache, out, lse, sink, None, None, used_k, leftpad, cache, pages, k_descale, v_descale
    )  # fmt: skip
    pointers, aligned = _addresses(tensors, 4)
    call = _call_of(problem, None if lse is None else lse.stride(), aligned)
    _attend(call, attend.device, tensors, pointers, length)


def paged_forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out and lse of a call with a page_table; arguments and results as in `Backend.forward`."""
    kinds, device, k, pages = problem.kinds, problem.device, inputs.k, inputs.page_table
    assert pages is not None
    # Rows that take no part are not visited.
    partial = kinds.varlen or kinds.seqused_q
    out = (torch.zeros if partial else torch.empty)(problem.out_shape, dtype=kinds.dtype, device=device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    if partial:
        lse.fill_(float("-inf"))
    tensors = (
        inputs.q, k, inputs.v, out, lse, inputs.sink, inputs.cu_seqlens_q, inputs.seqused_q, inputs.seqused_k, None,
        None, pages, None, None,
    )  # fmt: skip
    pointers, aligned = _addresses(tensors, 4)
    call = _paged_call_of(problem, k.shape[0], k.shape[1], pages.stride(), host._dtype(inputs.sink), aligned)
    _attend(call, device, tensors, pointers, 0)
    return out, lse


class _Append(NamedTuple):
    """What appends of one signature and strides share, as `_Call`."""

    plan: _Plan
    grid: int
    layout: tuple
    args: Callable[[tuple, int], tuple]
    """(the tensors or their addresses, length) to the kernel's arguments, in plain tuples."""


@functools.lru_cache(maxsize=4096)
def _append_of(problem: CacheProblem, aligned: bool) -> _Append:
    """The append of a call; aligned: whether the addresses of rows are."""
    attend, kinds = problem.attend, problem.attend.kinds
    q, k_cache, v_cache, k, v, used_k, pages, cache, _, cos, sin, k_descale, v_descale, _, _ = problem.signature
    at_turned = None
    if problem.rotary_dim:
        at_turned = contiguous_stride(q[0])
    else:
        q = None
    at_rows = [_stride(q), at_turned, *map(_stride, (k, v, k_cache, v_cache))]
    at_pages, at_cos, at_sin, at_k_descale, at_v_descale = map(_stride, (pages, cos, sin, k_descale, v_descale))
    there = (q, at_turned, k, v, k_cache, v_cache, used_k, cache, pages, cos, sin, k_descale, v_descale)
    rows_of = [_rows_of(stride) for stride in at_rows]
    cache_of = (
        None if at_pages is None else at_pages[0], attend.batch, attend.seqlen_q, problem.capacity, problem.n_blocks,
    )  # fmt: skip
    rotary_of = (None, None, None, None)
    blocks = triton.cdiv(problem.appended * attend.heads_kv, APPEND_TILE.rows)
    if at_cos is not None and at_sin is not None:
        rotary_of = (at_cos[0], at_sin[0], problem.positions, int(problem.consecutive))
        blocks += triton.cdiv(attend.seqlen_q * attend.heads_q, APPEND_TILE.rows)
    k_descale_of, v_descale_of = _descale_of(at_k_descale), _descale_of(at_v_descale)
    constants = (
        ("DIM", kinds.head_dim),
        ("DIM_V", kinds.head_dim_v),
        ("ROTARY", problem.rotary_dim),
        ("INTERLEAVED", problem.rotary_interleaved),
        ("BLOCK", APPEND_TILE.rows),
        ("PAGE", problem.page_size if kinds.paged else 0),
    )
    plan = _plan(append_rows, APPEND_TILE, constants, (kinds.dtype, problem.cache_dtype), attend.device)

    def args(tensors: tuple, length: int) -> tuple:
        *rows, used_k, cache, pages, cos, sin, k_descale, v_descale = tensors
        return (
            *[(t, *of) for t, of in zip(rows, rows_of)],
            (None, None, used_k, None, cache, pages, *cache_of, length, problem.appended), (cos, sin, *rotary_of),
            attend.heads_q, attend.heads_kv, (k_descale, *k_descale_of), (v_descale, *v_descale_of),
        )  # fmt: skip

    layout = (tuple([a is not None for a in there]), None if cos is None else cos[2], aligned and _aligned(at_rows))
    return _Append(plan, blocks * attend.batch, layout, args)


def append(problem: CacheProblem, inputs: CacheInputs, length: int) -> Tensor:
    """Launches the append; returns the query, rotated where there is a rotary embedding."""
    q, k_cache, v_cache, k, v, used_k, pages, cache, _, cos, sin, k_descale, v_descale, _ = inputs
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if problem.rotary_dim else None
    tensors = (
        None if turned is None else q, turned, k, v, k_cache, v_cache, used_k, cache, pages, cos, sin, k_descale,
        v_descale,
    )  # fmt: skip
    pointers, aligned = _addresses(tensors, 6)
    call = _append_of(problem, aligned)

    def arguments(as_addresses: bool) -> tuple:
        if as_addresses:
            return call.args(pointers, length)
        return call.args((*tensors[:4], _bytes(k_cache), _bytes(v_cache), *tensors[6:]), length)

    _launch(call.plan, problem.attend.device, call.grid, arguments, call.layout)
    return q if turned is None else turned
