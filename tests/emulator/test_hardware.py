"""Against a real GPU: one compiled kernel, run on the device and in the emulator, agrees within accumulation order.

`EMULATOR_RECORD=FILE` appends what was measured as JSON lines; records/ holds those of the machines used so far.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from . import test_triton  # noqa: E402
from .launcher import TRITON_TOLERATES, launch_triton  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERATED = (*TRITON_TOLERATES, "missing proxy fence")
"""Triton 3.6 leaves fences out between cp.async and wgmma; these runs show that this device does not mind."""

CASES = {
    "gemm bf16": (test_triton.gemm, torch.bfloat16, "ieee", 1e-5),
    "gemm fp16": (test_triton.gemm, torch.float16, "ieee", 1e-5),
    "gemm tf32": (test_triton.gemm, torch.float32, "tf32", 1e-3),
}


def record(name: str, difference: float, scale: float) -> None:
    path = os.environ.get("EMULATOR_RECORD")
    if path:
        line = {
            "case": name,
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "max_difference": difference,
            "max_value": scale,
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def compare(name: str, device: torch.Tensor, emulated: torch.Tensor, tolerance: float) -> None:
    difference = (device.cpu().double() - emulated.double()).abs().max().item()
    scale = device.abs().max().item()
    record(name, difference, scale)
    assert difference <= tolerance * scale


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("warps", [4, 8])
def test_gemm(name, warps):
    kernel, dtype, precision, tolerance = CASES[name]
    m, n, k = 130, 96, 200
    a, b = test_triton.randn(m, k, dtype=dtype), test_triton.randn(k, n, dtype=dtype, seed=1)
    c = torch.full((m, n), float("nan"))
    on_device = [t.cuda() for t in (a, b, c)]
    grid = (-(-m // 64), -(-n // 64))
    handle = kernel[grid](*on_device, m, n, k, M=64, N=64, K=32, PRECISION=precision, num_warps=warps, num_stages=2)
    launch_triton(handle, grid, dict(zip(kernel.arg_names, [a, b, c, m, n, k])), seed=3, tolerate=TOLERATED)
    compare(f"{name}, {warps} warps", on_device[2], c, tolerance)


def test_gemm_through_tensor_maps():
    a, b = test_triton.randn(130, 120, dtype=torch.bfloat16), test_triton.randn(120, 104, dtype=torch.bfloat16, seed=1)
    c = torch.full((130, 104), float("nan"))
    on_device = [t.cuda() for t in (a, b, c)]
    kernel = test_triton.gemm_descriptors
    handle = kernel[(3, 2)](*[test_triton.described(t, 64, 64) for t in on_device], 120, M=64, N=64, K=64)
    args = [test_triton.described(t, 64, 64) for t in (a, b, c)]
    launch_triton(handle, (3, 2), dict(zip(kernel.arg_names, [*args, 120])), seed=3, tolerate=TOLERATED)
    compare("gemm through tensor maps", on_device[2], c, 1e-5)


def test_softmax():
    x, y = test_triton.randn(5, 200, dtype=torch.float32), torch.full((5, 200), float("nan"))
    on_device = [t.cuda() for t in (x, y)]
    handle = test_triton.softmax[(5,)](*on_device, 200, N=256)
    launch_triton(handle, (5,), {"x": x, "y": y, "n": 200}, seed=3, tolerate=TOLERATED)
    compare("softmax", on_device[1], y, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_forward_and_backward(dtype, head_dim):
    """The project's kernels: results on the device against those of the emulator for the device's own architecture."""
    dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")
    from .triton_backend import emulated_triton

    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 150, 2, head_dim, generator=random).to(dtype) for _ in range(4)]

    def run(device):
        q, k, v = (t.to(device).requires_grad_() for t in tensors[:3])
        out = dispatch.attention(q, k, v, causal=True, backend="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].to(device))]

    on_device = [t.detach().cpu() for t in run("cuda")]
    major, minor = torch.cuda.get_device_capability()
    with emulated_triton(10 * major + minor, seed=3, tolerate=TOLERATED):
        emulated = [t.detach() for t in run("cpu")]
    for name, device, other in zip(("out", "dq", "dk", "dv"), on_device, emulated):
        compare(f"attention {name}, D={head_dim}, {dtype}", device, other, 2**-7)
