"""Tile sizes by architecture, element size and head dimension.

Measured on an H100 by benchmarks/tune.py (docs/performance.md); the other rows follow from what the compiler reports:
shared memory within the device's limit, and no or few spilled registers. A tile depends on nothing but the architecture
and the problem's kinds, so results do not depend on lengths or batch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from fa4_core.problem import Kinds


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of its software pipeline.

    tma: read tiles in the loop through TMA descriptors. loop: how the forward visits the keys: in "phases", with a loop
    for each; on Hopper also "overlapped", q k^T in flight during the softmax, or "specialised" (`specialised.py`).
    registers: the most a thread of a kernel that reads through descriptors may take, so that one more program fits on a
    multiprocessor; 0: as many as it likes.
    """

    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False
    loop: str = "phases"
    registers: int = 0


SPECIALISING = ("3.6.0",)
"""Triton releases whose warp specialisation of the forward was seen right, and fast, on an H100."""

SHARED_MEMORY = {"hopper": 227, "blackwell": 227, "ampere": 163, "small": 99, "amd": 64}
"""KiB of shared memory that a program may use, by family."""

_FAMILIES = {80: "ampere", 87: "ampere", 90: "hopper", 100: "blackwell", 103: "blackwell", 110: "blackwell"}


def family_of(target: GPUTarget) -> str:
    """The row of the table for a compilation target; consumer parts, and NVIDIA parts yet unknown, are "small"."""
    if target.backend == "hip":
        return "amd"
    return _FAMILIES.get(int(target.arch), "small")


# (kernel, 16-bit elements) -> {widest head dimension, as a power of two: tile}, by family.
_16_BIT = {
    "hopper": {
        "forward": {
            64: Tile(64, 64, 4, 2, tma=True, registers=128),
            128: Tile(64, 64, 4, 3, tma=True),
            256: Tile(128, 64, 8, 2, tma=True),
        },
        "backward_kv": {
            64: Tile(64, 64, 4, 2, tma=True, registers=168),
            128: Tile(64, 64, 4, 2, tma=True),
            256: Tile(32, 64, 8, 2, tma=True),
        },
        "backward_q": {
            64: Tile(64, 64, 4, 2, tma=True, registers=128),
            128: Tile(128, 64, 8, 3, tma=True),
            256: Tile(128, 32, 8, 2, tma=True),
        },
    },
    "blackwell": {
        "forward": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 1)},
        "backward_kv": {64: Tile(64, 64, 8, 1), 128: Tile(32, 64, 8, 1), 256: Tile(32, 32, 8, 1)},
        "backward_q": {64: Tile(64, 64, 8, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
    },
    "ampere": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
        "backward_kv": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "backward_q": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    },
    "small": {
        "forward": {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        "backward_kv": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)},
        "backward_q": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "amd": {
        "forward": {64: Tile(128, 64, 4, 1), 128: Tile(128, 32, 4, 1), 256: Tile(64, 32, 4, 1)},
        "backward_kv": {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
        "backward_q": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    },
}
_32_BIT = {
    "forward": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    "backward_kv": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "backward_q": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
_INTERPRETED = {"forward": Tile(64, 32, 4, 1), "backward_kv": Tile(32, 64, 4, 1), "backward_q": Tile(64, 32, 4, 1)}


def tile_for(kernel: str, kinds: Kinds, target: GPUTarget | None) -> Tile:
    """The tile of `kernel` ("forward", "backward_kv", "backward_q"); a target of None is Triton's interpreter."""
    if target is None:
        return _INTERPRETED[kernel]
    dim = next(dim for dim in (64, 128, 256) if max(kinds.head_dim, kinds.head_dim_v) <= dim)
    if kinds.dtype.itemsize == 4:
        return _32_BIT[kernel][dim]
    tile = _16_BIT[family_of(target)][kernel][dim]
    if kernel == "forward" and family_of(target) == "hopper":
        return _hopper_forward(kinds, dim, tile)
    return tile


def _hopper_forward(kinds: Kinds, dim: int, tile: Tile) -> Tile:
    """The tile of the table, or a faster one where the kinds allow it: without a diagonal few key tiles have a mask."""
    if may_specialise(kinds):
        # Rows past the end of K and V must read as zeros, so lengths must be the tensors' own. Where they are not, the
        # same tile gives the same bits: packed sequences give those of dense ones.
        return Tile(128, 128, 8, 2, tma=True, loop="phases" if kinds.indexed else "specialised")
    if dim == 128 and not kinds.window_right:
        return Tile(64, 64, 4, 2, tma=True, loop="overlapped")
    if kinds.head_dim == kinds.head_dim_v == 64 and not (kinds.window_left or kinds.window_right):
        return Tile(64, 128, 4, 2, tma=True, registers=168)
    return tile


def may_specialise(kinds: Kinds) -> bool:
    """Whether the forward can be specialised by warps, in every layout or in none.

    A softcap's products and sums would be fused otherwise than in `visit`, which serves where there are no descriptors:
    the bits would differ.
    """
    released = triton.__version__.split("+")[0] in SPECIALISING
    return released and kinds.head_dim == kinds.head_dim_v == 128 and not kinds.softcap
