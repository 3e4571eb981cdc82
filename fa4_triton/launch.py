"""From a checked problem to the launches: tile choice, compiled handles, grids and the memory of the results.

Whatever follows from a problem and from how its tensors lie in memory is worked out once and kept: a repeated call
allocates its results, puts pointers into prepared arguments, and launches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fa4_core.allocation import allocator, contiguous_stride
from fa4_core.backends import Gradients
from fa4_core.problem import Inputs, Kinds, Problem, Stride
from fa4_triton import interpreted
from fa4_triton.backward import attention_backward_kv, attention_backward_q, row_slopes
from fa4_triton.compile import (
    STRIDE_ALIGNMENT,
    Arguments,
    addresses,
    compile_kernel,
    loaded_once,
    named,
    pointers_are_aligned,
    run_compiled,
)
from fa4_triton.forward import attention_forward
from fa4_triton.steps import Statistics, Strided
from fa4_triton.tiles import Tile, tile_for

SLOPE_ROWS = 64
MIN_TMA_FLOPS = 4e9
"""Below this much work (some 10 microseconds), making TMA descriptors on the host costs more than they save.

Tiles are the same either way, and so are the results, bit for bit."""


def _row_strides(stride: Stride) -> tuple[int, int, int]:
    """(batch, row, head) strides of a (B, S, H, D) or (total, H, D) tensor; a packed one's batch stride is unused."""
    *batch, rows, heads, _ = stride
    return batch[0] if batch else 0, rows, heads


def _rows(tensor: Tensor) -> Strided:
    """A (B, S, H, D) or (total, H, D) tensor behind its pointer."""
    return Strided(tensor, *_row_strides(tensor.stride()), None)


def _number_strides(stride: Stride) -> tuple[int, int, int]:
    """(batch, row, head) strides of a (B, H, S) or (H, total) tensor."""
    *batch, heads, rows = stride
    return batch[0] if batch else 0, rows, heads


def _statistics(tensor: Tensor) -> Statistics:
    """A (B, H, S) or (H, total) tensor."""
    return Statistics(tensor, *_number_strides(tensor.stride()))


_NO_COUNTS = (None, 0, 0, 0)


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


class _Result(NamedTuple):
    """A contiguous tensor to be made, and the (batch, row, head) strides a kernel takes."""

    empty: Callable[[], Tensor]
    steps: tuple[int, int, int]


def _result(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, steps: Callable[[Stride], tuple[int, int, int]]
) -> _Result:
    return _Result(allocator(shape, dtype, device), steps(contiguous_stride(shape)))


class _Operand(NamedTuple):
    """How a kernel reads a tensor with a head_dim: `Strided`'s strides, and what a TMA descriptor takes if it has one.

    box: the matrix that the descriptor sees, its strides, and the box of one load; None behind a pointer.
    """

    strides: tuple[int, int, int]
    box: tuple[list[int], list[int], list[int]] | None = None

    def at(self, pointer: Any) -> tuple:
        """The kernel's `Strided`, as a plain tuple."""
        return (pointer if self.box is None else None, *self.strides, None)

    def descriptor(self, tensor: Tensor) -> TensorDescriptor | None:
        """The kernel's descriptor of the tensor."""
        return None if self.box is None else TensorDescriptor(tensor, *self.box)


def _operand(shape: tuple[int, ...], stride: Stride, rows: int, wanted: bool) -> _Operand:
    """Behind a TMA descriptor of (rows, head_dim) boxes where it is wanted and the layout allows it.

    The descriptor sees a matrix: (B * S, H * D) where heads lie side by side in a row, (B * H * S, D) where each head
    is a block of rows.
    """
    seqlen, heads, dim = shape[-3:]
    batch = shape[0] if len(shape) == 4 else 1
    stride_b, stride_s, stride_h = _row_strides(stride)
    if not wanted or dim & (dim - 1) or dim < 16 or 0 in shape:
        return _Operand((stride_b, stride_s, stride_h))
    side_by_side = stride_h == dim and stride_s >= heads * dim
    if side_by_side and (batch == 1 or stride_b == seqlen * stride_s):
        return _Operand((seqlen, dim, 0), ([batch * seqlen, heads * dim], [stride_s, 1], [rows, dim]))
    if stride_s == dim and stride_h == seqlen * dim and (batch == 1 or stride_b == heads * seqlen * dim):
        return _Operand((heads * seqlen, 0, seqlen), ([batch * heads * seqlen, dim], [dim, 1], [rows, dim]))
    return _Operand((stride_b, stride_s, stride_h))


