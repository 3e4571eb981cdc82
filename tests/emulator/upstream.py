"""Compiles the published flash-attn-4 SM100 forward without a GPU and keeps its PTX and IR, for the proof on known-good
kernels. Run as `python upstream.py FOLDER HEAD_DIM GROUP [causal] [pair]`; needs flash-attn-4 and nvidia-cutlass-dsl.

Only the package's public classes are used, and nothing is patched: a scheduler that is not persistent asks no
driver for the number of SMs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def compile_forward(folder: Path, head_dim: int, group: int, causal: bool, pair: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        CUTE_DSL_ARCH="sm_100a", FLASH_ATTENTION_ARCH="sm_100a", CUTE_DSL_KEEP="ptx,ir", CUTE_DSL_DUMP_DIR=str(folder)
    )
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
    from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100

    def fake(dtype, *shape):
        sizes = [cute.sym_int() if s is None else s for s in shape]
        order = tuple(range(len(shape)))[::-1]
        return make_fake_compact_tensor(dtype, tuple(sizes), stride_order=order, assumed_align=16)

    forward = FlashAttentionForwardSm100(
        head_dim=head_dim,
        head_dim_v=head_dim,
        qhead_per_kvhead=group,
        is_causal=causal,
        pack_gqa=False,
        is_static_persistent=False,
        use_2cta_instrs=pair,
    )
    tensors = [fake(cutlass.BFloat16, None, None, None, head_dim) for _ in range(4)]
    lse = make_fake_compact_tensor(cutlass.Float32, tuple(cute.sym_int() for _ in range(3)), stride_order=(2, 1, 0))
    cute.compile(forward, *tensors, lse, cutlass.Float32(head_dim**-0.5), stream=make_fake_stream())


if __name__ == "__main__":
    compile_forward(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "causal" in sys.argv, "pair" in sys.argv)
