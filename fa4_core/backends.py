"""What a backend is, and the registry that finds one by name without importing the others."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fa4_core.problem import DTYPES, Inputs, Kinds, Problem

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheInputs, CacheProblem

MODULES = {"cute": "fa4_cute", "triton": "fa4_triton", "reference": "fa4_core.reference"}


class Gradients(NamedTuple):
    """Gradients of one call; `sink` is None where the call had no sink."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None


class Backend(ABC):
    """One implementation of attention: what it supports, and how it runs a problem.

    `forward` and `backward` may assume a checked problem that `missing` had no objection to, with q, k and v of a
    contiguous last dimension whose size is a multiple of `head_dim_multiple`, and the other tensors contiguous. The
    problem's CUDA device is the current one.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    """What q, k and v may have."""
    head_dim_multiple: int = 1
    serves_kv_cache: bool = False
    """Whether it has an `attend_cache`. Which calls it serves there, `missing_cache` says."""
    backward_backend: str | None = None
    """The backend that its `backward` leaves the gradients to; None where it computes them itself."""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device` at all (a missing package, a foreign device), or None."""

    @abstractmethod
    def missing(self, kinds: Kinds, device: torch.device) -> tuple[str, ...]:
        """The features the problem needs and this backend lacks on `device`; empty when it can serve."""

    def missing_cache(self, problem: CacheProblem) -> tuple[str, ...]:
        """As `missing`, for a KV-cache call of a backend that `serves_kv_cache`."""
        return self.missing(problem.attend.kinds, problem.attend.device)

    @abstractmethod
    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns out (q's shape with head_dim_v, the input dtype) and lse (float32, natural log).

        Without `problem.with_lse` lse may be anything, and memory that other calls write to.
        """

    def prepare(self, problem: Problem, inputs: Inputs) -> Callable[[tuple], tuple[Tensor, Tensor]]:
        """`forward` of a plain tuple of `Inputs`' fields, for calls that share the problem and their inputs' dtypes.

        inputs: the first call's. What this returns is kept and called by later ones, so it must keep none of them.
        """
        return lambda tensors: self.forward(problem, Inputs(*tensors))

    @abstractmethod
    def backward(
        self, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        """Returns the gradients of q, k, v (their shapes and dtype) and of the sink (its dtype)."""

    def attend_cache(
        self, problem: CacheProblem, inputs: CacheInputs, length: int, out: Tensor, lse: Tensor | None
    ) -> None:
        """Appends to the caches in place, and writes out and lse (None: not wanted), where `serves_kv_cache`.

        length: cache_seqlens where that is an int. Index tensors and the sink are contiguous, a page_table is so along
        its last dimension, as all others are but for the descales.
        """
        raise NotImplementedError(f"backend {self.name!r} serves no KV cache")

    def append_cache(self, problem: CacheProblem, inputs: CacheInputs, length: int) -> Tensor:
        """The first half of `attend_cache`, for backends that leave it to another: appends to the caches in place.

        Returns the query, rotated where there is a rotary embedding.
        """
        raise NotImplementedError(f"backend {self.name!r} appends to no KV cache")


@functools.cache
def load(name: str) -> Backend:
    """The backend called `name`; its package is imported on the first call.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in MODULES:
        raise ValueError(f"backend: got {name!r}, accepted are 'auto', {', '.join(map(repr, MODULES))}")
    return importlib.import_module(MODULES[name]).BACKEND
