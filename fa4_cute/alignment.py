"""How TMA asks tensors to lie in memory; imports no DSL, so that it can be asked anywhere."""

from __future__ import annotations

ALIGNMENT = 16
"""Bytes that q, k, v and out are aligned to, in their base and in every stride."""


def has_aligned_rows(strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether every row, the last dimension, begins at a multiple of `ALIGNMENT` bytes if the first does."""
    return all(stride > 0 and stride * itemsize % ALIGNMENT == 0 for stride in strides[:-1])
