"""Times candidate tiles of the Triton kernels on this GPU: `python -m benchmarks.tune`, from the root.

What comes out fastest goes into `fa4_triton/tiles.py` by hand, with a look at its neighbours: a winner by 1 % is noise.
Kernels compile in parallel first, then each candidate is timed at 8,192 and 2,048 rows, 16,384 tokens, bf16.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.progress import track

from fa4_core.problem import UNBOUNDED, Inputs, make_problem
from fa4_triton import launch
from fa4_triton.tiles import Tile

KERNELS = {
    "forward": "attention_forward",
    "backward_kv": "attention_backward_kv",
    "backward_q": "attention_backward_q",
}
SHAPES = {
    "forward": (
        (64, 64, 4, 0),
        (64, 64, 4, 128),
        (64, 128, 4, 0),
        (64, 128, 4, 168),
        (128, 64, 8, 0),
        (128, 128, 8, 0),
    ),
    "backward_kv": ((64, 64, 4, 0), (64, 64, 4, 168), (32, 64, 4, 168), (64, 128, 8, 0), (32, 128, 8, 0)),
    "backward_q": ((64, 64, 4, 0), (64, 64, 4, 128), (64, 128, 4, 0), (128, 64, 8, 0), (128, 32, 8, 0)),
}
"""Query rows, keys, warps, and the most registers a thread may take (0: no limit) of the candidates."""
STAGES = (2, 3)
TOKENS, WIDTH = 16384, 2048


class Job(NamedTuple):
    """One candidate: a kernel ("forward", "backward_kv", "backward_q"), head_dim, mask and tile."""

    kernel: str
    dim: int
    causal: bool
    tile: Tile


def jobs(kernels: list[str], dims: list[int]) -> list[Job]:
    """Every candidate; only the forward has more than one loop."""
    found = []
    for kernel, dim, causal in itertools.product(kernels, dims, (False, True)):
        loops = ("phases", "overlapped") if kernel == "forward" else ("phases",)
        for (m, n, warps, registers), stages, loop in itertools.product(SHAPES[kernel], STAGES, loops):
            found.append(Job(kernel, dim, causal, Tile(m, n, warps, stages, True, loop, registers)))
        if kernel == "forward" and dim == 128:
            found.append(Job(kernel, dim, causal, Tile(128, 128, 8, 2, True, "specialised")))
    return found


def _call(job: Job, seqlen: int, device: str) -> Callable[[], object]:
    """A call whose launches include the job's kernel, on fresh N(0, 1) inputs."""
    shape = (TOKENS // seqlen, seqlen, WIDTH // job.dim, job.dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    inputs = Inputs(q, k, v)
    problem = make_problem(inputs, window_right=0 if job.causal else UNBOUNDED)
    if job.kernel == "forward":
        return lambda: launch.forward(problem, inputs)
    lse = torch.randn(problem.lse_shape, device=device) + 9.0  # near the LSE of such inputs, so that P stays moderate
    return lambda: launch.backward(problem, inputs, dout, lse, dout, None)


def _only(job: Job, run: Callable) -> Callable:
    """A stand-in for `launch._launch` that hands only the job's kernel to `run`."""

    def filtered(kernel, plan, device, grid, arguments, layout):
        if kernel.__name__ == KERNELS[job.kernel]:
            return run(kernel, plan._replace(tile=job.tile), device, grid, arguments, layout)
        return None

    return filtered


def compile_ahead(job: Job) -> str | None:
    """Compiles the job's kernel into Triton's disk cache; returns why it cannot be, or None. Needs no CUDA context."""

    def run(kernel, plan, device, grid, arguments, layout):
        launch.compile_planned(kernel, plan, arguments(False), TARGET, layout)

    launch.target_of, launch.tile_for = (lambda device: TARGET), (lambda *_: job.tile)
    launch._launch = _only(job, run)
    launch.forget()
    try:
        _call(job, TOKENS, "cpu")()
    except Exception as error:  # a candidate that does not compile is a result
        return f"{type(error).__name__}: {error}"[:120]
    return None


TARGET = None
"""The device's target, which forked processes take over without touching the device."""


def milliseconds(run: Callable[[], object], repeats: int = 12) -> float:
    """Median device time of a call."""
    for _ in range(2):
        run()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure(job: Job, seqlen: int) -> dict:
    """One row: the job's fields, ms and useful TFLOP/s (for a backward kernel, as if it were the whole backward)."""
    launch.tile_for = lambda *_: job.tile
    launch.forget()
    original = launch._launch
    launch._launch = _only(job, original)
    try:
        ms = milliseconds(_call(job, seqlen, "cuda"))
    except Exception as error:  # out of resources: a result, too
        return {**job._asdict(), "seqlen": seqlen, "error": f"{type(error).__name__}: {error}"[:120]}
    finally:
        launch._launch = original
    flops = 4 * TOKENS * seqlen * WIDTH * (0.5 if job.causal else 1.0) * (1.0 if job.kernel == "forward" else 2.5)
    return {**job._asdict(), "seqlen": seqlen, "ms": ms, "tflops": flops / ms / 1e9}


def main(
    kernels: Annotated[str, typer.Option(help="Comma-separated kernels.")] = ",".join(KERNELS),
    dims: Annotated[str, typer.Option(help="Comma-separated head dimensions.")] = "64,128,256",
    out: Annotated[Path, typer.Option(help="Where the rows go, as JSON.")] = Path("tune.json"),
    processes: Annotated[int, typer.Option(help="Processes that compile ahead.")] = 8,
) -> None:
    """Times candidate tiles on this machine's GPU and prints the fastest of each cell."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    global TARGET
    TARGET = launch.target_of(torch.device("cuda", torch.cuda.current_device()))
    candidates = jobs(kernels.split(","), [int(dim) for dim in dims.split(",")])
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        errors = list(track(pool.imap(compile_ahead, candidates), "compiling", total=len(candidates)))
    rows = [{**job._asdict(), "error": error} for job, error in zip(candidates, errors) if error]
    fit = [job for job, error in zip(candidates, errors) if error is None]
    for job, seqlen in track(list(itertools.product(fit, (8192, 2048))), "timing"):
        rows.append(measure(job, seqlen))
    out.write_text(json.dumps(rows, indent=1))
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: (*_cell(row), row["ms"]))
    for cell, group in itertools.groupby(timed, _cell):
        print(*cell, "|", "  ".join(f"{tuple(row['tile'])} {row['tflops']:.0f}" for row in list(group)[:5]))


def _cell(row: dict) -> tuple:
    return row["kernel"], row["dim"], row["seqlen"], row["causal"]


if __name__ == "__main__":
    typer.run(main)
