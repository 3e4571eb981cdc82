"""What crosses from the host into a kernel, the same for every architecture: tensors, sizes and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa4_core.problem import Kinds
from fa4_cute.alignment import ALIGNMENT
from fa4_cute.kernels import drawn

DTYPES = {torch.float16: cutlass.Float16, torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


class Values(NamedTuple):
    """Run-time numbers of a call; None where the kernel is compiled without them.

    scale_log2: score units to log2 units, softmax_scale * log2 e (softcap * log2 e under a softcap).
    capped_scale: softmax_scale / softcap, what scores are multiplied by before tanh.
    """

    scale_log2: Float32
    capped_scale: Float32 | None
    window_left: Int32 | None
    window_right: Int32 | None
    threshold: Float32


def fake_rows(dtype: Any, rank: int, head_dim: int) -> Any:
    """A tensor of rows of head_dim as TMA takes it, for `cute.compile`: every length and stride open."""
    shape = (*(cute.sym_int32() for _ in range(rank - 1)), head_dim)
    stride = (*(cute.sym_int64(divisibility=ALIGNMENT * 8 // dtype.width) for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=ALIGNMENT)


def fake_numbers(dtype: Any, rank: int, *last: int, align: int | None = None) -> Any:
    """A tensor of `rank` open lengths and the lengths `last`, the last dimension without gaps. align: bytes, of its
    base; by default an element's."""
    shape = (*(cute.sym_int32() for _ in range(rank)), *last)
    stride = (*(cute.sym_int64() for _ in range(len(shape) - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align or dtype.width // 8)


def fake_arguments(kinds: Kinds, sink_dtype: torch.dtype | None, counted: bool = False) -> list[Any]:
    """Arguments of a kernel's host function for `cute.compile`, in its order, with every length and stride left open.

    q, k, v, out (B, S, H, D) or (total, H, D); lse (B, H, S) or (H, total); sink (H,); cu_seqlens_q, cu_seqlens_k,
    seqused_q, seqused_k; scale_log2, capped_scale, window_left, window_right, threshold; section (the heads that
    longest-first works on side by side); programs (blocks to launch); counter (int32 (2,), zeros, of which the launch
    makes zeros again; None where items are alike); counts (lse's shape and 2, or None); stream.
    """
    rank = 3 if kinds.varlen else 4

    def rows(head_dim: int) -> Any:
        return fake_rows(DTYPES[kinds.dtype], rank, head_dim)

    def index(wanted: bool) -> Any:
        return fake_numbers(Int32, 1) if wanted else None

    return [
        rows(kinds.head_dim),
        rows(kinds.head_dim),
        rows(kinds.head_dim_v),
        rows(kinds.head_dim_v),
        fake_numbers(Float32, rank - 1),
        fake_numbers(DTYPES[sink_dtype], 1) if sink_dtype is not None else None,
        index(kinds.varlen),
        index(kinds.varlen),
        index(kinds.seqused_q),
        index(kinds.seqused_k),
        Float32(1.0),
        Float32(1.0) if kinds.softcap else None,
        Int32(1) if kinds.window_left else None,
        Int32(1) if kinds.window_right else None,
        Float32(8.0),
        Int32(1),
        Int32(1),
        fake_numbers(Int32, 0, 2) if drawn(kinds) else None,
        fake_numbers(Int32, rank - 1, 2) if counted else None,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    ]


@cute.jit
def by_head(tensor: cute.Tensor) -> cute.Tensor:
    """A (B, S, H, D) or (total, H, D) tensor as (S, D, H, B), what TMA boxes of rows are cut from."""
    shape, stride = tensor.layout.shape, tensor.layout.stride
    if const_expr(len(shape) == 3):
        layout = cute.make_layout((shape[0], shape[2], shape[1], 1), stride=(stride[0], stride[2], stride[1], 0))
    else:
        order = (1, 3, 2, 0)
        layout = cute.make_layout(tuple(shape[i] for i in order), stride=tuple(stride[i] for i in order))
    return cute.make_tensor(tensor.iterator, layout)


@cute.jit
def statistic_by_head(tensor: cute.Tensor) -> cute.Tensor:
    """A (B, H, S) or (H, total) tensor as (S, H, B)."""
    shape, stride = tensor.layout.shape, tensor.layout.stride
    if const_expr(len(shape) == 2):
        layout = cute.make_layout((shape[1], shape[0], 1), stride=(stride[1], stride[0], 0))
    else:
        layout = cute.make_layout((shape[2], shape[1], shape[0]), stride=(stride[2], stride[1], stride[0]))
    return cute.make_tensor(tensor.iterator, layout)
