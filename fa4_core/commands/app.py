"""Puts the commands together.

They are handed the module `dispatch` and do not import it: run as a program it is `__main__`, and would load twice.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fa4_core.cli import missing_line
from fa4_core.commands import check, fuzz, info, overview, warm

BACKEND_HELP = "Only this backend; repeat for several. Default: every one that runs here."


def make_app(dispatch: ModuleType) -> typer.Typer:
    """The command line as a Typer application over the module `dispatch`."""
    attention = dispatch.attention
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def run_overview(context: typer.Context) -> None:
        """Exact attention on any NVIDIA GPU. Without a command: checks every kernel that runs here against float64 and
        prints a speed table beside PyTorch's own attention."""
        if context.invoked_subcommand is None:
            raise typer.Exit(overview.run_overview(dispatch))

    @app.command("check")
    def run_check(backend: Annotated[list[str] | None, typer.Option(help=BACKEND_HELP)] = None) -> None:
        """Checks every kernel that runs here against float64. Forward and backward, in each dtype that it takes."""
        raise typer.Exit(0 if check.run_check(attention, backend) else 1)

    @app.command("fuzz")
    def run_fuzz(
        minutes: Annotated[float, typer.Option(help="How long to draw problems.", min=0.0)] = 5.0,
        backend: Annotated[list[str] | None, typer.Option(help=BACKEND_HELP)] = None,
        longest: Annotated[int, typer.Option(help="The longest sequence.", min=1)] = 300,
        seed: Annotated[int | None, typer.Option(help="Draws the same problems again.")] = None,
        record: Annotated[Path | None, typer.Option(help="A JSON file to add an account of this run to.")] = None,
    ) -> None:
        """Checks random problems against float64. A failure is shrunk and printed as a call to paste."""
        raise typer.Exit(0 if fuzz.run_fuzz(attention, minutes, backend, longest, seed, record) else 1)

    @app.command("info")
    def run_info() -> None:
        """Prints device, versions and backends. For a backend that is not available, why, too."""
        info.run_info(dispatch)

    @app.command("warm")
    def run_warm(
        head_dim: Annotated[list[int] | None, typer.Option(help="Repeat for several. Default: 64, 128, 256.")] = None,
        dtype: Annotated[list[str] | None, typer.Option(help="float16, bfloat16; repeat. Default: both.")] = None,
        group: Annotated[list[int] | None, typer.Option(help="Query heads a KV head; repeat. Default: 1.")] = None,
        page: Annotated[
            list[int] | None, typer.Option(help="Rows of a page of the KV cache, 0: none; repeat. Default: 0, 16, 256.")
        ] = None,
        arch: Annotated[str | None, typer.Option(help="sm_90a, sm_100a, sm_103a: needs no GPU. Default: its.")] = None,
    ) -> None:
        """Compiles the CuTe kernels ahead. No first forward or decode step then waits for the compiler."""
        dims, pages = head_dim or [64, 128, 256], page or [0, 16, 256]
        warm.run_warm(dims, dtype or list(warm.DTYPES), group or [1], pages, arch)

    @app.command("bench")
    def run_bench(
        suite: Annotated[
            str, typer.Option(help="Comma-separated: forward, backward, features, varlen, decode, memory, host.")
        ] = "forward",
        case_filter: Annotated[str, typer.Option(help="Only cases whose name this regular expression matches.")] = "",
        case: Annotated[
            list[str] | None, typer.Option(help="A case by name, instead of the suite's own; repeat for several.")
        ] = None,
        contestants: Annotated[str, typer.Option(help="Comma-separated; default: everyone.")] = "",
        out: Annotated[Path, typer.Option(help="The result file, JSON; earlier rows in it stay.")] = Path("bench.json"),
        chart: Annotated[Path, typer.Option(help="The chart, PNG.")] = Path("bench.png"),
        rounds: Annotated[int, typer.Option(help="Interleaved rounds; times are their median.", min=1)] = 5,
        budget_minutes: Annotated[float, typer.Option(help="No case starts later than this.")] = 60.0,
    ) -> None:
        """Runs the benchmark matrix beside other libraries. Takes those installed here; writes JSON and a chart."""
        line = missing_line("bench")
        if line is not None:
            typer.echo(line, err=True)
            raise typer.Exit(1)
        from fa4_core.commands import bench

        bench.run_bench(
            attention,
            suites=suite.split(","),
            case_filter=case_filter,
            cases=case,
            contestants=contestants.split(",") if contestants else None,
            out=out,
            rounds=rounds,
            budget_minutes=budget_minutes,
            chart=chart,
            with_kvcache=dispatch.attention_with_kvcache,
        )

    return app
