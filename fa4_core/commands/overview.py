"""`python -m dispatch` without a command: checks what runs here, and shows its speed beside PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from fa4_core.bench.cases import Case
from fa4_core.bench.contestants import all_contestants
from fa4_core.bench.harness import Bench, Row
from fa4_core.bench.timing import CudaTimer
from fa4_core.commands.check import run_check
from fa4_core.commands.info import run_info
from fa4_core.commands.machine import default_device, unavailable

SPEED_CASES = {
    "forward": (
        "D64 H32/32 B2 S8192 causal bf16",
        "D128 H16/16 B8 S2048 causal bf16",
        "D128 H16/16 B2 S8192 causal bf16",
        "D128 H16/16 B2 S8192 full bf16",
    ),
    "backward": ("D128 H16/16 B2 S8192 causal bf16",),
}
"""A glance at the matrix, in seconds; `python -m dispatch bench` runs it whole."""


def run_overview(dispatch: ModuleType, console: Console | None = None) -> int:
    """Prints device, checks and speed; returns the exit status, 1 where a check failed.

    Args:
        dispatch: the module.
        console: where to print.
    """
    console = console or Console()
    run_info(dispatch, console)
    console.print()
    passed = run_check(dispatch.attention, None, console)
    device = default_device()
    ran = [name for name, why in unavailable(device).items() if why is None]
    kernels = [name for name in ran if name != "reference"]
    if has_speed(device) and kernels:
        failed = _print_speed(dispatch.attention, kernels, device, console)
        passed = passed and not failed
    else:
        lacking = "No kernel runs on this GPU (see above)" if has_speed(device) else "No CUDA device here"
        where = "it" if has_speed(device) else "the CPU"
        console.print(f"{lacking}: checked {', '.join(ran)} on {where}. No GPU kernel ran: there is no speed to show.")
    console.print("[green]all checks passed" if passed else "[red]a check failed")
    return 0 if passed else 1


def has_speed(device: torch.device) -> bool:
    """Whether there is a kernel's speed to show."""
    return device.type == "cuda"


def _print_speed(attention: Callable, ours: list[str], device: torch.device, console: Console) -> list[Row]:
    """Prints the table; returns the rows of this project's kernels, `ours`, that raised or were wrong."""
    known = all_contestants(attention)
    names = [*ours, "fa2", "cudnn"]
    bench = Bench(CudaTimer(), device, rounds=3, reference=attention)
    table = Table(title="TFLOP/s, device time (fa2, cudnn: scaled_dot_product_attention)", title_justify="left")
    for column in ("", "case", *names, *(f"{name}/fa2" for name in ours)):
        table.add_column(column, justify="left" if column in ("", "case") else "right")
    failed = []
    for suite, cases in SPEED_CASES.items():
        for rows in bench.run(suite, map(Case.parse, cases), {name: known[name] for name in names}):
            by_name = {row["name"]: row for row in rows}
            rates = {name: by_name[name].get("tflops") for name in names}
            ratios = [_ratio(rates[name], rates["fa2"]) for name in ours]
            cells = [f"{rate:.0f}" if rate else "-" for rate in rates.values()]
            table.add_row(suite, rows[0]["case"], *cells, *ratios)
            failed += [by_name[name] for name in ours if "error" in by_name[name]]
    console.print(table)
    for row in failed:
        console.print(f"{row['name']}, {row['case']}: {row['error']}", style="red", markup=False, highlight=False)
    return failed


def _ratio(rate: float | None, other: float | None) -> str:
    return f"{rate / other:.2f}x" if rate and other else "-"
