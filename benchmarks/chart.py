"""Writes the chart and the README's tables from a result file: `python -m benchmarks.chart`, from the root."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fa4_core.bench import report
from fa4_core.bench.results import Results

ROOT = Path(__file__).resolve().parents[1]


def main(
    results: Annotated[Path, typer.Argument(help="The result file.")] = ROOT / "benchmarks" / "results" / "h100.json",
    readme: Annotated[Path, typer.Option(help="The document with the markers.")] = ROOT / "README.md",
    picture: Annotated[Path, typer.Option(help="The chart, PNG.")] = ROOT / "docs" / "speed_h100.png",
) -> None:
    """Turns a result file into the README's tables and the chart."""
    loaded = Results.load(results)
    report.chart(loaded, picture)
    report.write_between(readme, "results", report.markdown(loaded))
    typer.echo(f"wrote {picture} and the tables in {readme}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
