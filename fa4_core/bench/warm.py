"""Compiling ahead: processes that run each cell once, so that the measuring process finds its kernels on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from fa4_core.bench.cases import Case, DecodeCase, parse_case
from fa4_core.bench.contestants import Contestant, all_contestants
from fa4_core.bench.harness import Entry, make_cache, make_tensors


def cells_to_warm(
    planned: Mapping[str, Iterable[Case | DecodeCase]], contestants: Mapping[str, Contestant], device: torch.device
) -> list[tuple[str, str, str]]:
    """(suite, case, contestant) of every cell whose contestant compiles and runs there; the slow ones first."""
    cells = [
        (suite, case.name, name)
        for suite, cases in planned.items()
        for case in cases
        for name, contestant in contestants.items()
        if contestant.compiles
        and contestant.unavailable(device) is None
        and _refusal(contestant, case, suite == "backward") is None
    ]
    return sorted(cells, key=lambda cell: cell[0] == "forward")


def _refusal(contestant: Contestant, case: Case | DecodeCase, backward: bool) -> str | None:
    return contestant.decode_refusal(case) if isinstance(case, DecodeCase) else contestant.refusal(case, backward)


def warm_up(
    attention: Callable,
    planned: Mapping[str, Iterable[Case | DecodeCase]],
    contestants: Mapping[str, Contestant],
    device: torch.device,
    jobs: int,
    with_kvcache: Callable | None = None,
) -> int:
    """Runs the cells in `jobs` processes; returns how many ran. What raises there raises again where it is measured.

    Args:
        attention: `dispatch.attention`.
        planned: cases by suite.
        contestants: by name, from `all_contestants`.
        device: where to run.
        with_kvcache: `dispatch.attention_with_kvcache`, for the suite "decode".
        jobs: processes; each holds a context and one case on the device.
    """
    cells = cells_to_warm(planned, contestants, device)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = [pool.submit(run_cell, attention, *cell, str(device), with_kvcache) for cell in cells]
        return sum(future.exception() is None for future in futures)


def _one_thread() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def run_cell(
    attention: Callable, suite: str, case_name: str, name: str, device: str, with_kvcache: Callable | None = None
) -> None:
    """One call of a cell, and its backward where the suite has one."""
    case, contestant = parse_case(case_name), all_contestants(attention, with_kvcache)[name]
    with contestant.context():
        if isinstance(case, DecodeCase):
            # The same kernel as with many long sequences, at once.
            small = replace(case, batch=2, seqlen=min(case.seqlen, 512), longest=0, capacity=0)
            contestant.decode(case)(make_cache(small, torch.device(device)))
            return
        entry = Entry(contestant, case, make_tensors(case, torch.device(device)))
        entry.forward()
        if suite not in ("forward", "features", "varlen") and contestant.refusal(case, backward=True) is None:
            entry.step()
