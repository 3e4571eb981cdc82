"""Backend `cute`: hand-tuned CuTe DSL kernels for single architectures.

No kernel is in the tree yet, so the backend declares that it serves nothing, and `explain` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa4_core.backends import Backend, Gradients
from fa4_core.problem import Inputs, Kinds, Problem


class CuteBackend(Backend):
    """Serves no architecture yet."""

    name = "cute"

    def unavailable(self, device: torch.device) -> str | None:
        return "has no kernel for any architecture yet"

    def missing(self, kinds: Kinds, device: torch.device) -> tuple[str, ...]:
        return ("any problem yet",)

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("backend 'cute' has no kernel for any architecture yet")

    def backward(
        self, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        raise NotImplementedError("backend 'cute' has no kernel for any architecture yet")


BACKEND = CuteBackend()
