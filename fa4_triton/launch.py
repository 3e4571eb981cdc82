"""From a checked problem to the launches: tile choice, compiled handles, grids and the memory of the results."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fa4_core.backends import Gradients
from fa4_core.problem import Inputs, Kinds, Problem
from fa4_triton import interpreted
from fa4_triton.backward import attention_backward_kv, attention_backward_q, row_slopes
from fa4_triton.compile import compile_kernel, is_aligned
from fa4_triton.forward import attention_forward
from fa4_triton.steps import Sequences, Strided, Values
from fa4_triton.tiles import Tile, tile_for

SLOPE_ROWS = 64


def _rows(tensor: Tensor | None) -> Strided:
    """A (B, S, H, D) or (total, H, D) tensor; the batch stride of a packed one is never used."""
    if tensor is None:
        return Strided(None, 0, 0, 0, None)
    if tensor.dim() == 3:
        return Strided(tensor, 0, tensor.stride(0), tensor.stride(1), None)
    return Strided(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2), None)


def _described(tensor: Tensor, rows: int, tile: Tile) -> tuple[Strided, TensorDescriptor | None]:
    """The tensor behind a TMA descriptor of (rows, head_dim) boxes where its layout allows one, else behind its pointer.

    The descriptor sees a matrix: (B * S, H * D) where heads lie side by side in a row, (B * H * S, D) where each head
    is a block of rows.
    """
    plain = _rows(tensor)
    *_, heads, dim = tensor.shape
    seqlen, batch = tensor.shape[-3], tensor.shape[0] if tensor.dim() == 4 else 1
    if not tile.tma or dim != triton.next_power_of_2(dim) or tensor.numel() == 0 or not is_aligned(tensor):
        return plain, None
    if plain.stride_h == dim and (batch == 1 or plain.stride_b == seqlen * plain.stride_s):
        shape, stride = [batch * seqlen, heads * dim], plain.stride_s
        strided = Strided(None, seqlen, dim, 0, None)
    elif plain.stride_s == dim and plain.stride_h == seqlen * dim and (batch == 1 or plain.stride_b == heads * seqlen * dim):
        shape, stride = [batch * heads * seqlen, dim], dim
        strided = Strided(None, heads * seqlen, 0, seqlen, None)
    else:
        return plain, None
    return strided, TensorDescriptor(tensor, shape, [stride, 1], [rows, dim])


def _statistics(tensor: Tensor | None) -> Strided:
    """A (B, H, S) or (H, total) tensor."""
    if tensor is None:
        return Strided(None, 0, 0, 0, None)
    if tensor.dim() == 2:
        return Strided(tensor, 0, tensor.stride(1), tensor.stride(0), None)
    return Strided(tensor, tensor.stride(0), tensor.stride(2), tensor.stride(1), None)


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


@functools.cache
def _compiled(kernel: Any, kinds: Kinds, tile: Tile, device: torch.device, layout: tuple, constants: tuple, args):
    return compile_kernel(
        kernel,
        args.value,
        dict(constants),
        {"num_warps": tile.warps, "num_stages": tile.stages},
        target_of(device),
        layout[-1],
    )


class _Uncompared:
    """Carries a value past a cache key: all instances are equal."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Uncompared)

    def __hash__(self) -> int:
        return 0


def _launch(kernel: Any, problem: Problem, tile: Tile, grid: int, args: tuple, constants: tuple, layout: tuple) -> None:
    if grid == 0:
        return
    if interpreted():
        kernel[(grid,)](*args, **dict(constants))
        return
    compiled = _compiled(kernel, problem.kinds, tile, problem.device, layout, constants, _Uncompared(args))
    with torch.cuda.device(problem.device):
        compiled[(grid, 1, 1)](*args, *(value for _, value in constants))


def _tiles(rows: int, size: int, varlen: bool, batch: int) -> int:
    """Programs along the rows of one head: of one batch element, or of the whole call in varlen (a bound)."""
    return rows // size + batch + 1 if varlen else triton.cdiv(rows, size)


def _precision(kinds: Kinds) -> str:
    return "ieee" if kinds.dtype == torch.float32 else "tf32"


