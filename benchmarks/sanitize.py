"""Runs kernels under NVIDIA's compute-sanitizer and records its findings: `python -m benchmarks.sanitize`.

memcheck looks for accesses outside of what was allocated, racecheck for shared memory that threads use in no order.
Each set of calls runs in a process of its own, twice: first as it is, so that kernels are compiled, then under the
tool. The record, JSON, has for each set the tool's summary and how many results were right by float64. The exit status
is 1 where the tool found something or a result was wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from dispatch import attention, attention_with_kvcache
from fa4_core import backends
from fa4_core.bench.results import provenance
from fa4_core.checks import Report, compare_all, expected, run
from fa4_core.commands.machine import default_device
from fa4_core.strategies import Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CUDA_FOLDER = Path("/usr/local/cuda/bin")
OPTIONS = ("--report-api-errors", "no")
"""PyTorch asks the driver questions that it expects to fail."""
TOOLS = ("memcheck", "racecheck")
BACKENDS = ("triton", "cute")
HEADS_KV = 2
BF16, FP16 = torch.bfloat16, torch.float16
WILD = 2**31 - 1


@dataclass(frozen=True)
class CacheStep:
    """A call on KV caches of `capacity` keys a sequence. page: rows of a page, 0 for none. appended: new rows.

    wild: one length and two page numbers are far outside of the cache; kernels clamp them.
    """

    lengths: tuple[int, ...]
    head_dim: int
    group: int
    capacity: int
    page: int = 0
    seqlen_q: int = 1
    appended: int = 0
    wild: bool = False
    sink: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case(BF16, 128, 128, 8, 2, ((257, 700),) * 2, causal=True),
    # More work items than a GPU has multiprocessors: blocks take several.
    Case(FP16, 64, 64, 90, 90, ((70, 401),) * 2, window=(190, 20)),
    Case(BF16, 64, 64, 4, 1, ((1, 130), (0, 9), (70, 70), (200, 333)), varlen=True, tail=(3, 2), causal=True,
         sink="normal"),
    Case(FP16, 96, 96, 2, 2, ((77, 261),), softcap=5.0),
    Case(BF16, 256, 256, 4, 2, ((130, 190),), causal=True, softcap=50.0, sink="normal", sink_dtype=BF16),
    # Rows long enough for the kernel that is specialised for them.
    Case(BF16, 192, 128, 1, 1, ((65, 4100),), causal=True),
    Case(FP16, 80, 48, 2, 1, ((130, 65), (63, 300)), varlen=True, used=((129, 0), (65, 299)), window=(64, None),
         storage="odd_stride"),
)  # fmt: skip
STEPS = (
    CacheStep((2500, 0, 65), 128, 4, capacity=2501, options={"causal": True}),
    CacheStep((0, 300, 17), 64, 8, capacity=320, page=16, wild=True, options={"window": (310, None)}),
    CacheStep((600, 23), 256, 3, capacity=624, page=24, seqlen_q=2, appended=2, sink=True,
              options={"causal": True, "softcap": 30.0}),
)  # fmt: skip


class Set(NamedTuple):
    """Calls that one process makes under one tool."""

    tool: str
    backend: str
    calls: tuple[Case | CacheStep, ...]
    backward: bool = False


SETS = {
    "memcheck, Triton forward and backward, 7 cases, and 2 calls on caches": Set(
        "memcheck", "triton", CASES + STEPS[1:], backward=True
    ),
    "memcheck, forward of cute, 7 cases": Set("memcheck", "cute", CASES),
    "memcheck, decode kernel of cute, 3 calls": Set("memcheck", "cute", STEPS),
    "racecheck, forward of cute, 4 cases": Set("racecheck", "cute", (*CASES[:3], CASES[4])),
    "racecheck, decode kernel of cute, 3 calls": Set("racecheck", "cute", STEPS),
}


def check(call: Case | CacheStep, backend: str, device: torch.device, backward: bool = False) -> Report:
    """Makes a call on the device and compares its results with float64, on the CPU: the tool watches kernels alone."""
    if isinstance(call, CacheStep):
        return _check_step(call, backend, device)
    return _check_case(call, backend, device, backward)


def _check_case(case: Case, backend: str, device: torch.device, backward: bool) -> Report:
    q, k, v, options, dout, dlse = case.build(device)
    if backward:
        got = run(attention, q, k, v, dout=dout, dlse=dlse, backend=backend, **options)
    else:
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **options)
        got = {"out": out, "lse": lse}
    q, k, v, options, dout, dlse = case.build("cpu")
    arriving = {"dout": dout, "dlse": dlse} if backward else {}
    return compare_all({name: result.cpu() for name, result in got.items()}, expected(q, k, v, **arriving, **options))


def _check_step(step: CacheStep, backend: str, device: torch.device) -> Report:
    random = torch.Generator().manual_seed(0)
    batch = len(step.lengths)
    rows = step.page or step.capacity
    per_sequence = step.capacity // rows
    blocks = batch * per_sequence

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, step.head_dim, generator=random).to(BF16)

    q = drawn(batch, step.seqlen_q, HEADS_KV * step.group)
    k_cache, v_cache = (drawn(blocks, rows, HEADS_KV) for _ in range(2))
    new = [drawn(batch, step.appended, HEADS_KV) for _ in range(2)] if step.appended else []
    table = torch.randperm(blocks, generator=random) if step.page else torch.arange(blocks)
    table, lengths = table.view(batch, per_sequence).to(torch.int32), torch.tensor(step.lengths, dtype=torch.int32)
    if step.wild:
        lengths[0], table[0, 0], table[1, 3] = WILD, WILD, -7
    options = step.options | ({"sink": torch.randn(q.shape[2], generator=random)} if step.sink else {})

    whole = [cache[table.clamp(0, blocks - 1).long()].flatten(1, 2) for cache in (k_cache, v_cache)]
    used = lengths.clamp(0, step.capacity)
    for full, fresh in zip(whole, new):
        for i, start in enumerate(used.tolist()):
            full[i, start : start + step.appended] = fresh[i]
    want = expected(q, *whole, seqused_k=used + step.appended, **options)

    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    tensors = [tensor.to(device) for tensor in (q, k_cache, v_cache, *new)]
    pages = table.to(device) if step.page else None
    out, lse = attention_with_kvcache(
        *tensors, cache_seqlens=lengths.to(device), page_table=pages, return_lse=True, backend=backend, **moved
    )
    return compare_all({"out": out.cpu(), "lse": lse.cpu()}, want)


def make_calls(chosen: Set, device: torch.device) -> None:
    """Makes a set's calls and prints what became of each: the part that runs under the tool."""
    for call in chosen.calls:
        try:
            report = check(call, chosen.backend, device, chosen.backward)
            print("right" if report.passed else f"wrong: {call}\n{report}", flush=True)
        except Exception as error:  # after a bad access every later call raises, too
            print(f"wrong: {call}\n{type(error).__name__}: {error}", flush=True)


