"""Compiles kernels of the published flash-attn-4 without a GPU and keeps their PTX and IR, for the proof on known-good
kernels. Run as `python upstream.py FOLDER KIND [NAME=VALUE ...]`; needs flash-attn-4 and nvidia-cutlass-dsl.

KIND is a key of `KINDS`; the values are integers or true and false. Only the package's public classes are used, and
nothing is patched: a scheduler that is not persistent asks no driver for the number of SMs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _fake(dtype, *shape, align: int = 16):
    """A contiguous tensor of the DSL without memory; None stands for a size known at run time only."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor

    sizes = tuple(cute.sym_int() if s is None else s for s in shape)
    return make_fake_compact_tensor(dtype, sizes, stride_order=tuple(range(len(shape)))[::-1], assumed_align=align)


def _compile_forward(kernel, head_dim: int, callable: bool = False):
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream

    tensors = [_fake(cutlass.BFloat16, None, None, None, head_dim) for _ in range(4)]
    lse = _fake(cutlass.Float32, None, None, None, align=4)
    stream = make_fake_stream(use_tvm_ffi_env_stream=callable)
    options = {"options": "--enable-tvm-ffi"} if callable else {}
    return cute.compile(kernel, *tensors, lse, cutlass.Float32(head_dim**-0.5), stream=stream, **options)


def forward_sm90(head_dim: int, group: int = 1, causal: bool = False, tile_m: int = 128, tile_n: int = 128,
                 rs: bool = True, pack: bool = False, callable: bool = False):  # fmt: skip
    """tile_m: 64 rows a warpgroup. rs: P stays in registers (else it goes through shared memory). pack: the group's
    query heads share a tile. callable: what is returned takes CUDA tensors (q, k, v, out, lse) and the scale."""
    import cutlass
    from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

    kernel = FlashAttentionForwardSm90(
        cutlass.BFloat16, head_dim, head_dim, group, is_causal=causal, pack_gqa=pack, tile_m=tile_m, tile_n=tile_n,
        num_stages=2, num_threads=2 * tile_m + 128, mma_pv_is_rs=rs,
    )  # fmt: skip
    return _compile_forward(kernel, head_dim, callable)


def forward_sm100(head_dim: int, group: int = 1, causal: bool = False, pair: bool = False, pack: bool = False):
    """pair: two CTAs share each MMA."""
    from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100

    kernel = FlashAttentionForwardSm100(
        head_dim=head_dim, head_dim_v=head_dim, qhead_per_kvhead=group, is_causal=causal, pack_gqa=pack,
        is_static_persistent=False, use_2cta_instrs=pair,
    )  # fmt: skip
    return _compile_forward(kernel, head_dim)


def backward_sm100(head_dim: int, causal: bool = False, pair: bool = False):
    """dQ is accumulated in float32 in the kernel's own order; dK and dV are final for one query head a KV head."""
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream
    from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100

    kernel = FlashAttentionBackwardSm100(
        head_dim, head_dim, is_causal=causal, qhead_per_kvhead=1, cluster_size=2 if pair else 1, use_2cta_instrs=pair
    )
    inputs = [_fake(cutlass.BFloat16, None, None, None, head_dim) for _ in range(4)]
    rows = [_fake(cutlass.Float32, None, None, None) for _ in range(2)]
    dq_accumulator = _fake(cutlass.Float32, None, None, None)
    outputs = [_fake(cutlass.BFloat16, None, None, None, head_dim) for _ in range(2)]
    return cute.compile(kernel, *inputs, *rows, dq_accumulator, *outputs, cutlass.Float32(head_dim**-0.5),
                        stream=make_fake_stream())  # fmt: skip


KINDS = {"forward_sm90": forward_sm90, "forward_sm100": forward_sm100, "backward_sm100": backward_sm100}


def main(folder: Path, kind: str, options: dict[str, int | bool]):
    """Compiles one kernel into `folder`. In a process of its own: the DSL reads its environment when it loads."""
    folder.mkdir(parents=True, exist_ok=True)
    arch = "sm_90a" if kind.endswith("sm90") else "sm_100a"
    os.environ.update(
        CUTE_DSL_ARCH=arch, FLASH_ATTENTION_ARCH=arch, CUTE_DSL_KEEP="ptx,ir", CUTE_DSL_DUMP_DIR=str(folder)
    )
    return KINDS[kind](**options)


if __name__ == "__main__":
    words = (word.partition("=") for word in sys.argv[3:])
    values = {"true": True, "false": False}
    main(Path(sys.argv[1]), sys.argv[2], {n: values[v] if v in values else int(v) for n, _, v in words})
