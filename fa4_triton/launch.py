"""From a checked problem to the launches: tile choice, compiled handles, grids and the memory of the results."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fa4_core.backends import Gradients
from fa4_core.problem import Inputs, Kinds, Problem
from fa4_triton import interpreted
from fa4_triton.backward import attention_backward_kv, attention_backward_q, row_slopes
from fa4_triton.compile import compile_kernel, is_aligned
from fa4_triton.forward import attention_forward
from fa4_triton.steps import Pairs, Sequences, Statistics, Strided, Values
from fa4_triton.tiles import Tile, tile_for

SLOPE_ROWS = 64
MIN_TMA_FLOPS = 4e9
"""Below this much work (some 10 microseconds), making TMA descriptors on the host costs more than they save.

Tiles are the same either way, and so are the results, bit for bit."""


def _rows(tensor: Tensor) -> Strided:
    """A (B, S, H, D) or (total, H, D) tensor; the batch stride of a packed one is never used."""
    *batch, rows, heads, _ = tensor.stride()
    return Strided(tensor, batch[0] if batch else 0, rows, heads, None)


def _described(tensor: Tensor, rows: int, wanted: bool) -> tuple[Strided, TensorDescriptor | None]:
    """The tensor behind a TMA descriptor of (rows, head_dim) boxes where its layout allows it, else its pointer.

    The descriptor sees a matrix: (B * S, H * D) where heads lie side by side in a row, (B * H * S, D) where each head
    is a block of rows.
    """
    plain = _rows(tensor)
    seqlen, heads, dim = tensor.shape[-3:]
    batch = tensor.shape[0] if tensor.dim() == 4 else 1
    if not wanted or dim & (dim - 1) or dim < 16 or tensor.numel() == 0:
        return plain, None
    side_by_side = plain.stride_h == dim and plain.stride_s >= heads * dim
    if side_by_side and (batch == 1 or plain.stride_b == seqlen * plain.stride_s):
        shape, stride = [batch * seqlen, heads * dim], plain.stride_s
        strided = Strided(None, seqlen, dim, 0, None)
    elif (
        plain.stride_s == dim
        and plain.stride_h == seqlen * dim
        and (batch == 1 or plain.stride_b == heads * seqlen * dim)
    ):
        shape, stride = [batch * heads * seqlen, dim], dim
        strided = Strided(None, heads * seqlen, 0, seqlen, None)
    else:
        return plain, None
    return strided, TensorDescriptor(tensor, shape, [stride, 1], [rows, dim])


def _statistics(tensor: Tensor | None) -> Statistics:
    """A (B, H, S) or (H, total) tensor."""
    if tensor is None:
        return Statistics(None, 0, 0, 0)
    if tensor.dim() == 2:
        return Statistics(tensor, 0, tensor.stride(1), tensor.stride(0))
    return Statistics(tensor, tensor.stride(0), tensor.stride(2), tensor.stride(1))


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _sequences(problem: Problem, inputs: Inputs) -> Sequences:
    return Sequences(
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.seqused_q,
        inputs.seqused_k,
        problem.batch,
        problem.seqlen_q,
        problem.seqlen_k,
    )


def _values(problem: Problem) -> Values:
    kinds = problem.kinds
    return Values(
        float(problem.softmax_scale),
        float(problem.softcap) if kinds.softcap else None,
        problem.window_left if kinds.window_left else None,
        problem.window_right if kinds.window_right else None,
        float(problem.rescale_threshold),
    )


@functools.cache
def target_of(device: torch.device) -> GPUTarget:
    """The compiler's target for a CUDA (or ROCm) device."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return GPUTarget("hip", name, 64)
    major, minor = torch.cuda.get_device_capability(device)
    return GPUTarget("cuda", 10 * major + minor, 32)


class _Plan(NamedTuple):
    """What repeated calls of one kind share: the tile, the constexpr arguments, and the compiled kernels by layout."""

    tile: Tile
    constants: tuple[tuple[str, Any], ...]
    compiled: dict[tuple, CompiledKernel]


@functools.cache
def _plan(name: str, kinds: Kinds, device: torch.device) -> _Plan:
    """The plan of kernel `name` for a problem's kinds on a device (with its index: a handle belongs to one device)."""
    if name == "row_slopes":
        tile = Tile(SLOPE_ROWS, 0, 4, 1)
        return _Plan(tile, (("DIM_V", kinds.head_dim_v), ("TILE_M", tile.m)), {})
    tile = tile_for(name, kinds, None if interpreted() else target_of(device))
    constants = [
        ("GROUP", kinds.group),
        ("DIM", kinds.head_dim),
        ("DIM_V", kinds.head_dim_v),
        ("TILE_M", tile.m),
        ("TILE_N", tile.n),
    ]
    if name == "forward":
        constants.append(("OVERLAP", tile.overlap))
    return _Plan(tile, tuple(constants), {})


def compile_planned(kernel: Any, plan: _Plan, args: tuple, target: GPUTarget, layout: tuple) -> CompiledKernel:
    """Compiles a kernel as `_launch` would for `target`, which need not be there."""
    options = {"num_warps": plan.tile.warps, "num_stages": plan.tile.stages}
    return compile_kernel(kernel, args, dict(plan.constants), options, target, layout[-1])


def _launch(kernel: Any, plan: _Plan, device: torch.device, grid: int, args: tuple, layout: tuple) -> None:
    """Launches `grid` programs on the device's current stream.

    layout: what the compiled kernel takes from the arguments beyond the problem's kinds; its last entry is "aligned".
    """
    if grid == 0:
        return
    if interpreted():
        kernel[(grid,)](*args, **dict(plan.constants))
        return
    compiled = plan.compiled.get(layout)
    if compiled is None:
        with torch.cuda.device(device):
            compiled = plan.compiled[layout] = compile_planned(kernel, plan, args, target_of(device), layout)
    values = [value for _, value in plan.constants]
    if torch.cuda.current_device() == device.index:
        compiled[(grid, 1, 1)](*args, *values)
    else:
        with torch.cuda.device(device):
            compiled[(grid, 1, 1)](*args, *values)