def find_sanitizer() -> str:
    """Where compute-sanitizer is.

    Raises:
        typer.BadParameter: it is neither on PATH nor where CUDA is installed by default.
    """
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA_FOLDER)
    if found is None:
        raise typer.BadParameter(f"needs compute-sanitizer, of the CUDA toolkit, on PATH or in {CUDA_FOLDER}")
    return found


def finding(output: str, calls: int) -> dict[str, Any]:
    """A set's entry in the record, by what a run under the tool printed; with its end where something is not right."""
    summaries = [line.strip() for line in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)]
    summaries.sort(key=lambda line: "SUMMARY: 0 " in line)  # of processes that found something, first
    right = len(re.findall(r"^right$", output, re.MULTILINE))
    found = {
        "summary": summaries[0] if summaries else "none: the tool did not end",
        "results wrong": calls - right,
        "results right": right,
    }
    return found if is_clean(found) else found | {"output": output.splitlines()[-60:]}


def is_clean(found: dict[str, Any]) -> bool:
    """Whether an entry of the record says that nothing was found and every result was right."""
    return re.search(r"SUMMARY: 0 ", found["summary"]) is not None and not found["results wrong"]


def run_set(title: str, sanitizer: str, limit: float) -> dict[str, Any]:
    """Runs a set as it is and under its tool, each for at most `limit` seconds, and returns its entry."""
    chosen = SETS[title]
    # Each tensor has an allocation of its own, whose end the tool knows; contents of index tensors stay unread.
    settings = {name: value for name, value in os.environ.items() if name != "DISPATCH_CHECK"}
    settings["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [sys.executable, "-m", "benchmarks.sanitize", "--calls", title]
    output = ""
    for before in ([], [sanitizer, "--tool", chosen.tool, *OPTIONS]):
        output = _output_of([*before, *command], settings, limit)
    return finding(output, len(chosen.calls))


def _output_of(command: list[str], settings: dict[str, str], limit: float) -> str:
    """What a command prints, which is ended after `limit` seconds together with the processes that it started."""
    with subprocess.Popen(
        command, cwd=ROOT, env=settings, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            return process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0]


def sanitize(out: Path, titles: Iterable[str], sanitizer: str, jobs: int, limit: float) -> bool:
    """Runs sets, `jobs` at a time, writes the record, and returns whether all are clean."""
    titles = list(titles)
    with ThreadPoolExecutor(jobs) as pool:
        entries = dict(zip(titles, pool.map(lambda title: run_set(title, sanitizer, limit), titles)))
    content = {
        **provenance(default_device()),
        "tool": " ".join(("compute-sanitizer", *OPTIONS)),
        **entries,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    for title, found in entries.items():
        typer.echo(f"{title}: {found['summary']}, {found['results right']} right, {found['results wrong']} wrong")
    return all(map(is_clean, entries.values()))


def main(
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "sanitizers.json",
    tool: Annotated[list[str] | None, typer.Option(help="memcheck, racecheck; repeat. Default: both.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="triton, cute; repeat. Default: both.")] = None,
    jobs: Annotated[int, typer.Option(help="Sets that run at once.")] = len(SETS),
    limit: Annotated[float, typer.Option(help="Seconds that a run may take.")] = 300.0,
    calls: Annotated[str, typer.Option(hidden=True, help="Make a set's calls in this process.")] = "",
) -> None:
    """Runs kernels under compute-sanitizer and writes a record of what it finds."""
    for option, given, accepted in (("--tool", tool, TOOLS), ("--backend", backend, BACKENDS)):
        unknown = [name for name in given or () if name not in accepted]
        if unknown:
            raise typer.BadParameter(f"{option}: got {unknown[0]}, accepted are {', '.join(accepted)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here")
    device = default_device()
    if calls:
        make_calls(SETS[calls], device)
        return
    sanitizer = find_sanitizer()
    titles = []
    for title, chosen in SETS.items():
        why = backends.load(chosen.backend).unavailable(device)
        if chosen.tool in (tool or TOOLS) and chosen.backend in (backend or BACKENDS):
            titles += [title] if why is None else []
            typer.echo(f"{title}: {'running' if why is None else f'not run, the backend {why}'}")
    clean = sanitize(out, titles, sanitizer, jobs, limit)
    typer.echo(f"wrote {out}")
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
