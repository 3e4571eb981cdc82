"""From a checked KV-cache call, or a paged one, to the launches: tiles, work space, programs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from fa4_core.kvcache import FP8, MAX_SPLITS, CacheInputs, CacheProblem
from fa4_core.problem import Inputs, Problem
from fa4_triton import interpreted
from fa4_triton import launch as host
from fa4_triton.append import Rotary, append_rows
from fa4_triton.compile import compile_kernel, is_aligned
from fa4_triton.decode import Descale, Rows, Splits, attention_decode
from fa4_triton.steps import Strided, Values
from fa4_triton.tiles import MAX_ROWS, DecodeTile, decode_tile

APPEND_BLOCK = 16
ARRIVALS = 2**16
"""Counters that a stream's work space holds at first."""


class _Plan(NamedTuple):
    """What calls of one kind share: as `launch._Plan`, with the tile of a decode kernel."""

    tile: DecodeTile
    constants: tuple[tuple[str, Any], ...]
    compiled: dict[tuple, CompiledKernel]


@functools.cache
def _decode_plan(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int, head_dim_v: int, group: int,
                 rows: int, kinds: tuple[bool, ...], device: torch.device) -> _Plan:  # fmt: skip
    """The plan of the decode kernel; rows: query rows of a sequence times the group. kinds: only distinguishes."""
    target = None if interpreted() else host.target_of(device)
    tile = decode_tile(dtype.itemsize, cache_dtype.itemsize, max(head_dim, head_dim_v), rows, target)
    constants = (
        ("GROUP", group),
        ("DIM", head_dim),
        ("DIM_V", head_dim_v),
        ("ROWS", tile.rows),
        ("TILE_N", tile.n),
        ("CHUNK", tile.chunk),
    )
    return _Plan(tile, constants, {})


@functools.cache
def _append_plan(head_dim: int, head_dim_v: int, rotary_dim: int, interleaved: bool, kinds: tuple,
                 device: torch.device) -> _Plan:  # fmt: skip
    constants = (
        ("DIM", head_dim),
        ("DIM_V", head_dim_v),
        ("ROTARY", rotary_dim),
        ("INTERLEAVED", interleaved),
        ("BLOCK", APPEND_BLOCK),
    )
    return _Plan(DecodeTile(APPEND_BLOCK, 0, 4, 1, 0, 0), constants, {})


def compile_planned(kernel: Any, plan: _Plan, args: tuple, target: Any, layout: tuple) -> CompiledKernel:
    """Compiles a kernel as `_launch` would for `target`, which need not be there."""
    options = {"num_warps": plan.tile.warps, "num_stages": plan.tile.stages}
    return compile_kernel(kernel, args, dict(plan.constants), options, target, layout[-1])


def _launch(kernel: Any, plan: _Plan, device: torch.device, grid: int, args: tuple, layout: tuple) -> None:
    """As `launch._launch`."""
    if grid == 0:
        return
    if interpreted():
        kernel[(grid,)](*args, **dict(plan.constants))
        return
    compiled = plan.compiled.get(layout)
    if compiled is None:
        with torch.cuda.device(device):
            compiled = plan.compiled[layout] = compile_planned(kernel, plan, args, host.target_of(device), layout)
    values = [value for _, value in plan.constants]
    if torch.cuda.current_device() == device.index:
        compiled[(grid, 1, 1)](*args, *values)
    else:
        with torch.cuda.device(device):
            compiled[(grid, 1, 1)](*args, *values)


@functools.cache
def _programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs that share the work of a decode. Results do not depend on it."""
    if device.type != "cuda":
        return 3  # interpreted or emulated: enough that a sequence's chunks meet several programs
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


_arrivals: dict[tuple[int | None, int], Tensor] = {}


def _arrival_counters(n: int, device: torch.device) -> Tensor:
    """Zeroed int32 counters, which every launch leaves at zero; launches of one stream may share them.

    A captured graph may run beside anything else, so it gets counters of its own, zeroed in the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    found = _arrivals.get(key)
    if found is None or found.numel() < n:
        found = _arrivals[key] = torch.zeros(max(n, ARRIVALS), dtype=torch.int32, device=device)
    return found


