"""`python -m dispatch fuzz`: random problems against float64, until the time is over or one fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fa4_core.bench.results import append_account
from fa4_core.checks import check_backward
from fa4_core.commands.machine import default_device, dtypes, running_backends
from fa4_core.strategies import Case, cases

BATCH = 50
"""Examples drawn between two looks at the clock's end; each batch starts Hypothesis anew, with the next seed."""

LINE_SECONDS = 30
"""Where the output is no terminal, progress is a line this often."""


class _DeviceLost(BaseException):
    """A CUDA error: every later call fails too, so there is nothing to shrink. Not an Exception, to pass Hypothesis."""


@dataclass
class _Tally:
    """What was seen so far; `case` and `backend` are those of the last call made."""

    checked: int = 0
    not_served: int = 0
    worst: float = 0.0
    case: Case | None = None
    backend: str = ""


def run_fuzz(
    attention: Callable,
    minutes: float,
    named: list[str] | None = None,
    longest: int = 300,
    seed: int | None = None,
    record: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Draws problems for `minutes`, and returns whether all were right; a failure is printed as a call to paste.

    Args:
        attention: `dispatch.attention`.
        minutes: how long; at least one call is checked. Shrinking a failure may take longer.
        named: backends by name; None: every one that is available.
        longest: the longest sequence.
        seed: draws the same problems again; None: new ones.
        record: a JSON file, a list, that an account of this run is added to.
        console: where to print.

    Raises:
        typer.BadParameter: a named backend is not available.
    """
    console = console or Console()
    device = default_device()
    backends = running_backends(device, named)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    console.print(f"fuzzing {', '.join(backends)} on {device} for {minutes:g} min, seed {seed}")
    tally = _Tally()
    started = time.monotonic()
    end = started + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=60 * minutes)

        shown = time.monotonic()

        def show() -> None:
            nonlocal shown
            left = max(0.0, end - time.monotonic())
            so_far = f"{tally.checked} calls, worst error {tally.worst:.2f} of its budget"
            progress.update(task, completed=60 * minutes - left, description=so_far)
            if not console.is_terminal and time.monotonic() > shown + LINE_SECONDS:
                console.print(f"{so_far}, {left:.0f} s left")
                shown = time.monotonic()

        number = 0
        failure: BaseException | None = None
        while failure is None and (number == 0 or time.monotonic() < end):
            failure = _run_batch(attention, backends, device, longest, seed + number, end, tally, show)
            number += 1
    console.print(
        f"{tally.checked} calls checked, {tally.not_served} not served, worst error {tally.worst:.2f} of its budget"
    )
    source = "" if failure is None or tally.case is None else tally.case.as_call(device.type, tally.backend)
    if record is not None:
        account = {
            "seed": seed,
            "minutes": round((time.monotonic() - started) / 60, 2),
            "backends": backends,
            "longest": longest,
            "calls": tally.checked,
            "not_served": tally.not_served,
            "worst_error_over_budget": round(tally.worst, 4),
            "failure": None if failure is None else {"error": f"{type(failure).__name__}: {failure}", "call": source},
        }
        append_account(record, device, account)
    if failure is None:
        return True
    kind = "device lost, not shrunk" if isinstance(failure, _DeviceLost) else "minimal example"
    console.print(f"\nFAILED, {kind}:", style="red")
    console.print(f"{type(failure).__name__}: {failure}\n", markup=False, highlight=False, soft_wrap=True)
    console.print(source, markup=False, highlight=False, soft_wrap=True)
    return False


def _run_batch(
    attention: Callable,
    backends: list[str],
    device: torch.device,
    longest: int,
    seed: int,
    end: float,
    tally: _Tally,
    show: Callable[[], None],
) -> BaseException | None:
    """One run of Hypothesis; returns what the minimal failing example raised, whose call is then `tally`'s last."""
    problems = st.sampled_from(backends).flatmap(
        lambda backend: st.tuples(
            st.just(backend),
            st.sampled_from(dtypes(backend)).flatmap(lambda dtype: cases(dtype=dtype, longest=longest)),
        )
    )
    failing = False

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        verbosity=hypothesis.Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @hypothesis.given(problems)
    def every_problem(problem: tuple[str, Case]) -> None:
        nonlocal failing
        if not failing and tally.checked and time.monotonic() > end:
            return
        tally.backend, tally.case = problem
        try:
            ratio = _check(attention, tally.case, tally.backend, device)
        except NotImplementedError:
            tally.not_served += 1
            return
        except Exception:
            failing = True
            raise
        tally.checked += 1
        tally.worst = max(tally.worst, ratio)
        show()

    try:
        every_problem()
    except (Exception, _DeviceLost) as failure:
        return failure
    return None


def _check(attention: Callable, case: Case, backend: str, device: torch.device) -> float:
    """The worst error over its budget; raises what the call raises, and AssertionError where a row is off."""
    try:
        call = case.build(device)
        report = check_backward(
            attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options, backend=backend
        )
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise _DeviceLost(str(error)) from error
        raise
    return report.require().ratio
