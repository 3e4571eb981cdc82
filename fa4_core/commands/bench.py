"""`python -m dispatch bench`: runs the benchmark matrix and writes a result file and a chart."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from fa4_core.bench import results as result_files
from fa4_core.bench.cases import SUITES, Case, DecodeCase, parse_case
from fa4_core.bench.contestants import RACE, Contestant, all_contestants
from fa4_core.bench.harness import Bench, Row
from fa4_core.bench.timing import CudaTimer, WallTimer
from fa4_core.bench.warm import warm_up


def run_bench(
    attention: Callable,
    *,
    suites: list[str],
    case_filter: str = "",
    cases: list[str] | None = None,
    contestants: list[str] | None = None,
    out: Path,
    rounds: int = 5,
    budget_minutes: float = float("inf"),
    check: bool = True,
    warm_jobs: int = 0,
    chart: Path | None = None,
    with_kvcache: Callable | None = None,
) -> list[Row]:
    """Runs suites over contestants, saving after every case; returns this run's rows.

    Args:
        attention: `dispatch.attention`.
        suites: names from `SUITES`.
        case_filter: a regular expression; only cases whose name it matches somewhere run.
        cases: names of cases to run instead of the suites' own.
        contestants: who runs; None: everyone in `RACE` (without a GPU: the reference).
        out: the result file; rows measured before in the same environment stay.
        rounds: interleaved rounds; times are their median.
        budget_minutes: no case starts later than this.
        warm_jobs: this many processes compile ahead what compiles into a cache on disk; 0: none does.
        check: compare every result with float32 first, and fail the row where it is wrong.
        chart: where to write the chart, or None.
        with_kvcache: `dispatch.attention_with_kvcache`, for the suite "decode".

    Raises:
        typer.BadParameter: an unknown suite, case or contestant, or `out` was measured in another environment.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    known = all_contestants(attention, with_kvcache)
    chosen = _chosen(known, contestants or (list(RACE) if on_gpu else ["reference"]))
    deadline = time.monotonic() + 60 * budget_minutes
    try:
        planned = {suite: _cases(suite, case_filter, cases) for suite in suites}
        results = result_files.open_results(out, result_files.environment(device, known.values()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run = results.start_run(result_files.commit())
    if warm_jobs:
        started = time.monotonic()
        count = warm_up(attention, planned, chosen, device, warm_jobs, with_kvcache)
        typer.echo(f"compiled ahead for {count} cells in {time.monotonic() - started:.0f} s")
    bench = Bench(CudaTimer() if on_gpu else WallTimer(), device, rounds, attention if check else None)
    rows: list[Row] = []
    started = time.monotonic()
    for suite, listed in planned.items():
        typer.echo(f"{suite}: {len(listed)} cases, {', '.join(chosen)}")
        at = time.monotonic()
        for case_rows in bench.run(suite, listed, chosen, deadline):
            rows += case_rows
            results.add(case_rows)
            run |= {"seconds": round(time.monotonic() - started), "clocks_after": result_files.clocks()}
            results.save(out)
            typer.echo(_progress(case_rows, time.monotonic() - at))
            at = time.monotonic()
    if rows:
        from fa4_core.bench import report

        typer.echo(f"\n{report.text(rows)}\n\nwrote {out}")
        if chart is not None and any("tflops" in row for row in results.rows):
            report.chart(results, chart)
            typer.echo(f"wrote {chart}")
    return rows


def _chosen(known: dict[str, Contestant], names: list[str]) -> dict[str, Contestant]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"contestants: got {', '.join(unknown)}, accepted are {', '.join(known)}")
    return {name: known[name] for name in names}


def _cases(suite: str, case_filter: str, names: list[str] | None) -> list[Case | DecodeCase]:
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, accepted are {', '.join(SUITES)}")
    try:
        wanted = re.compile(case_filter)
    except re.error as error:
        raise ValueError(f"case_filter: got {case_filter!r}, accepted are regular expressions: {error}") from None
    cases = SUITES[suite] if names is None else [parse_case(name) for name in names]
    if names is not None and any(isinstance(case, DecodeCase) != (suite == "decode") for case in cases):
        raise ValueError(f"case: {', '.join(names)} do not all belong to suite {suite!r}")
    return [case for case in cases if wanted.search(case.name)]


def _progress(rows: list[Row], seconds: float) -> str:
    def figure(row: Row) -> str:
        if "tflops" in row:
            return f"{row['tflops']:.4g}"
        if "gb_per_s" in row:
            return f"{row['gb_per_s']:.0f}"
        if "error" in row:
            return "error"
        if "skipped" in row:
            return "-"
        return "/".join(f"{row[key]:.0f}" for key in row if key.startswith("wall") or key.endswith("extra_mib"))

    figures = "  ".join(f"{row['name']} {figure(row)}" for row in rows)
    return f"  {rows[0]['case']}: {figures}  ({seconds:.1f} s)"
