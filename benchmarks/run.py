"""Measures the matrix and writes a result file: `python -m benchmarks.run --suite forward --out FILE`, from the root.

The same harness as `python -m dispatch bench`, with every option. Several commands may fill one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dispatch import attention, attention_with_kvcache
from fa4_core.bench.cases import SUITES
from fa4_core.bench.contestants import RACE
from fa4_core.commands.bench import run_bench

RESULTS = Path(__file__).parent / "results"


def main(
    suite: Annotated[str, typer.Option(help="Comma-separated suites.")] = ",".join(SUITES),
    case_filter: Annotated[str, typer.Option(help="Only cases whose name this regular expression matches.")] = "",
    case: Annotated[list[str] | None, typer.Option(help="A case by name, instead of the suite's own. Repeat.")] = None,
    contestants: Annotated[str, typer.Option(help="Comma-separated names.")] = ",".join(RACE),
    out: Annotated[Path, typer.Option(help="The result file; rows of cells not measured now stay.")] = RESULTS
    / "h100.json",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; times are their median.")] = 5,
    budget_minutes: Annotated[float, typer.Option(help="No case starts later than this.")] = 9.0,
    warm_jobs: Annotated[int, typer.Option(help="Processes that compile ahead, in parallel; 0: none.")] = 0,
    check: Annotated[bool, typer.Option(help="Compare every result with float32 before timing it.")] = True,
) -> None:
    """Measures suites of the benchmark matrix on this machine's GPU."""
    run_bench(
        attention,
        suites=suite.split(","),
        case_filter=case_filter,
        cases=case,
        contestants=contestants.split(","),
        out=out,
        rounds=rounds,
        budget_minutes=budget_minutes,
        check=check,
        warm_jobs=warm_jobs,
        with_kvcache=attention_with_kvcache,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
