"""The project's Triton backend on CPU tensors: its own host code, its kernels compiled for a GPU, run in the emulator.

Inside `emulated_triton(90)`, `dispatch.attention(q, k, v, backend="triton")` on CPU tensors checks, allocates, picks
tiles and grids and packs arguments as on a GPU; each launch compiles for sm_90 and runs here. Only the question which
device this is, and the launch itself, are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .launcher import launch_triton
from .machine import Result
from .patching import replaced


@functools.cache
def _plans(capability: int, tiles: tuple):
    """A plan function of its own for each target, so that compiled kernels of several live side by side."""
    from fa4_triton import launch as host

    return functools.cache(host._plan.__wrapped__)


@contextmanager
def emulated_triton(capability: int, *, seed: int = 0, tiles: dict | None = None,
                    observe: Callable[[str, Result], None] | None = None, **machine) -> Iterator[None]:  # fmt: skip
    """Runs the Triton backend for compute capability `capability` (80, 90, ...) under schedule `seed`.

    tiles: `fa4_triton.tiles.Tile` by kernel name, in place of the project's table. observe: called with the name of
    each kernel and its `Result`. machine: options of `Machine`.
    """
    import fa4_triton
    from fa4_triton import launch as host

    target = host.GPUTarget("cuda", capability, 32)
    chosen = tiles or {}
    table = host.tile_for

    def tile_for(name, kinds, target):
        return chosen.get(name) or table(name, kinds, target)

    def run(kernel, plan, device, grid: int, arguments: Callable[[bool], tuple], layout: tuple) -> None:
        if grid == 0:
            return
        args = arguments(False)
        if layout not in plan.compiled:
            plan.compiled[layout] = host.compile_planned(kernel, plan, args, target, layout)
        named = dict(zip(kernel.arg_names, args))
        result = launch_triton(plan.compiled[layout], (grid,), named, seed=seed, **machine)
        if observe is not None:
            observe(kernel.__name__, result)

    places = {
        (fa4_triton, "_unavailable"): lambda device: None,
        (host, "target_of"): lambda device: target,
        (host, "tile_for"): tile_for,
        (host, "_plan"): _plans(capability, tuple(sorted(chosen.items()))),
        (host, "_launch"): run,
    }
    with replaced(places):
        yield