def _whole(shape: tuple[int, ...], stride: Stride, rows: int, wanted: bool) -> _Operand:
    """As `_operand`, of a (B, S, H, D) tensor and with a descriptor of (B, H, S, D): rows past S read as zeros."""
    if not wanted:
        return _Operand(_row_strides(stride))
    steps = [step if size > 1 else shape[-1] for size, step in zip(shape, stride)]
    order = (0, 2, 1, 3)
    return _Operand((0, 0, 0), ([shape[i] for i in order], [steps[i] for i in order], [1, 1, rows, shape[-1]]))


def _has_descriptor(shape: tuple[int, ...], stride: Stride) -> bool:
    """Whether a descriptor can see the tensor: the driver refuses empty ones, and strides of 0."""
    return all(size == 1 or (size and step) for size, step in zip(shape, stride))


def _values(problem: Problem) -> tuple:
    """The kernels' `Values`, as a plain tuple.

    Three TF32 products make one of float32 within the budget of every row, 3 to 5 times faster (docs/performance.md);
    AMD's compiler has only the plain ones.
    """
    kinds = problem.kinds
    amd = not interpreted() and target_of(problem.device).backend == "hip"
    return (
        float(problem.softmax_scale),
        float(problem.softcap) if kinds.softcap else None,
        problem.window_left if kinds.window_left else None,
        problem.window_right if kinds.window_right else None,
        float(problem.rescale_threshold),
        "ieee" if amd else "tf32x3",
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
    """What calls of one kind share: the tile, the constexpr arguments, and the compiled kernels by layout."""

    tile: Tile
    constants: dict[str, Any]
    compiled: dict[tuple, CompiledKernel]


@functools.cache
def _plan(name: str, kinds: Kinds, device: torch.device) -> _Plan:
    """The plan of kernel `name` for a problem's kinds on a device (with its index: a handle belongs to one device)."""
    if name == "row_slopes":
        return _Plan(Tile(SLOPE_ROWS, 0, 4, 1), {"DIM_V": kinds.head_dim_v, "TILE_M": SLOPE_ROWS}, {})
    tile = tile_for(name, kinds, None if interpreted() else target_of(device))
    constants = {
        "GROUP": kinds.group,
        "DIM": kinds.head_dim,
        "DIM_V": kinds.head_dim_v,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
    }
    if name == "forward":
        constants["LOOP"] = tile.loop
    return _Plan(tile, constants, {})


def compile_planned(kernel: Any, plan: _Plan, args: tuple, target: GPUTarget, layout: tuple) -> CompiledKernel:
    """Compiles a kernel as `_launch` would for `target`, which need not be there."""
    options = {"num_warps": plan.tile.warps, "num_stages": plan.tile.stages}
    if any(isinstance(arg, TensorDescriptor) for arg in args):
        if plan.tile.registers:
            options["maxnreg"] = plan.tile.registers
        if plan.tile.loop == "specialised":
            # Triton takes these to load, and adds a warpgroup for each 64 query rows.
            options["num_warps"] = 4
    return compile_kernel(kernel, args, plan.constants, options, target, layout[-1])


def _launch(
    kernel: Any, plan: _Plan, device: torch.device, grid: int, arguments: Arguments, layout: tuple
) -> None:  # fmt: skip
    """Launches `grid` programs on the device's current stream.

    arguments: make the kernel's run-time arguments; a plain tuple stands for its parameter's named one. layout: what
    the compiled kernel takes from them beyond the problem's kinds; its last entry is "aligned".
    """
    if grid == 0:
        return
    if interpreted():
        kernel[(grid,)](*named(kernel, arguments(False)), **plan.constants)
        return
    compiled = plan.compiled.get(layout) or loaded_once(
        plan.compiled, layout, device, compile_planned, kernel, plan, arguments(False), target_of(device), layout
    )
    run_compiled(compiled, grid, device.index, (*arguments(True), *plan.constants.values()))


def _tiles(rows: int, size: int, varlen: bool, batch: int) -> int:
    """Programs along the rows of one head: of one batch element, or of the whole call in varlen (a bound)."""
    return rows // size + batch + 1 if varlen else triton.cdiv(rows, size)


def _heads(problem: Problem, heads: int) -> int:
    """Programs beside the tiles: heads, times batch elements where those are not in the tiles."""
    return heads if problem.kinds.varlen else heads * problem.batch


def _flops(problem: Problem) -> int:
    """The forward's work if nothing were masked."""
    dims = problem.kinds.head_dim + problem.kinds.head_dim_v
    return 2 * problem.total_q * problem.seqlen_k * problem.heads_q * dims


class _Shapes(NamedTuple):
    """Shapes of a problem's tensors."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    out: tuple[int, ...]
    lse: tuple[int, ...]


def _shapes(problem: Problem) -> _Shapes:
    kinds, out = problem.kinds, problem.out_shape
    keys = (problem.seqlen_k, problem.heads_kv)
    if not kinds.varlen:
        keys = (problem.batch, *keys)
    q, k, v = (*out[:-1], kinds.head_dim), (*keys, kinds.head_dim), (*keys, kinds.head_dim_v)
    return _Shapes(q, k, v, out, problem.lse_shape)


def forget() -> None:
    """Drops what was prepared and compiled for problems seen before: for tests and tuners that replace a tile."""
    for kept in (_plan, _prepare_forward, _prepare_backward):
        kept.cache_clear()


def _strides_are_aligned(*strides: Stride) -> bool:
    return all(n % STRIDE_ALIGNMENT == 0 for stride in strides for n in stride[:-1])


class _Forward(NamedTuple):
    """What forward calls share that have one problem and one memory layout. Plain tuples are strides."""

    plan: _Plan
    grid: int
    q: tuple
    k: _Operand
    v: _Operand
    out: _Result
    lse: _Result
    sizes: tuple[int, int, int]
    values: tuple
    aligned: bool


@functools.lru_cache(maxsize=4096)
def _prepare_forward(plans: Any, min_tma_flops: float, problem: Problem, aligned: bool) -> _Forward:
    """plans, min_tma_flops: this module's, which tests replace. aligned: whether the pointers of q, k and v are."""
    kinds, device, shapes = problem.kinds, problem.device, _shapes(problem)
    q, k, v = problem.strides
    plan = plans("forward", kinds, device)
    aligned = aligned and _strides_are_aligned(q, k, v)
    tma = aligned and plan.tile.tma and _flops(problem) >= min_tma_flops
    operand = _operand
    if plan.tile.loop == "specialised":
        operand, tma = _whole, tma and _has_descriptor(shapes.k, k) and _has_descriptor(shapes.v, v)
    return _Forward(
        plan=plan,
        grid=_tiles(problem.seqlen_q, plan.tile.m, kinds.varlen, problem.batch) * _heads(problem, problem.heads_q),
        q=_row_strides(q),
        k=operand(shapes.k, k, plan.tile.n, tma),
        v=operand(shapes.v, v, plan.tile.n, tma),
        out=_result(shapes.out, kinds.dtype, device, _row_strides),
        lse=_result(shapes.lse, torch.float32, device, _number_strides),
        sizes=(problem.batch, problem.seqlen_q, problem.seqlen_k),
        values=_values(problem),
        aligned=aligned,
    )


def forward(problem: Problem, inputs: Inputs, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns out and lse; arguments and results as in `Backend.forward`.

    counts: for tests, a zeroed int32 tensor of lse's shape and a last dimension of 2, which receives for each row the
    key tiles visited and the rescales skipped.
    """
    device = problem.device
    q, k, v, sink = inputs.q, inputs.k, inputs.v, inputs.sink
    ready = _prepare_forward(_plan, MIN_TMA_FLOPS, problem, pointers_are_aligned(q, k, v))
    out, lse = ready.out.empty(), ready.lse.empty()
    k_descriptor, v_descriptor = ready.k.descriptor(k), ready.v.descriptor(v)
    counted = _NO_COUNTS if counts is None else _statistics(counts[..., 0])
    tensors = (
        q, k, v, out, lse, sink, inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqused_q, inputs.seqused_k
    )  # fmt: skip

    def arguments(as_addresses: bool) -> tuple:
        q, k, v, out, lse, sink, *sequences = addresses(tensors) if as_addresses else tensors
        return (
            (q, *ready.q, None), ready.k.at(k), ready.v.at(v), (out, *ready.out.steps, None), (lse, *ready.lse.steps),
            sink, (*sequences, *ready.sizes), ready.values, problem.heads_q, k_descriptor, v_descriptor, counted,
        )  # fmt: skip

    layout = (_dtype(sink), counts is not None, k_descriptor is not None, v_descriptor is not None, ready.aligned)
    _launch(attention_forward, ready.plan, device, ready.grid, arguments, layout)
    return out, lse


class _Backward(NamedTuple):
    """What backward calls share that have one problem and one memory layout. Plain tuples are strides."""

    slopes: _Plan
    slopes_grid: tuple[int, int, int]
    kv: _Plan
    kv_grid: int
    queries: _Plan
    queries_grid: int
    q: tuple
    k: tuple
    v: tuple
    dout: tuple
    out: tuple
    lse: tuple
    dlse: tuple
    dq: _Result
    dk: _Result
    dv: _Result
    pairs: _Result
    q_streamed: _Operand
    dout_streamed: _Operand
    k_streamed: _Operand
    v_streamed: _Operand
    pairs_box: tuple | None
    sizes: tuple[int, int, int]
    values: tuple
    aligned: bool
    out_aligned: bool


@functools.lru_cache(maxsize=4096)
def _prepare_backward(
    plans: Any, min_tma_flops: float, problem: Problem, dout: Stride, out: Stride, lse: Stride, dlse: Stride | None,
    aligned: bool, out_aligned: bool,
) -> _Backward:  # fmt: skip
    """aligned: whether the pointers of q, k, v, dout are; out_aligned: whether out's is. For the rest see forward's."""
    kinds, device, shapes = problem.kinds, problem.device, _shapes(problem)
    q, k, v = problem.strides
    slopes, kv, queries = (plans(name, kinds, device) for name in ("row_slopes", "backward_kv", "backward_q"))
    aligned = aligned and _strides_are_aligned(q, k, v, dout)
    kv_tma, q_tma = (aligned and plan.tile.tma and _flops(problem) >= min_tma_flops for plan in (kv, queries))
    *heads, rows = shapes.lse
    room = 4 * (rows // 4 + (problem.batch if kinds.varlen else 0) + 2)
    total = 2 * room * math.prod(heads)
    slope_tiles = _tiles(problem.seqlen_q, SLOPE_ROWS, kinds.varlen, problem.batch)
    return _Backward(
        slopes=slopes,
        slopes_grid=(_heads(problem, problem.heads_q) // problem.heads_q, problem.heads_q, slope_tiles),
        kv=kv,
        kv_grid=_tiles(problem.seqlen_k, kv.tile.n, kinds.varlen, problem.batch) * _heads(problem, problem.heads_kv),
        queries=queries,
        queries_grid=_tiles(problem.seqlen_q, queries.tile.m, kinds.varlen, problem.batch)
        * _heads(problem, problem.heads_q),
        q=_row_strides(q),
        k=_row_strides(k),
        v=_row_strides(v),
        dout=_row_strides(dout),
        out=_row_strides(out),
        lse=_number_strides(lse),
        dlse=(0, 0, 0) if dlse is None else _number_strides(dlse),
        dq=_result(shapes.q, kinds.dtype, device, _row_strides),
        dk=_result(shapes.k, kinds.dtype, device, _row_strides),
        dv=_result(shapes.v, kinds.dtype, device, _row_strides),
        pairs=_result((*heads, 2, room), torch.float32, device, lambda _: (2 * room * heads[-1], 2 * room, room)),
        q_streamed=_operand(shapes.q, q, kv.tile.m, kv_tma),
        dout_streamed=_operand(shapes.out, dout, kv.tile.m, kv_tma),
        k_streamed=_operand(shapes.k, k, queries.tile.n, q_tma),
        v_streamed=_operand(shapes.v, v, queries.tile.n, q_tma),
        pairs_box=([total], [1], [kv.tile.m]) if kv_tma and total < 2**31 else None,
        sizes=(problem.batch, problem.seqlen_q, problem.seqlen_k),
        values=_values(problem),
        aligned=aligned,
        out_aligned=aligned and out_aligned and _strides_are_aligned(out),
    )


def backward(
    problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    """Returns the gradients; arguments and results as in `Backend.backward`."""
    device = problem.device
    q, k, v, sink = inputs.q, inputs.k, inputs.v, inputs.sink
    ready = _prepare_backward(
        _plan, MIN_TMA_FLOPS, problem, dout.stride(), out.stride(), lse.stride(),
        None if dlse is None else dlse.stride(), pointers_are_aligned(q, k, v, dout), pointers_are_aligned(out),
    )  # fmt: skip
    values = ready.values
    dq, dk, dv, numbers = ready.dq.empty(), ready.dk.empty(), ready.dv.empty(), ready.pairs.empty()
    shares = None if sink is None else torch.empty(ready.slopes_grid, dtype=torch.float32, device=device)
    q_descriptor, dout_descriptor = ready.q_streamed.descriptor(q), ready.dout_streamed.descriptor(dout)
    k_descriptor, v_descriptor = ready.k_streamed.descriptor(k), ready.v_streamed.descriptor(v)
    pairs_descriptor = None if ready.pairs_box is None else TensorDescriptor(numbers, *ready.pairs_box)
    tensors = (
        q, k, v, out, lse, dout, dlse, dq, dk, dv, numbers, sink, shares, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        inputs.seqused_q, inputs.seqused_k,
    )  # fmt: skip
    pointers = addresses(tensors)

    def slopes_arguments(as_addresses: bool) -> tuple:
        _, _, _, out, lse, dout, dlse, _, _, _, numbers, sink, shares, *sequences = (
            pointers if as_addresses else tensors
        )
        return (
            (dout, *ready.dout, None), (out, *ready.out, None), (lse, *ready.lse), (dlse, *ready.dlse),
            (numbers, *ready.pairs.steps, None), sink, shares, (*sequences, *ready.sizes), problem.heads_q,
        )  # fmt: skip

    layout = (_dtype(sink), dlse is not None, ready.out_aligned)
    _launch(row_slopes, ready.slopes, device, math.prod(ready.slopes_grid), slopes_arguments, layout)

    def kv_arguments(as_addresses: bool) -> tuple:
        q, k, v, _, _, dout, _, _, dk, dv, numbers, _, _, *sequences = pointers if as_addresses else tensors
        return (
            ready.q_streamed.at(q), (k, *ready.k, None), (v, *ready.v, None), ready.dout_streamed.at(dout),
            (numbers, *ready.pairs.steps, None), (dk, *ready.dk.steps, None), (dv, *ready.dv.steps, None),
            (*sequences, *ready.sizes), values, problem.heads_kv, q_descriptor, dout_descriptor, pairs_descriptor,
        )  # fmt: skip

    layout = (q_descriptor is not None, dout_descriptor is not None, pairs_descriptor is not None, ready.aligned)
    _launch(attention_backward_kv, ready.kv, device, ready.kv_grid, kv_arguments, layout)

    def q_arguments(as_addresses: bool) -> tuple:
        q, k, v, _, _, dout, _, dq, _, _, numbers, _, _, *sequences = pointers if as_addresses else tensors
        return (
            (q, *ready.q, None), ready.k_streamed.at(k), ready.v_streamed.at(v), (dout, *ready.dout, None),
            (numbers, *ready.pairs.steps, None), (dq, *ready.dq.steps, None), (*sequences, *ready.sizes), values,
            problem.heads_q, k_descriptor, v_descriptor,
        )  # fmt: skip

    layout = (k_descriptor is not None, v_descriptor is not None, ready.aligned)
    _launch(attention_backward_q, ready.queries, device, ready.queries_grid, q_arguments, layout)

    return Gradients(dq, dk, dv, None if shares is None or sink is None else shares.sum((0, 2)).to(sink.dtype))
