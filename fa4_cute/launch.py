"""From a checked problem to a launch: tensors as TMA takes them, the compiled kernel, the memory of the results."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fa4_core import backends
from fa4_core.allocation import allocator
from fa4_core.lasting import make_lasting
from fa4_core.problem import Inputs, Kinds, Problem
from fa4_core.reserve import Reserve
from fa4_cute import kernels
from fa4_cute.alignment import ALIGNMENT, has_aligned_rows
from fa4_cute.sm90_config import LONG

COUNTED = 2**30
"""Rows and work items that kernels can number: sums of two stay within 32 bits."""
CAPTURED = 2**14
"""Counters kept ready for launches in CUDA graphs, two a launch: 64 KiB."""
LOG2_E = math.log2(math.e)

Run = Callable[..., tuple[Tensor, Tensor]]
"""`forward` with its problem prepared: of a tuple of `Inputs`' fields, and of counts where they are wanted."""


def forward(problem: Problem, inputs: Inputs, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns out and lse; arguments and results as in `Backend.forward`.

    counts: for tests, an int32 tensor of lse's shape and a last dimension of 2, which receives for each row that takes
    part and sees a key the key tiles visited and the rescales skipped.
    """
    return prepare(problem, inputs, counts is not None)(inputs, counts)


def prepare(problem: Problem, inputs: Inputs, counted: bool = False) -> Run:
    """As `Backend.prepare`. counted: whether calls bring counts."""
    return _prepared(problem, None if inputs.sink is None else inputs.sink.dtype, counted)


@functools.lru_cache(maxsize=4096)
def _prepared(problem: Problem, sink_dtype: torch.dtype | None, counted: bool) -> Run:
    kinds, device = problem.kinds, problem.device
    make_out = allocator(problem.out_shape, kinds.dtype, device)
    make_lse = allocator(problem.lse_shape, torch.float32, device, problem.with_lse)
    if not problem.total_q or not problem.total_k:
        return lambda tensors, counts=None: (make_out().zero_(), _unseen(make_lse(), problem, Inputs(*tensors)))
    wide_sink = sink_dtype == torch.float64  # which no kernel reads
    kernel = _kernels(kinds, torch.float32 if wide_sink else sink_dtype, counted, device)[_is_long(problem)]
    scale_log2, capped_scale, left, right, threshold, section, programs = _numbers(problem)
    draws = kernels.drawn(kinds)
    copies = not all(has_aligned_rows(stride, kinds.dtype.itemsize) for stride in problem.strides)

    def run(tensors: tuple, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, _ = tensors
        if wide_sink:
            sink = sink.float()
        if copies or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
            q, k, v = _aligned(q), _aligned(k), _aligned(v)
        out, lse = make_out(), make_lse()
        counter = _counter(device) if draws else None
        kernel(
            q, k, v, out, lse, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, scale_log2, capped_scale, left,
            right, threshold, section, programs, counter, counts,
        )  # fmt: skip
        return out, lse

    return run


def _unseen(lse: Tensor, problem: Problem, inputs: Inputs) -> Tensor:
    """The LSE of a call without keys: the sink's logit in rows that take part, else -inf."""
    lse.copy_(backends.load("reference").forward(problem, inputs)[1])
    return lse


@functools.lru_cache(maxsize=1024)
def _kernels(
    kinds: Kinds, sink_dtype: torch.dtype | None, counted: bool, device: torch.device
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled kernel for any rows and the one for long ones, which may be the same.

    Made together, so that no call compiles because it is longer than those before. Kept a device, since a loaded kernel
    may belong to the device it was first launched on.
    """
    arch = architecture_of(device)
    made = [kernels.forward(kinds, sink_dtype, counted, arch, form) for form in kernels.forms(kinds, arch)]
    return made[0], made[-1]


def _is_long(problem: Problem) -> bool:
    """Whether rows may see LONG keys; of packed sequences, if they are equally long."""
    keys = problem.seqlen_k // max(problem.batch, 1) if problem.kinds.varlen else problem.seqlen_k
    if problem.kinds.window_left and problem.kinds.window_right:
        keys = min(keys, problem.window_left + problem.window_right + 1)
    return keys >= LONG


def architecture_of(device: torch.device) -> str:
    """What kernels are compiled for on a device that this backend serves."""
    arch = kernels.architecture(device)
    assert arch is not None
    return arch


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a packed copy where TMA could not read it as it lies."""
    if tensor.data_ptr() % ALIGNMENT == 0 and has_aligned_rows(tensor.stride(), tensor.itemsize):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def values_of(problem: Problem) -> tuple[float | int | None, ...]:
    """A kernel's `params.Values`: scale_log2, capped_scale, the windows and the threshold."""
    kinds = problem.kinds
    scale, capped = problem.softmax_scale * LOG2_E, None
    if kinds.softcap:
        scale, capped = problem.softcap * LOG2_E, problem.softmax_scale / problem.softcap
    return (
        scale,
        capped,
        problem.window_left if kinds.window_left else None,
        problem.window_right if kinds.window_right else None,
        float(problem.rescale_threshold),
    )


def _numbers(problem: Problem) -> tuple[float | int | None, ...]:
    """`values_of`, the section and the blocks to launch."""
    kinds = problem.kinds
    sms = torch.cuda.get_device_properties(problem.device).multi_processor_count
    item = kernels.items(kinds, architecture_of(problem.device))
    heads = problem.heads_q // item.heads
    if kinds.varlen:
        tiles, items = 1, (problem.seqlen_q // item.positions + problem.batch) * heads
    else:
        tiles = -(-problem.seqlen_q // item.positions)
        items = tiles * heads * problem.batch
    if max(items, problem.seqlen_q, problem.seqlen_k) >= COUNTED:
        raise NotImplementedError(
            f"backend='cute' numbers rows and work items below {COUNTED}; the call has {problem.seqlen_q} rows of q, "
            f"{problem.seqlen_k} of k and {items} work items"
        )
    return (
        *values_of(problem),
        _section(problem, tiles, item.heads, sms),
        max(1, items if item.launch_control else min(sms // item.blocks, items)),
    )


def _section(problem: Problem, tiles: int, packed: int, sms: int) -> int:
    """Heads side by side in the longest-first order: enough to occupy the device.

    packed: query heads that one work item holds, and that count as one here.
    """
    return min(-(-sms // tiles), problem.heads_q // packed * problem.batch)


def _counter(device: torch.device) -> Tensor:
    """The counter that blocks draw work items from, zeros.

    A launch leaves it as it found it, and launches on one stream follow one another, so a stream has one. A launch in a
    CUDA graph gets one of its own, since the graph may run on any stream beside others.
    """
    stream, reserve = torch._C._cuda_getCurrentRawStream(device.index), _reserve(device)
    if stream and torch._C._cuda_isCurrentStreamCapturing():  # PyTorch refuses to capture the default stream
        taken = reserve.take(2)
        return torch.zeros(2, dtype=torch.int32, device=device) if taken is None else taken
    if reserve.is_low:
        reserve.fill()
    return _stream_counter(device, stream)


@functools.cache
def _reserve(device: torch.device) -> Reserve:
    """For captured launches; empty where the first call of a process is one."""
    return Reserve(device, CAPTURED)


@functools.lru_cache(maxsize=256)
def _stream_counter(device: torch.device, stream: int) -> Tensor:
    return make_lasting(lambda: torch.zeros(2, dtype=torch.int32, device=device), device)
