"""`python -m dispatch check`: every backend that runs here, a set of problems, float64 beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from fa4_core.checks import Report, check_backward
from fa4_core.commands.machine import default_device, dtypes, running_backends
from fa4_core.strategies import Case

SQUARE = ((200, 200), (200, 200))
CASES = {
    "full": Case(head_dim=128, head_dim_v=128, heads_q=2, heads_kv=2, lengths=SQUARE),
    "causal, GQA": Case(head_dim=64, head_dim_v=64, heads_q=4, heads_kv=2, lengths=SQUARE, causal=True),
    "causal, more keys than queries": Case(
        head_dim=64, head_dim_v=64, heads_q=2, heads_kv=1, lengths=((70, 333),), causal=True
    ),
    "causal, rows without a key": Case(head_dim=64, head_dim_v=64, lengths=((150, 40),), causal=True),
    "window": Case(head_dim=128, head_dim_v=128, heads_q=2, heads_kv=2, lengths=((300, 300),), window=(65, 17)),
    "softcap and sink": Case(
        head_dim=64, head_dim_v=64, heads_q=4, heads_kv=4, lengths=SQUARE, causal=True, softcap=5.0, sink="normal"
    ),
    "varlen, with empty sequences": Case(
        head_dim=64,
        head_dim_v=64,
        heads_q=2,
        heads_kv=2,
        varlen=True,
        lengths=((0, 5), (1, 1), (130, 257), (33, 0), (64, 64)),
        tail=(3, 5),
        causal=True,
    ),
    "seqused": Case(
        head_dim=64, head_dim_v=64, heads_q=2, heads_kv=2, lengths=SQUARE, used=((200, 7), (129, 60)), causal=True
    ),
    "head_dim 40, values of 72": Case(head_dim=40, head_dim_v=72, heads_q=2, heads_kv=2, lengths=SQUARE),
    "head_dim 256": Case(head_dim=256, head_dim_v=256, heads_q=2, heads_kv=1, lengths=((150, 150),), causal=True),
    "scores that keep rising": Case(
        head_dim=64, head_dim_v=64, heads_q=2, heads_kv=2, lengths=((300, 300),), scores="rising"
    ),
}
"""The problems, by what is particular to them; each runs in every dtype of a backend."""


def run_check(attention: Callable, named: list[str] | None = None, console: Console | None = None) -> bool:
    """Checks the backends (all that are available, or those named) and prints a table; returns whether all passed.

    Args:
        attention: `dispatch.attention`.
        named: backends by name.
        console: where to print.

    Raises:
        typer.BadParameter: a named backend is not available.
    """
    console = console or Console()
    device = default_device()
    passed = True
    for backend in running_backends(device, named):
        table = Table(title=f"{backend} on {_title(device)}: worst error over its budget", title_justify="left")
        table.add_column("problem")
        failures: list[str] = []
        types = dtypes(backend)
        for dtype in types:
            table.add_column(_short(dtype), justify="right")
        for name, case in CASES.items():
            cells = []
            for dtype in types:
                cell, failure = _checked(attention, replace(case, dtype=dtype), device, backend)
                cells.append(cell)
                if failure is not None:
                    failures.append(f"{backend}, {name}, {_short(dtype)}: {failure}")
            table.add_row(name, *cells)
        console.print(table)
        for failure in failures:
            console.print(failure, style="red", markup=False, highlight=False)
        passed = passed and not failures
    return passed


def _checked(attention: Callable, case: Case, device: torch.device, backend: str) -> tuple[str, str | None]:
    """The table's cell, and what failed."""
    call = case.build(device)
    try:
        report: Report = check_backward(
            attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options, backend=backend
        )
    except NotImplementedError:
        return "not served", None
    except Exception as error:  # a kernel that does not compile or launch is a finding like any other
        return "[red]error", f"{type(error).__name__}: {error}"
    if report.passed:
        return f"[green]{report.ratio:.2f}", None
    return f"[red]{report.ratio:.2f}", "\n".join(f.message for f in report.findings if not f.passed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
