"""From a checked KV-cache call to a launch of the decode kernel: the compiled kernel, work space, number of blocks.

An inference engine calls this thousands of times a second: what follows from a call's signature is made once and kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fa4_core.kvcache import CacheInputs, CacheProblem
from fa4_core.work_space import work_space
from fa4_cute import kernels
from fa4_cute.decode_config import MOST_PARTS, CacheKinds, parts_of, rounded, slots_of
from fa4_cute.launch import architecture_of, values_of

DRAWS = 2
"""Counters behind the sequences' own; see `schedule.draw`."""


class _Call(NamedTuple):
    """What calls of one signature share. values, sizes: the kernel's numbers before and after the length."""

    kernel: Callable[..., None]
    values: tuple[float | int | None, ...]
    sizes: tuple[int, ...]
    n_parts: int
    n_arrivals: int
    wide_sink: bool


def kinds_of(problem: CacheProblem, with_lse: bool) -> CacheKinds:
    """What a call's kernel is compiled for. with_lse: whether the LSE is wanted."""
    attend, kinds = problem.attend, problem.attend.kinds
    return CacheKinds(
        kinds=kinds,
        rows=rounded(attend.seqlen_q * kinds.group),
        page_size=problem.page_size if kinds.paged else 0,
        lengths=problem.meta("cache_seqlens") is not None,
        indexed=problem.meta("cache_batch_idx") is not None,
        padded=problem.meta("cache_leftpad") is not None,
        lse=with_lse,
    )


@functools.lru_cache(maxsize=4096)
def _call_of(problem: CacheProblem, with_lse: bool) -> _Call:
    attend = problem.attend
    sink = problem.meta("sink")
    sink_dtype = None if sink is None else sink.dtype
    wide_sink = sink_dtype == torch.float64  # which no kernel reads
    teams = _teams(attend.device, attend.heads_kv)
    cluster = 1 if attend.heads_kv % 2 else 2
    return _Call(
        kernel=_kernel(kinds_of(problem, with_lse), torch.float32 if wide_sink else sink_dtype, attend.device),
        values=values_of(attend),
        sizes=(problem.appended, problem.num_splits, slots_of(problem), teams, cluster),
        n_parts=parts_of(problem),
        n_arrivals=attend.batch * attend.heads_kv + DRAWS,
        wide_sink=wide_sink,
    )


def _teams(device: torch.device, heads_kv: int) -> int:
    """Teams of blocks, one for each KV head, that share the work of a call. Results do not depend on it."""
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // heads_kv)


@functools.lru_cache(maxsize=1024)
def _kernel(kinds: CacheKinds, sink_dtype: torch.dtype | None, device: torch.device) -> Callable[..., None]:
    """The compiled kernel; kept a device, since a loaded kernel may belong to the device it was first launched on."""
    return kernels.decode(kinds, sink_dtype, architecture_of(device))


def attend_cache(problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None) -> None:
    """Writes out and lse, once the call's rows are appended; arguments as in `Backend.attend_cache`."""
    q, k, v, _, _, seqlens, pages, indices, leftpad, _, _, _, _, sink = inputs
    if not out.numel() or not problem.capacity:
        _write_unseen(out, lse, sink)
        return
    call = _call_of(problem, lse is not None)
    if call.wide_sink and sink is not None:
        sink = sink.float()
    parts, arrivals = work_space(call.n_parts, call.n_arrivals, problem.attend.device)
    if parts.numel() >= MOST_PARTS:  # another backend's call had them made
        parts = parts[: call.n_parts]
    call.kernel(
        q, k, v, out, lse, sink, seqlens, indices, leftpad, pages, *call.values, length, *call.sizes, parts, arrivals
    )


def _write_unseen(out: Tensor, lse: Tensor | None, sink: Tensor | None) -> None:
    """The result of a call whose rows see no key, or that has none."""
    out.zero_()
    if lse is not None:
        lse.copy_(torch.full_like(lse, -math.inf) if sink is None else sink[None, :, None].expand_as(lse))