def _wants_tma(problem: Problem, plan: _Plan, aligned: bool) -> bool:
    kinds = problem.kinds
    flops = 2 * problem.total_q * problem.seqlen_k * problem.heads_q * (kinds.head_dim + kinds.head_dim_v)
    return aligned and plan.tile.tma and flops >= MIN_TMA_FLOPS


def _tiles(rows: int, size: int, varlen: bool, batch: int) -> int:
    """Programs along the rows of one head: of one batch element, or of the whole call in varlen (a bound)."""
    return rows // size + batch + 1 if varlen else triton.cdiv(rows, size)


def _heads(problem: Problem, heads: int) -> int:
    """Programs beside the tiles: heads, times batch elements where those are not in the tiles."""
    return heads if problem.kinds.varlen else heads * problem.batch


def forward(problem: Problem, inputs: Inputs, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns out and lse; arguments and results as in `Backend.forward`.

    counts: for tests, a zeroed int32 tensor of lse's shape and a last dimension of 2, which receives for each row the
    key tiles visited and the rescales skipped.
    """
    kinds, device = problem.kinds, inputs.q.device
    out = torch.empty(problem.out_shape, dtype=kinds.dtype, device=device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    plan = _plan("forward", kinds, device)
    q, k, v = inputs.q, inputs.k, inputs.v
    aligned = is_aligned(q) and is_aligned(k) and is_aligned(v)
    tma = _wants_tma(problem, plan, aligned)
    k_rows, k_descriptor = _described(k, plan.tile.n, tma)
    v_rows, v_descriptor = _described(v, plan.tile.n, tma)
    grid = _tiles(problem.seqlen_q, plan.tile.m, kinds.varlen, problem.batch) * _heads(problem, problem.heads_q)
    args = (
        _rows(q), k_rows, v_rows, _rows(out), _statistics(lse), inputs.sink, _sequences(problem, inputs),
        _values(problem), problem.heads_q, k_descriptor, v_descriptor,
        _statistics(None if counts is None else counts[..., 0]),
    )  # fmt: skip
    layout = (_dtype(inputs.sink), counts is not None, k_descriptor is not None, v_descriptor is not None, aligned)
    _launch(attention_forward, plan, device, grid, args, layout)
    return out, lse


def backward(
    problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    """Returns the gradients; arguments and results as in `Backend.backward`."""
    kinds, device = problem.kinds, inputs.q.device
    q, k, v, sink = inputs.q, inputs.k, inputs.v, inputs.sink
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k, v))
    numbers = lse.new_empty((*lse.shape[:-1], 2, lse.shape[-1]))
    pairs = Pairs(numbers, 0 if kinds.varlen else numbers.stride(0), numbers.stride(-3), None)
    aligned = all(map(is_aligned, (q, k, v, dout)))
    sequences, values = _sequences(problem, inputs), _values(problem)

    plan = _plan("row_slopes", kinds, device)
    tiles = _tiles(problem.seqlen_q, SLOPE_ROWS, kinds.varlen, problem.batch)
    grid = tiles * _heads(problem, problem.heads_q)
    shares = None if sink is None else lse.new_empty((grid // max(1, problem.heads_q * tiles), problem.heads_q, tiles))
    args = (
        _rows(dout), _rows(out), _statistics(lse), _statistics(dlse), pairs, sink, shares, sequences, problem.heads_q,
    )  # fmt: skip
    _launch(row_slopes, plan, device, grid, args, (_dtype(sink), dlse is not None, aligned and is_aligned(out)))

    plan = _plan("backward_kv", kinds, device)
    tma = _wants_tma(problem, plan, aligned)
    q_rows, q_descriptor = _described(q, plan.tile.m, tma)
    do_rows, do_descriptor = _described(dout, plan.tile.m, tma)
    pairs_descriptor = TensorDescriptor(numbers, [numbers.numel()], [1], [plan.tile.m]) if tma else None
    grid = _tiles(problem.seqlen_k, plan.tile.n, kinds.varlen, problem.batch) * _heads(problem, problem.heads_kv)
    args = (
        q_rows, _rows(k), _rows(v), do_rows, pairs, _rows(dk), _rows(dv), sequences, values, problem.heads_kv,
        q_descriptor, do_descriptor, pairs_descriptor,
    )  # fmt: skip
    layout = (q_descriptor is not None, do_descriptor is not None, tma, aligned)
    _launch(attention_backward_kv, plan, device, grid, args, layout)

    plan = _plan("backward_q", kinds, device)
    tma = _wants_tma(problem, plan, aligned)
    k_rows, k_descriptor = _described(k, plan.tile.n, tma)
    v_rows, v_descriptor = _described(v, plan.tile.n, tma)
    grid = _tiles(problem.seqlen_q, plan.tile.m, kinds.varlen, problem.batch) * _heads(problem, problem.heads_q)
    args = (
        _rows(q), k_rows, v_rows, _rows(dout), pairs, _rows(dq), sequences, values, problem.heads_q, k_descriptor,
        v_descriptor,
    )  # fmt: skip
    layout = (k_descriptor is not None, v_descriptor is not None, aligned)
    _launch(attention_backward_q, plan, device, grid, args, layout)

    dsink = None if shares is None else shares.sum((0, 2)).to(sink.dtype)
    return Gradients(dq, dk, dv, dsink)