def _cache(tensor: Tensor) -> Strided:
    block, row, head, _ = tensor.stride()
    return Strided(tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor, block, row, head, None)


def _descale(tensor: Tensor | None) -> Descale:
    if tensor is None:
        return Descale(None, None, None)
    return Descale(tensor, tensor.stride(0) if tensor.dim() == 2 else 0, tensor.stride(-1))


def _index(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _plain_last_dim(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _values(problem: Problem) -> Values:
    kinds = problem.kinds
    return Values(
        float(problem.softmax_scale),
        float(problem.softcap) if kinds.softcap else None,
        problem.window_left if kinds.window_left else None,
        problem.window_right if kinds.window_right else None,
        None,
    )


def _most_tiles(problem: Problem, tile_n: int) -> int:
    """Upper bound of the tiles of keys that the rows of one sequence see."""
    keys = problem.seqlen_k
    if problem.kinds.window_left:
        right = problem.window_right if problem.kinds.window_right else keys
        keys = min(keys, problem.window_left + problem.seqlen_q + right + 2 * tile_n)
    return triton.cdiv(keys, tile_n)


def attend_cache(problem: CacheProblem, inputs: CacheInputs, out: Tensor, lse: Tensor) -> None:
    """Appends, and writes out and lse; arguments as in `Backend.attend_cache`."""
    attend = problem.attend
    q = _plain_last_dim(inputs.q)
    pages = inputs.page_table
    if pages is not None and pages.shape[1] and pages.stride(1) != 1:
        pages = pages.contiguous()
    rows = Rows(
        None, None, _index(inputs.cache_seqlens), _index(inputs.cache_leftpad), _index(inputs.cache_batch_idx), pages,
        None if pages is None else pages.stride(0), None if pages is None else problem.page_size, attend.batch,
        attend.seqlen_q, problem.capacity, problem.n_blocks, problem.length, problem.appended,
    )  # fmt: skip
    if problem.appended and attend.batch:
        q = _append(problem, inputs, q, rows)
    _attend(attend, q, inputs.k_cache, inputs.v_cache, out, lse, inputs.sink, rows, problem.num_splits,
            inputs.k_descale, inputs.v_descale)  # fmt: skip


def _append(problem: CacheProblem, inputs: CacheInputs, q: Tensor, rows: Rows) -> Tensor:
    """Launches the append; returns the query, rotated where there is a rotary embedding."""
    attend, kinds, device = problem.attend, problem.attend.kinds, q.device
    k, v = _plain_last_dim(inputs.k), _plain_last_dim(inputs.v)
    turned, rotary = None, Rotary(None, None, None, None, None, None)
    programs = triton.cdiv(problem.appended * attend.heads_kv, APPEND_BLOCK)
    if problem.rotary_dim:
        cos, sin = _plain_last_dim(inputs.rotary_cos), _plain_last_dim(inputs.rotary_sin)
        turned = torch.empty(q.shape, dtype=q.dtype, device=device)
        rotary = Rotary(cos, sin, cos.stride(0), sin.stride(0), cos.shape[0], int(problem.consecutive))
        programs += triton.cdiv(attend.seqlen_q * attend.heads_q, APPEND_BLOCK)
    none = Strided(None, None, None, None, None)
    aligned = all(map(is_aligned, (q, k, v, inputs.k_cache, inputs.v_cache)))
    args = (
        host._rows(q) if turned is not None else none, none if turned is None else host._rows(turned), host._rows(k),
        host._rows(v), _cache(inputs.k_cache), _cache(inputs.v_cache), rows, rotary, attend.heads_q, attend.heads_kv,
        _descale(inputs.k_descale), _descale(inputs.v_descale),
    )  # fmt: skip
    kinds_of = (kinds.dtype, problem.cache_dtype, kinds.paged)
    plan = _append_plan(kinds.head_dim, kinds.head_dim_v, problem.rotary_dim, problem.rotary_interleaved, kinds_of,
                        device)  # fmt: skip
    layout = (
        rows.used_k is None, rows.leftpad is None, rows.cache is None, inputs.k_descale is None,
        inputs.v_descale is None, rotary.cos is None or rotary.cos.dtype, aligned,
    )  # fmt: skip
    _launch(append_rows, plan, device, programs * attend.batch, args, layout)
    return q if turned is None else turned


def paged_forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out and lse of a call with a page_table; arguments and results as in `Backend.forward`."""
    kinds, device = problem.kinds, inputs.q.device
    k = inputs.k
    # Rows that take no part are not visited.
    partial = kinds.varlen or kinds.seqused_q
    out = (torch.zeros if partial else torch.empty)(problem.out_shape, dtype=kinds.dtype, device=device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    if partial:
        lse.fill_(float("-inf"))
    rows = Rows(
        inputs.cu_seqlens_q, inputs.seqused_q, inputs.seqused_k, None, None, inputs.page_table,
        inputs.page_table.stride(0), k.shape[1], problem.batch, problem.seqlen_q, problem.seqlen_k, k.shape[0], 0, 0,
    )  # fmt: skip
    _attend(problem, inputs.q, k, inputs.v, out, lse, inputs.sink, rows, 1 if kinds.varlen else 0, None, None)
    return out, lse


def _attend(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, rows: Rows,
    num_splits: int, k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    kinds, device = problem.kinds, q.device
    packed = problem.seqlen_q * kinds.group
    flags = (kinds.paged, kinds.window_left, kinds.window_right, kinds.softcap, kinds.sink, kinds.varlen)
    plan = _decode_plan(kinds.dtype, k.dtype, kinds.head_dim, kinds.head_dim_v, kinds.group,
                        min(packed, MAX_ROWS), flags, device)  # fmt: skip
    tile = plan.tile
    heads_kv = problem.heads_kv
    if kinds.varlen:
        blocks = packed // tile.rows + problem.batch
        pairs = blocks * heads_kv
    else:
        blocks = triton.cdiv(packed, tile.rows)
        pairs = blocks * heads_kv * problem.batch
    programs = _programs(device, tile.programs)
    if num_splits == 1 or (num_splits == 0 and blocks > 1):
        # Enough rows to share; by default such a row is not split, whatever its company.
        splits = Splits(None, None, None, None, None)
        programs = pairs if blocks > 1 else min(programs, pairs)
    else:
        most = _most_tiles(problem, tile.n)
        slots = num_splits or max(1, min(MAX_SPLITS, triton.cdiv(most, tile.chunk)))
        work = torch.empty(pairs * slots * tile.rows * (kinds.head_dim_v + 1), dtype=torch.float32, device=device)
        at = pairs * slots * tile.rows * kinds.head_dim_v
        splits = Splits(work[:at], work[at:], _arrival_counters(pairs, device), num_splits, slots)
        programs = min(programs, pairs * slots)
    aligned = all(map(is_aligned, (q, k, v, out)))
    args = (
        host._rows(q), _cache(k), _cache(v), host._rows(out), host._statistics(lse), sink, rows, _values(problem),
        splits, heads_kv, _descale(k_descale), _descale(v_descale),
    )  # fmt: skip
    layout = (
        rows.cu_q is None, rows.used_q is None, rows.used_k is None, rows.leftpad is None, rows.cache is None,
        splits.out is None, host._dtype(sink), k_descale is None, v_descale is None, aligned,
    )  # fmt: skip
    _launch(attention_decode, plan, device, programs, args, layout)
