"""Tile sizes by architecture, element size and head dimension; benchmarks/tune.py measures candidates for this table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from fa4_core.problem import Kinds


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of its software pipeline, K and V by TMA."""

    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False


@functools.cache
def tile_for(kernel: str, kinds: Kinds, device: torch.device) -> Tile:
    """The tile of `kernel` ("forward", "backward_kv", "backward_q") for a problem's kinds on a device."""
    dim = triton.next_power_of_2(max(kinds.head_dim, kinds.head_dim_v, 16))
    return Tile(64, 32, 4, 1)
