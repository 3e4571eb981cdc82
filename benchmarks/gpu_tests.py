"""Runs the tests on a GPU and records how they went: `python -m benchmarks.gpu_tests -- -m gpu`, from the root.

What stands after `--` goes to pytest. The record, JSON, says what ran where: device, driver, versions, commit, the
counts, every failure, why tests were skipped, and the slowest. The exit status is pytest's.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

from fa4_core.bench.results import provenance
from fa4_core.commands.machine import default_device

SLOWEST = 15
RESULTS = Path(__file__).parent / "results"


class Recorder:
    """A pytest plugin that keeps the outcome of every test."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._failures: dict[str, str] = {}
        self._skips: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test once: by its call, or by the setup or teardown that failed or skipped."""
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self._outcomes["failed" if report.when == "call" else "errors"] += 1
            self._failures[report.nodeid] = str(report.longrepr).strip().splitlines()[-1][:500]
        elif report.skipped:
            expected_failure = hasattr(report, "wasxfail")
            self._outcomes["xfailed" if expected_failure else "skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._skips[reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self._outcomes["passed"] += 1

    def summary(self) -> dict[str, Any]:
        """Counts, failures with their last line, reasons of skips with their counts, the slowest tests in seconds."""
        slowest = sorted(self._seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        return {
            **{outcome: self._outcomes[outcome] for outcome in ("passed", "failed", "errors", "skipped", "xfailed")},
            "failures": self._failures,
            "skip_reasons": dict(self._skips),
            "slowest": {name: round(seconds, 2) for name, seconds in slowest},
        }


def record(arguments: list[str], out: Path) -> int:
    """Runs pytest with `arguments`, writes the record to `out`, and returns pytest's exit status.

    A run that is interrupted leaves a record, too, of the tests that ended; its exit status says so.
    """
    recorder = Recorder()
    started = time.monotonic()
    status = int(pytest.ExitCode.INTERRUPTED)
    try:
        status = int(pytest.main(arguments, plugins=[recorder]))
    finally:
        content = {
            **provenance(default_device()),
            "pytest": arguments,
            "exit_status": status,
            "seconds": round(time.monotonic() - started, 1),
            **recorder.summary(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    return status


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="What goes to pytest.")] = None,
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "gpu_tests.json",
    anywhere: Annotated[bool, typer.Option(help="Run without a CUDA device, too.")] = False,
) -> None:
    """Runs pytest and writes a record of the run."""
    if not torch.cuda.is_available() and not anywhere:
        raise typer.BadParameter("there is no CUDA device here; --anywhere runs the tests regardless")
    status = record(arguments or [], out)
    typer.echo(f"wrote {out}")
    raise typer.Exit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
