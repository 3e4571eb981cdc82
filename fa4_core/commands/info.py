"""`python -m dispatch info`: device, versions, backends."""

from __future__ import annotations

import importlib.util
import platform
from types import ModuleType

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fa4_core.bench.results import driver, installed
from fa4_core.commands.machine import default_device, unavailable

PACKAGES = ("triton", "nvidia-cutlass-dsl", "apache-tvm-ffi", "numpy")
"""Optional packages whose versions matter to a bug report."""


def run_info(dispatch: ModuleType, console: Console | None = None) -> None:
    """Prints what a bug report should hold.

    Args:
        dispatch: the module.
        console: where to print.
    """
    console = console or Console()
    device = default_device()
    facts = Table(show_header=False, box=None)
    facts.add_row("fa4-attention", dispatch.__version__)
    facts.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    facts.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in PACKAGES:
        facts.add_row(package, installed(package) or "not installed")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts.add_row(
            f"device {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB",
        )
    if device.type == "cuda":
        facts.add_row("driver", driver() or "unknown")
    else:
        facts.add_row("device", "no CUDA device: the CPU")
    console.print(facts)
    console.print(f"\nbackends on {device}")
    table = Table(show_header=False, box=None)
    for name, why in unavailable(device).items():
        table.add_row(name, "[green]available" if why is None else "[yellow]not available", escape(why or ""))
    console.print(table)
    if importlib.util.find_spec("cutlass") is not None:
        from fa4_cute import cache

        how = (
            "linked by " + linker
            if (linker := cache.linker())
            else "not linked, for want of a C compiler: loads slower"
        )
        console.print(f"\ncompiled cute kernels are kept in {cache.folder() or 'memory'}, {how}")
