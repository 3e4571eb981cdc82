"""Which kernel serves which architecture, and how it is compiled. Imports no DSL until something is compiled."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from fa4_core.problem import Kinds
from fa4_cute import cache, sm90_config, sm100_config
from fa4_cute.decode_config import CacheKinds

ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
"""Compute capability to what kernels are compiled for."""


@functools.cache
def architecture(device: torch.device) -> str | None:
    """What kernels are compiled for on a CUDA device; None where there is none."""
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device))


def missing(kinds: Kinds, arch: str) -> tuple[str, ...]:
    """What a problem needs and the architecture's forward lacks; empty where it serves."""
    return sm90_config.missing(kinds) if arch == "sm_90a" else sm100_config.missing(kinds)


@functools.cache
def config(kinds: Kinds, arch: str, long: bool = False) -> sm90_config.Sm90Config | sm100_config.Sm100Config:
    """The tiles and budgets of a kind's forward; long as in `forms`."""
    if arch == "sm_90a":
        return sm90_config.config_for(kinds, long)
    capability = next(capability for capability, name in ARCHITECTURES.items() if name == arch)
    return sm100_config.config_for(kinds, capability)


def forms(kinds: Kinds, arch: str) -> tuple[bool, ...]:
    """The forms in which a kind's forward is compiled: for any rows, and one for long ones where that differs.

    They give the same bits.
    """
    return (False,) if config(kinds, arch, True) == config(kinds, arch) else (False, True)


class Items(NamedTuple):
    """What a launch counts its work items by: query positions and query heads of an item, and blocks that share one.

    launch_control: whether each item has a block of its own, which others may take over.
    """

    positions: int
    heads: int
    blocks: int
    launch_control: bool


def items(kinds: Kinds, arch: str) -> Items:
    """The work items of a kind's forward."""
    chosen = config(kinds, arch)
    if isinstance(chosen, sm90_config.Sm90Config):
        return Items(chosen.positions, chosen.packed, 1, False)
    return Items(chosen.positions, chosen.packed, chosen.ctas, chosen.launch_control)


def drawn(kinds: Kinds) -> bool:
    """Whether work items differ in length, so that blocks draw them one by one instead of taking equal shares."""
    return kinds.uneven


def forward(
    kinds: Kinds, sink_dtype: torch.dtype | None, counted: bool, arch: str, long: bool = False
) -> Callable[..., None]:
    """A kind's compiled forward, from the cache or compiled now (some seconds); arguments as `params` lists them.

    long: one of `forms`.
    """
    key = f"forward {arch} {kinds} {sink_dtype} {counted} {long}"
    return cache.get(key, functools.partial(_compile_forward, kinds, sink_dtype, counted, arch, long))


def _compile_forward(
    kinds: Kinds, sink_dtype: torch.dtype | None, counted: bool, arch: str, long: bool
) -> Callable[..., None]:
    import cutlass.cute as cute

    from fa4_cute.params import fake_arguments

    module, name = ("sm90_forward", "Sm90Forward") if arch == "sm_90a" else ("sm100_forward", "Sm100Forward")
    kernel = getattr(importlib.import_module(f"fa4_cute.{module}"), name)
    host = kernel(kinds, config(kinds, arch, long), counted)
    options = f"--enable-tvm-ffi --gpu-arch {arch}"
    return cute.compile(host, *fake_arguments(kinds, sink_dtype, counted), options=options)


def decode(kinds: CacheKinds, sink_dtype: torch.dtype | None, arch: str) -> Callable[..., None]:
    """A compiled decode kernel, from the cache or compiled now; arguments as `decode.Decode.__call__` lists them."""
    return cache.get(f"decode {arch} {kinds} {sink_dtype}", functools.partial(_compile_decode, kinds, sink_dtype, arch))


def _compile_decode(kinds: CacheKinds, sink_dtype: torch.dtype | None, arch: str) -> Callable[..., None]:
    import cutlass.cute as cute

    from fa4_cute.decode import Decode

    host = Decode(kinds)
    return cute.compile(host, *host.fake_arguments(sink_dtype), options=f"--enable-tvm-ffi --gpu-arch {arch}")
