"""Backend `cute`: hand-tuned CuTe DSL kernels for single architectures: SM90 (Hopper) and SM100 (Blackwell).

This file declares what the backend serves and imports no DSL; the kernels load on the first call. The forward is its
own, the backward is the `triton` backend's, which reads the same output and LSE. It decodes over KV caches; the rows
that a call appends, the `triton` backend writes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fa4_core import backends
from fa4_core.backends import Backend, Gradients
from fa4_core.problem import Inputs, Kinds, Problem
from fa4_cute import decode_config, kernels

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheInputs, CacheProblem

INSTALL_LINE = "pip install 'fa4-attention[cute]' (CUDA 12) or 'fa4-attention[cute-cu13]' (CUDA 13)"


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    for package in ("cutlass", "tvm_ffi"):
        if importlib.util.find_spec(package) is None:
            return f"needs the package nvidia-cutlass-dsl; install it with: {INSTALL_LINE}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if kernels.architecture(device) is None:
        served = ", ".join(f"{major}.{minor}" for major, minor in kernels.ARCHITECTURES)
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"has kernels for compute capability {served}; the device has {have}"
    return None


class CuteBackend(Backend):
    """CuTe DSL kernels."""

    name = "cute"
    dtypes = (torch.float16, torch.bfloat16)
    head_dim_multiple = 8
    backward_backend = "triton"
    append_backend = "triton"
    """The backend that a KV-cache call leaves its new rows to."""
    serves_kv_cache = True

    def unavailable(self, device: torch.device) -> str | None:
        return _unavailable(device)

    def missing(self, kinds: Kinds, device: torch.device) -> tuple[str, ...]:
        arch = kernels.architecture(device)
        assert arch is not None
        return kernels.missing(kinds, arch)

    def missing_cache(self, problem: CacheProblem) -> tuple[str, ...]:
        missing = decode_config.missing(problem)
        if problem.appends:
            why = backends.load(self.append_backend).unavailable(problem.attend.device)
            missing += () if why is None else (f"new rows, left to {self.append_backend!r}, which {why}",)
        return missing

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self._launch.forward(problem, inputs)

    def attend_cache(
        self, problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None
    ) -> None:
        if problem.appends:
            query = backends.load(self.append_backend).append_cache(problem, inputs, length)
            inputs = inputs._replace(q=query)
        self._decode_launch.attend_cache(problem, inputs, length, out, lse)

    @functools.cached_property
    def _decode_launch(self) -> ModuleType:
        return importlib.import_module("fa4_cute.decode_launch")

    def prepare(self, problem: Problem, inputs: Inputs) -> Callable[[tuple], tuple[Tensor, Tensor]]:
        return self._launch.prepare(problem, inputs)

    @functools.cached_property
    def _launch(self) -> ModuleType:
        return importlib.import_module("fa4_cute.launch")

    def backward(
        self, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        backend = backends.load(self.backward_backend)
        why = backend.unavailable(problem.device)
        if why is not None:
            raise NotImplementedError(f"backend='cute' leaves its backward to {self.backward_backend!r}, which {why}")
        return backend.backward(problem, inputs, out, lse, dout, dlse)


BACKEND = CuteBackend()