def _heads(problem: Problem, heads: int) -> int:
    """Programs beside the tiles: heads, times batch elements where those are not in the tiles."""
    return heads if problem.kinds.varlen else heads * problem.batch


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out and lse; arguments and results as in `Backend.forward`."""
    kinds = problem.kinds
    out = torch.empty(problem.out_shape, dtype=kinds.dtype, device=problem.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=problem.device)
    tile = tile_for("forward", kinds, problem.device)
    q, k, v = inputs.q, inputs.k, inputs.v
    k_rows, k_descriptor = _described(k, tile.n, tile)
    v_rows, v_descriptor = _described(v, tile.n, tile)
    args = (
        _rows(q), k_rows, v_rows, _rows(out), _statistics(lse), inputs.sink, _sequences(problem, inputs),
        _values(problem), problem.heads_q, k_descriptor, v_descriptor,
    )  # fmt: skip
    constants = (
        ("GROUP", kinds.group),
        ("DIM", kinds.head_dim),
        ("DIM_V", kinds.head_dim_v),
        ("TILE_M", tile.m),
        ("TILE_N", tile.n),
        ("PRECISION", _precision(kinds)),
    )
    grid = _tiles(problem.seqlen_q, tile.m, kinds.varlen, problem.batch) * _heads(problem, problem.heads_q)
    aligned = is_aligned(q) and is_aligned(k) and is_aligned(v)
    layout = (k_descriptor is not None, v_descriptor is not None, aligned)
    _launch(attention_forward, problem, tile, grid, args, constants, layout)
    return out, lse


def backward(
    problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    """Returns the gradients; arguments and results as in `Backend.backward`."""
    kinds = problem.kinds
    q, k, v, sink = inputs.q, inputs.k, inputs.v, inputs.sink
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    slope = torch.empty_like(lse)
    aligned = all(map(is_aligned, (q, k, v, dout)))
    sequences, values = _sequences(problem, inputs), _values(problem)

    slope_tiles = _tiles(problem.seqlen_q, SLOPE_ROWS, kinds.varlen, problem.batch)
    slope_grid = slope_tiles * _heads(problem, problem.heads_q)
    parts = None if sink is None else lse.new_empty((slope_grid // problem.heads_q, problem.heads_q))
    _launch(
        row_slopes,
        problem,
        Tile(SLOPE_ROWS, 0, 4, 1),
        slope_grid,
        (_rows(dout), _rows(out), _statistics(lse), _statistics(dlse), _statistics(slope), sink, parts, sequences,
         problem.heads_q),
        (("DIM_V", kinds.head_dim_v), ("TILE_M", SLOPE_ROWS)),
        (aligned and is_aligned(out),),
    )  # fmt: skip

    statistics = (_statistics(lse), _statistics(slope))
    fixed = (("GROUP", kinds.group), ("DIM", kinds.head_dim), ("DIM_V", kinds.head_dim_v))
    precision = ("PRECISION", _precision(kinds))
    tile = tile_for("backward_kv", kinds, problem.device)
    q_rows, q_descriptor = _described(q, tile.m, tile)
    do_rows, do_descriptor = _described(dout, tile.m, tile)
    _launch(
        attention_backward_kv,
        problem,
        tile,
        _tiles(problem.seqlen_k, tile.n, kinds.varlen, problem.batch) * _heads(problem, problem.heads_kv),
        (q_rows, _rows(k), _rows(v), do_rows, *statistics, _rows(dk), _rows(dv), sequences, values, problem.heads_kv,
         q_descriptor, do_descriptor),
        (*fixed, ("TILE_M", tile.m), ("TILE_N", tile.n), precision),
        (q_descriptor is not None, do_descriptor is not None, aligned),
    )  # fmt: skip
    tile = tile_for("backward_q", kinds, problem.device)
    k_rows, k_descriptor = _described(k, tile.n, tile)
    v_rows, v_descriptor = _described(v, tile.n, tile)
    _launch(
        attention_backward_q,
        problem,
        tile,
        _tiles(problem.seqlen_q, tile.m, kinds.varlen, problem.batch) * _heads(problem, problem.heads_q),
        (_rows(q), k_rows, v_rows, _rows(dout), *statistics, _rows(dq), sequences, values, problem.heads_q,
         k_descriptor, v_descriptor),
        (*fixed, ("TILE_M", tile.m), ("TILE_N", tile.n), precision),
        (k_descriptor is not None, v_descriptor is not None, aligned),
    )  # fmt: skip
    dsink = None if parts is None else parts.sum(0).to(sink.dtype)
    return Gradients(dq, dk, dv, dsink)
