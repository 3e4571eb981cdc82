"""Writes the chart and the README's tables from a result file: `python -m benchmarks.chart`, from the root."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fa4_core.bench import report
from fa4_core.bench.results import Results

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "speed_h100.png"


def section(results: Results, picture: Path, readme: Path) -> str:
    """What the README shows: the chart and the tables."""
    shown = picture.resolve().relative_to(readme.resolve().parent).as_posix()
    return f"![TFLOP/s beside the other libraries]({shown})\n\n{report.markdown(results)}"


def main(
    results: Annotated[Path, typer.Argument(help="The result file.")] = ROOT / "benchmarks" / "results" / "h100.json",
    readme: Annotated[Path, typer.Option(help="The document with the markers.")] = ROOT / "README.md",
    picture: Annotated[Path, typer.Option(help="The chart, PNG.")] = PICTURE,
) -> None:
    """Turns a result file into the README's tables and the chart."""
    loaded = Results.load(results)
    report.chart(loaded, picture)
    report.write_between(readme, "results", section(loaded, picture, readme))
    typer.echo(f"wrote {picture} and the tables in {readme}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
