"""`python -m dispatch warm`: compiles the CuTe kernels ahead, into their cache on disk."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track

from fa4_core.commands.machine import default_device
from fa4_core.kvcache import CacheInputs, CacheOptions, CacheProblem, check_cache_signature
from fa4_core.problem import MAX_HEAD_DIM, PAGE_MULTIPLE, UNBOUNDED, Kinds, signature_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class _Kernel(NamedTuple):
    """A kernel: what it is for, what the backend lacks for that, and how it is compiled."""

    name: str
    lacks: tuple[str, ...]
    compile: Callable[[], object]


def run_warm(
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    groups: Sequence[int],
    pages: Sequence[int],
    arch: str | None = None,
    console: Console | None = None,
) -> None:
    """Compiles the forward for every combination, dense and packed, and the decode step of one query row a sequence for
    every page size, both full and causal; what is there already is kept.

    Args:
        head_dims: of q, k and v alike. groups: query heads for each KV head. dtypes: names of `DTYPES`.
        pages: rows of a page of the KV cache, 0 for a contiguous one.
        arch: sm_90a, sm_100a or sm_103a; None for the current device's. With it, no GPU is needed.
        console: where to print.

    Raises:
        typer.BadParameter: a value is out of what is accepted, no kernel serves this machine, or the cache's folder
            cannot be written.
    """
    console = console or Console()
    if importlib.util.find_spec("cutlass") is None:
        raise typer.BadParameter("compiling needs the package nvidia-cutlass-dsl: pip install 'fa4-attention[cute]'")
    from fa4_cute import cache, decode_config, kernels

    served = tuple(kernels.ARCHITECTURES.values())
    given = arch
    if arch is None and default_device().type == "cuda":
        arch = kernels.architecture(default_device())
    if arch not in served:
        got = "not given, and no kernel is for the device here" if given is None else f"got {given}"
        raise typer.BadParameter(f"--arch: {got}, accepted are {', '.join(served)}")
    for name, value, low, high in (
        *(("--head-dim", value, 1, MAX_HEAD_DIM) for value in head_dims),
        *(("--group", value, 1, 1024) for value in groups),
    ):
        if not low <= value <= high:
            raise typer.BadParameter(f"{name}: got {value}, accepted are {low} to {high}")
    odd = [page for page in pages if page < 0 or page % PAGE_MULTIPLE]
    if odd:
        raise typer.BadParameter(f"--page: got {odd[0]}, accepted are 0 (no pages) and multiples of {PAGE_MULTIPLE}")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"--dtype: got {unknown[0]}, accepted are {', '.join(DTYPES)}")
    if not cache.writable():
        raise typer.BadParameter(f"FA4_CACHE_DIR: compiled kernels cannot be written to {cache.folder()}")
    wanted = []
    for head_dim, dtype, group, causal in itertools.product(head_dims, dtypes, groups, (False, True)):
        for varlen in (False, True):
            kinds = _forward_kinds(-(-head_dim // 8) * 8, DTYPES[dtype], group, varlen, causal)
            lacks = kernels.missing(kinds, arch)
            for form in kernels.forms(kinds, arch) if not lacks else (False,):
                compiled = functools.partial(kernels.forward, kinds, None, False, arch, form)
                wanted.append(_Kernel(f"forward {head_dim}, {dtype}", lacks, compiled))
        for page in pages:
            step = _decode_step(head_dim, DTYPES[dtype], group, page, causal)
            compiled = functools.partial(_compile_decode, step, arch)
            wanted.append(_Kernel(f"decode {head_dim}, {dtype}", decode_config.missing(step), compiled))
    there = [kernel for kernel in wanted if not kernel.lacks]
    for kernel in track(there, f"compiling for {arch}", console=console):
        kernel.compile()
    refused = [f"not {kernel.name}: lacks {', '.join(kernel.lacks)}" for kernel in wanted if kernel.lacks]
    for line in dict.fromkeys(refused):  # which causal, packed and paged kernels share
        console.print(line)
    console.print(f"{len(there)} kernels are in {cache.folder()}")


def _compile_decode(step: CacheProblem, arch: str) -> None:
    from fa4_cute import decode_launch, kernels

    kernels.decode(decode_launch.kinds_of(step, False), None, arch)


def _forward_kinds(head_dim: int, dtype: torch.dtype, group: int, varlen: bool, causal: bool) -> Kinds:
    return Kinds(
        dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, group=group, varlen=varlen, seqused_q=False,
        seqused_k=False, paged=False, window_left=False, window_right=causal, softcap=False, sink=False,
    )  # fmt: skip


def _decode_step(head_dim: int, dtype: torch.dtype, group: int, page: int, causal: bool) -> CacheProblem:
    """A call of one query row a sequence on a cache whose lengths lie on the device; its sizes are any."""
    q = torch.empty(1, 1, group, head_dim, dtype=dtype, device="meta")
    cache = torch.empty(1, page or 1, 1, head_dim, dtype=dtype, device="meta")
    seqlens = torch.empty(1, dtype=torch.int32, device="meta")
    table = torch.empty(1, 1, dtype=torch.int32, device="meta") if page else None
    inputs = CacheInputs(q, cache, cache, cache_seqlens=seqlens, page_table=table)
    options = CacheOptions(window_right=0 if causal else UNBOUNDED)
    return check_cache_signature(signature_of((*inputs, None)), options)
