"""Backend `triton`: portable kernels, forward and backward, for NVIDIA GPUs from compute capability 8.0 on.

This file declares what the backend serves and imports no Triton; the kernels load on the first call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fa4_core.backends import Backend, Gradients
from fa4_core.problem import Inputs, Kinds, Problem

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheInputs, CacheProblem

INSTALL_LINE = "pip install 'fa4-attention[triton]'"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1 at the first use)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"needs the package triton; install it with: {INSTALL_LINE}"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type} (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"needs compute capability {'.'.join(map(str, MIN_CAPABILITY))} or later, the device has {have}"
    return None


class TritonBackend(Backend):
    """Portable Triton kernels."""

    name = "triton"
    dtypes = DTYPES
    head_dim_multiple = 8
    serves_kv_cache = True

    def unavailable(self, device: torch.device) -> str | None:
        return _unavailable(device)

    def missing(self, kinds: Kinds, device: torch.device) -> tuple[str, ...]:
        return () if kinds.dtype in DTYPES else (f"dtype {kinds.dtype}",)

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if problem.kinds.paged:
            return self._decode_launch.paged_forward(problem, inputs)
        return self._launch.forward(problem, inputs)

    def attend_cache(
        self, problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None
    ) -> None:
        self._decode_launch.attend_cache(problem, inputs, length, out, lse)

    def append_cache(self, problem: CacheProblem, inputs: CacheInputs, length: int) -> Tensor:
        return self._decode_launch.append(problem, inputs, length)

    def backward(
        self, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        if problem.kinds.paged:
            raise NotImplementedError("paged K and V have no gradients")
        return self._launch.backward(problem, inputs, out, lse, dout, dlse)

    @functools.cached_property
    def _launch(self) -> ModuleType:
        return importlib.import_module("fa4_triton.launch")

    @functools.cached_property
    def _decode_launch(self) -> ModuleType:
        return importlib.import_module("fa4_triton.decode_launch")


BACKEND = TritonBackend()
