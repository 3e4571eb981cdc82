"""What the tests of both CuTe kernels share: kinds of problems, and the machine code of what was compiled for them."""

import importlib.util
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fa4_core.problem import Inputs, make_problem

needs_dsl = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, for nvdisasm")


def kinds(head_dim, head_dim_v=None, dtype=torch.bfloat16, group=1, **options):
    k, v = (torch.empty(1, 4, 2, dim, dtype=dtype) for dim in (head_dim, head_dim_v or head_dim))
    return make_problem(Inputs(torch.cat([k] * group, 2), k, v), **options).kinds


def varlen_kinds(head_dim, group, **options):
    """Of packed sequences with a sink and lengths in use: what a row needs to the end of its item."""
    q, k = (torch.empty(8, heads, head_dim, dtype=torch.bfloat16) for heads in (2 * group, 2))
    cu, used = torch.tensor([0, 8], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "seqused_q": used, "seqused_k": used}
    return make_problem(Inputs(q, k, k, sink=torch.empty(2 * group), **bounds), **options).kinds


def disassembled(kept, tool, *options):
    """What `tool`, cuobjdump or nvdisasm, prints of a compiled kernel; Triton's package brings both."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kept.cubin)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
