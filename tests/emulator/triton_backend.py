"""The project's Triton backend on CPU tensors: its own host code, its kernels compiled for a GPU, run in the emulator.

Inside `emulated_triton(90)`, `dispatch.attention(q, k, v, backend="triton")` on CPU tensors checks, allocates, picks
grids and packs arguments as on a GPU, and each launch compiles for sm_90 and runs here. Only the launch itself and the
tile choice are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .launcher import launch_triton
from .machine import Result

_COMPILED: dict[tuple, Any] = {}

SMALL_TILES = {"forward": (64, 32, 4, 2), "backward_kv": (32, 64, 4, 1), "backward_q": (64, 32, 4, 1)}
"""Rows, keys, warps, stages: small enough that short sequences cross several tiles."""


@contextmanager
def emulated_triton(capability: int, *, seed: int = 0, tma: bool | None = None, tiles: dict | None = None,
                    observe: Callable[[str, Result], None] | None = None, **machine) -> Iterator[None]:  # fmt: skip
    """Runs the Triton backend for compute capability `capability` (80, 90, ...) under schedule `seed`.

    tma: tensor descriptors for K and V (default: from sm_90 on). tiles: as `SMALL_TILES`. observe: called with the name
    of each kernel and its `Result`. machine: options of `Machine`.
    """
    import fa4_triton
    from fa4_triton import launch as host

    use_tma = capability >= 90 if tma is None else tma
    table = {**SMALL_TILES, **(tiles or {})}

    def tile_for(kernel: str, kinds, device):
        m, n, warps, stages = table[kernel]
        return host.Tile(m, n, warps, stages, use_tma)

    def run(kernel, problem, tile, grid: int, args: tuple, constants: tuple, layout: tuple) -> None:
        if grid == 0:
            return
        key = (kernel.__name__, problem.kinds, tile, capability, constants, layout)
        compiled = _COMPILED.get(key)
        if compiled is None:
            target = host.GPUTarget("cuda", capability, 32)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            compiled = _COMPILED[key] = host.compile_kernel(kernel, args, dict(constants), options, target, layout[-1])
        named = dict(zip(kernel.arg_names, args))
        result = launch_triton(compiled, (grid,), named, seed=seed, **machine)
        if observe is not None:
            observe(kernel.__name__, result)

    replaced = {(host, "tile_for"): tile_for, (host, "_launch"): run, (fa4_triton, "_unavailable"): lambda device: None}
    original = {place: getattr(*place) for place in replaced}
    try:
        for place, function in replaced.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in original.items():
            setattr(*place, function)
