"""`python -m dispatch check`: every backend that runs here, a set of problems, float64 beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
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
PROCESSES = 8
"""On a GPU so many check at once: a kernel takes seconds to compile and microseconds to run."""


class _Answer(NamedTuple):
    """A cell of the table, and what failed, if anything."""

    cell: str
    failure: str | None = None


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
    names = running_backends(device, named)
    jobs = [(replace(case, dtype=t), device, name) for name in names for case in CASES.values() for t in dtypes(name)]
    processes = min(PROCESSES, os.cpu_count() or 1) if device.type == "cuda" else 0
    checked = track(_answers(attention, jobs, processes), "checking", len(jobs), console=console, transient=True)
    answers = iter(list(checked))
    passed = True
    for backend in names:
        table = Table(title=f"{backend} on {_title(device)}: worst error over its budget", title_justify="left")
        table.add_column("problem")
        failures: list[str] = []
        types = dtypes(backend)
        for dtype in types:
            table.add_column(_short(dtype), justify="right")
        for name in CASES:
            row = [next(answers) for _ in types]
            table.add_row(name, *(answer.cell for answer in row))
            failures += [
                f"{backend}, {name}, {_short(dtype)}: {answer.failure}"
                for dtype, answer in zip(types, row)
                if answer.failure is not None
            ]
        console.print(table)
        for failure in failures:
            console.print(failure, style="red", markup=False, highlight=False)
        passed = passed and not failures
    return passed


def _answers(attention: Callable, jobs: list, processes: int) -> Iterator[_Answer]:
    """The answer to each (case, device, backend), in order; with 0 processes this one works them out."""
    if processes == 0:
        yield from (_checked(attention, *job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_checked, [attention] * len(jobs), *zip(*jobs))


def _checked(attention: Callable, case: Case, device: torch.device, backend: str) -> _Answer:
    call = case.build(device)
    try:
        report: Report = check_backward(
            attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options, backend=backend
        )
    except NotImplementedError:
        return _Answer("not served")
    except Exception as error:  # a kernel that does not compile or launch is a finding like any other
        return _Answer("[red]error", f"{type(error).__name__}: {error}")
    if report.passed:
        return _Answer(f"[green]{report.ratio:.2f}")
    return _Answer(f"[red]{report.ratio:.2f}", "\n".join(f.message for f in report.findings if not f.passed))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
