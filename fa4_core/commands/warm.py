"""`python -m dispatch warm`: compiles the CuTe kernels ahead, into their cache on disk."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence

import torch
import typer
from rich.console import Console
from rich.progress import track

from fa4_core.commands.machine import default_device
from fa4_core.problem import MAX_HEAD_DIM, Kinds

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def run_warm(
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    groups: Sequence[int],
    arch: str | None = None,
    console: Console | None = None,
) -> None:
    """Compiles the forward for every combination, dense and packed, full and causal; what is there already is kept.

    Args:
        head_dims: of q, k and v alike. groups: query heads for each KV head. dtypes: names of `DTYPES`.
        arch: sm_90a, sm_100a or sm_103a; None for the current device's. With it, no GPU is needed.
        console: where to print.

    Raises:
        typer.BadParameter: a value is out of what is accepted, no kernel serves this machine, or the cache's folder
            cannot be written.
    """
    console = console or Console()
    if importlib.util.find_spec("cutlass") is None:
        raise typer.BadParameter("compiling needs the package nvidia-cutlass-dsl: pip install 'fa4-attention[cute]'")
    from fa4_cute import cache, kernels

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
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"--dtype: got {unknown[0]}, accepted are {', '.join(DTYPES)}")
    if not cache.writable():
        raise typer.BadParameter(f"FA4_CACHE_DIR: compiled kernels cannot be written to {cache.folder()}")
    wanted = [
        _kinds(-(-head_dim // 8) * 8, DTYPES[dtype], group, varlen, causal)
        for head_dim, dtype, group, varlen, causal in itertools.product(
            head_dims, dtypes, groups, (False, True), (False, True)
        )
    ]
    refused = [kinds for kinds in wanted if kernels.missing(kinds, arch)]
    for kinds in track([kinds for kinds in wanted if kinds not in refused], f"compiling for {arch}", console=console):
        kernels.forward(kinds, None, False, arch)
    for kinds in refused:
        console.print(f"not {kinds.head_dim}, {kinds.dtype}: lacks {', '.join(kernels.missing(kinds, arch))}")
    console.print(f"{len(wanted) - len(refused)} kernels are in {cache.folder()}")


def _kinds(head_dim: int, dtype: torch.dtype, group: int, varlen: bool, causal: bool) -> Kinds:
    return Kinds(
        dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, group=group, varlen=varlen, seqused_q=False,
        seqused_k=False, paged=False, window_left=False, window_right=causal, softcap=False, sink=False,
    )  # fmt: skip
