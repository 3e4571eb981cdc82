"""Runs cases over contestants and turns what was measured into rows.

Every cell of the matrix is a row: with its measurements, or with `skipped` (why the contestant does not run it), or
with `error` (what it raised). Keys of a row, times being the median over the rounds:

suite, case, name    the cell
ms                   device time of one call (forward, backward, features, varlen, decode)
tflops               the FLOPs of the visible pairs over `ms` (forward, backward, features, varlen)
gb_per_s             bytes of the valid keys and values over `ms` (decode)
spread_pct           (slowest - fastest round) / median of `ms`, in percent
timing               how `ms` was taken: "graph", "events, ..." or "wall"
wall_us              host time of one call without autograd (forward, features, varlen, decode, host)
wall_grad_us         host time of one call that autograd records (host)
wall_step_us         host time of one recorded call and its backward (backward, host)
error_norm           ||x - float32|| / ||float32|| of the output; of the worst of dq, dk, dv in the backward
extra_mib            memory at the peak of a call beyond its inputs, results included (memory)
result_mib           what its results alone take: output and LSE (memory)
step_extra_mib       as extra_mib, of a recorded call and its backward (memory)
step_result_mib      as result_mib, of a recorded call and its backward: output, LSE and gradients (memory)
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa4_core.bench import timing
from fa4_core.bench.cases import Case, DecodeCase
from fa4_core.bench.contestants import Cache, Contestant, Function, make_cu_seqlens, make_sink

Row = dict[str, Any]
Samples = dict[str, timing.Sample]
"""Column of the row: what measures it."""

MIB = 2**20
HOST_CALLS = 100
WALL_CALLS = 5
"""Calls that a host time is taken over: many in the suite `host`, whose kernels are short, few in the others."""
MAX_ERROR_NORM = 2e-2
"""bf16 attention lies between 1e-3 and 1e-2 of float32: beyond this, something else was computed."""


FRESH_BYTES = 2 * 126 * MIB
"""Twice the largest L2 there is: with so many bytes of caches, no step finds in it what the one before left there."""


class Tensors(NamedTuple):
    """One case's inputs in (B, S, H, D), or packed in (total, H, D), and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """N(0, 1) inputs of the case."""
    generator = torch.Generator(device).manual_seed(seed)

    batch = (case.batch,) if case.mean_length is None else ()

    def normal(seqlen: int, heads: int, head_dim: int) -> Tensor:
        shape = (*batch, seqlen, heads, head_dim)
        return torch.randn(shape, device=device, dtype=case.torch_dtype, generator=generator)

    q, dout = (normal(case.seqlen_q, case.heads_q, dim) for dim in (case.head_dim, case.head_dim_v))
    k, v = (normal(case.seqlen_k, case.heads_kv, dim) for dim in (case.head_dim, case.head_dim_v))
    return Tensors(q, k, v, dout)


def make_cache(case: DecodeCase, device: torch.device, seed: int = 0) -> Cache:
    """N(0, 1) queries, keys and values; pages in random order. Rows past the lengths are zero: some peers show them."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
    rows = case.page or case.room
    pages = case.batch * case.room // rows
    k, v = (torch.zeros((pages, rows, case.heads_kv, case.head_dim), **options) for _ in range(2))
    order = torch.randperm(pages, generator=generator, device=device)
    table = order.to(torch.int32).view(case.batch, -1) if case.page else None
    for i, length in enumerate(case.lengths):
        blocks = [i] if table is None else order.view(case.batch, -1)[i, : -(-length // rows)].tolist()
        for block in blocks:
            for cache in (k, v):
                cache[block, : min(length, rows)].normal_(generator=generator)
    q = torch.randn((case.batch, 1, case.heads_q, case.head_dim), generator=generator, **options)
    return Cache(q, k, v, torch.tensor(case.lengths, dtype=torch.int32, device=device), table)


class Entry:
    """A contestant on one case: its function, and the inputs in its layout."""

    def __init__(self, contestant: Contestant, case: Case, tensors: Tensors) -> None:
        self.contestant = contestant
        self._function: Function = contestant.function(case)
        *self._inputs, self._dout = (t.transpose(1, 2) if contestant.heads_first else t for t in tensors)
        self._leaves = self._new_leaves()

    def _new_leaves(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in self._inputs]

    def forward(self) -> Tensor:
        """One call, without autograd."""
        with torch.no_grad():
            return self._function(*self._inputs)

    def recorded(self) -> Tensor:
        """One call that autograd records."""
        return self._function(*self._leaves)

    def step(self) -> tuple[Tensor, ...]:
        """One recorded call and its backward."""
        return torch.autograd.grad(self.recorded(), self._leaves, self._dout)

    def make_backward(self) -> timing.Call:
        """Runs the forward, and returns the call of the backward alone.

        It has leaves of its own: their nodes in the graph stay on the stream that is current now, and `step`, which may
        run on another, would wait for it, with a warning from PyTorch.
        """
        leaves = self._new_leaves()
        out = self._function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self._dout, retain_graph=True)

    def results(self, backward: bool) -> list[Tensor]:
        """Output, or gradients of q, k and v, in (B, S, H, D)."""
        results = self.step() if backward else (self.forward(),)
        return [t.transpose(1, 2) if self.contestant.heads_first else t for t in results]


def float32_results(attention: Callable, case: Case, tensors: Tensors, backward: bool) -> list[Tensor]:
    """Output, or gradients of q, k and v, of the reference backend on the same values in float32."""
    q, k, v, dout = (t.detach().float() for t in tensors)
    leaves = [t.requires_grad_(backward) for t in (q, k, v)]
    sink, cu_seqlens = make_sink(case, q.device), make_cu_seqlens(case, q.device)
    out = attention(
        *leaves, causal=case.causal, window=(case.window, None), softcap=float(case.softcap), sink=sink,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, backend="reference",
    )  # fmt: skip
    return list(torch.autograd.grad(out, leaves, dout)) if backward else [out]


def float32_step(attention: Callable, case: DecodeCase, cache: Cache) -> dict[int, Tensor]:
    """Output (1, 1, Hq, D) of the longest and the last sequence, by number, of the reference backend in float32."""
    expected = {}
    for i in {case.lengths.index(max(case.lengths)), case.batch - 1}:
        k, v = (
            (t[i] if cache.page_table is None else t[cache.page_table[i].long()].flatten(0, 1))[None, : case.lengths[i]]
            for t in (cache.k, cache.v)
        )
        expected[i] = attention(cache.q[i : i + 1].float(), k.float(), v.float(), backend="reference")
    return expected


def error_norm(results: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    """The largest ||result - reference|| / ||reference||; NaN where a result holds a NaN."""
    norms = [((t.float() - ref).norm() / ref.norm()).item() for t, ref in zip(results, references)]
    return math.nan if any(map(math.isnan, norms)) else max(norms)


class Bench:
    """Measures cases with one timer, device and number of rounds."""

    def __init__(
        self,
        timer: timing.Timer,
        device: torch.device,
        rounds: int = 5,
        reference: Callable | None = None,
    ) -> None:
        """`reference`: `dispatch.attention`, to check every contestant's result on every case; None checks nothing."""
        self._timer = timer
        self._device = device
        self._rounds = rounds
        self._reference = reference
        self._suites: dict[str, Callable[[Entry, Case, Row], Samples]] = {
            "forward": self._forward,
            "features": self._forward,
            "varlen": self._forward,
            "backward": self._backward,
            "memory": self._memory,
            "host": self._host,
        }

    def run(
        self,
        suite: str,
        cases: Iterable[Case | DecodeCase],
        contestants: Mapping[str, Contestant],
        deadline: float = math.inf,
    ) -> Iterator[list[Row]]:
        """Yields the rows of one case after another, one row a contestant.

        Args:
            suite: "forward", "backward", "features", "varlen", "decode", "memory" or "host".
            cases: what to measure.
            contestants: by name.
            deadline: on `time.monotonic`'s clock; a case that would start later is skipped, and its rows say so.
        """
        for case in cases:
            rows = {name: {"suite": suite, "case": case.name, "name": name} for name in contestants}
            if time.monotonic() > deadline:
                for row in rows.values():
                    row["skipped"] = "the time budget was spent"
            elif suite == "memory" and self._device.type != "cuda":
                for row in rows.values():
                    row["skipped"] = "device memory is measured on CUDA devices"
            else:
                if isinstance(case, DecodeCase):
                    self._run_decode(case, contestants, rows)
                else:
                    self._run_case(suite, case, contestants, rows)
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            yield list(rows.values())

    def _run_case(self, suite: str, case: Case, contestants: Mapping[str, Contestant], rows: dict[str, Row]) -> None:
        backward = suite == "backward"
        runners = []
        for name, contestant in contestants.items():
            why = contestant.unavailable(self._device) or contestant.refusal(case, backward)
            if why is None:
                runners.append(name)
            else:
                rows[name]["skipped"] = why
        if not runners:
            return
        tensors = make_tensors(case, self._device)
        references = None
        if self._reference is not None and suite in ("forward", "backward", "features", "varlen"):
            references = float32_results(self._reference, case, tensors, backward)
        samples: dict[tuple[str, str], timing.Sample] = {}
        for name in runners:
            try:
                prepared = self._prepare(suite, case, contestants[name], tensors, references, rows[name])
            except Exception as error:  # one contestant that fails must not end the race; its row says what it raised
                rows[name]["error"] = _brief(error)
            else:
                samples |= {(name, column): _guarded(sample, rows[name]) for column, sample in prepared.items()}
        flops = case.backward_flops if backward else case.forward_flops
        self._measure(samples, rows, "tflops", flops / 1e9)

    def _measure(
        self, samples: dict[tuple[str, str], timing.Sample], rows: dict[str, Row], rate: str, work: float
    ) -> None:
        """Fills the rows' columns with the samples' medians; `rate` is `work` over `ms`."""
        for (name, column), series in timing.interleaved(samples, self._rounds).items():
            if "error" in rows[name]:
                continue
            rows[name][column] = statistics.median(series)
            if column == "ms":
                rows[name][rate] = work / rows[name]["ms"]
                rows[name]["spread_pct"] = 100 * (max(series) - min(series)) / rows[name]["ms"]

    def _run_decode(self, case: DecodeCase, contestants: Mapping[str, Contestant], rows: dict[str, Row]) -> None:
        runners = []
        for name, contestant in contestants.items():
            why = contestant.unavailable(self._device) or contestant.decode_refusal(case)
            if why is None:
                runners.append(name)
            else:
                rows[name]["skipped"] = why
        if not runners:
            return
        copies = -(-FRESH_BYTES // case.cache_bytes) if self._device.type == "cuda" else 1
        # A small cache is there for the host's time alone.
        caches = [make_cache(case, self._device, seed) for seed in range(min(copies, 16))]
        expected = None if self._reference is None else float32_step(self._reference, case, caches[0])
        samples: dict[tuple[str, str], timing.Sample] = {}
        for name in runners:
            contestant, row = contestants[name], rows[name]
            try:
                with contestant.context(), torch.no_grad():
                    step = contestant.decode(case)
                    if expected is not None:
                        out = step(caches[0])
                        row["error_norm"] = error_norm([out[i : i + 1] for i in expected], expected.values())
                        if not row["error_norm"] <= MAX_ERROR_NORM:
                            raise ArithmeticError(
                                f"wrong result: error_norm {row['error_norm']:.2g}, allowed {MAX_ERROR_NORM}"
                            )
                    turns = itertools.cycle(caches)
                    call = lambda step=step, turns=turns: step(next(turns))  # noqa: E731
                    prepared = {
                        "ms": self._device_time(lambda call=call: call, row),
                        "wall_us": lambda call=call: self._timer.host_us(call, HOST_CALLS),
                    }
            except Exception as error:  # as above: its row says what it raised
                row["error"] = _brief(error)
            else:
                for column, sample in prepared.items():
                    samples[name, column] = _guarded(_within(contestant, sample), row)
        self._measure(samples, rows, "gb_per_s", case.cache_bytes / 1e6)

    def _prepare(
        self,
        suite: str,
        case: Case,
        contestant: Contestant,
        tensors: Tensors,
        references: list[Tensor] | None,
        row: Row,
    ) -> Samples:
        with contestant.context():
            entry = Entry(contestant, case, tensors)
            if references is not None:
                row["error_norm"] = error_norm(entry.results(suite == "backward"), references)
                if not row["error_norm"] <= MAX_ERROR_NORM:
                    raise ArithmeticError(f"wrong result: error_norm {row['error_norm']:.2g}, allowed {MAX_ERROR_NORM}")
            samples = self._suites[suite](entry, case, row)

        return {column: _within(contestant, sample) for column, sample in samples.items()}

    def _device_time(self, make_call: timing.MakeCall, row: Row) -> timing.Sample:
        prepared = self._timer.prepare(make_call)
        row["timing"] = prepared.method
        return prepared.sample

    def _forward(self, entry: Entry, case: Case, row: Row) -> Samples:
        return {
            "ms": self._device_time(lambda: entry.forward, row),
            "wall_us": lambda: self._timer.host_us(entry.forward, WALL_CALLS),
        }

    def _backward(self, entry: Entry, case: Case, row: Row) -> Samples:
        return {
            "ms": self._device_time(entry.make_backward, row),
            "wall_step_us": lambda: self._timer.host_us(entry.step, WALL_CALLS),
        }

    def _host(self, entry: Entry, case: Case, row: Row) -> Samples:
        calls: dict[str, timing.Call] = {"wall_us": entry.forward}
        if entry.contestant.refusal(case, backward=True) is None:
            calls |= {"wall_grad_us": entry.recorded, "wall_step_us": entry.step}
        else:
            row["no_backward"] = entry.contestant.refusal(case, backward=True)
        for call in calls.values():
            call()
        return {column: lambda call=call: self._timer.host_us(call, HOST_CALLS) for column, call in calls.items()}

    def _memory(self, entry: Entry, case: Case, row: Row) -> Samples:
        out_bytes = case.batch * case.seqlen_q * case.heads_q * (case.head_dim_v * case.torch_dtype.itemsize + 4)
        gradient_bytes = case.forward_bytes - out_bytes
        row["result_mib"] = out_bytes / MIB
        samples: Samples = {"extra_mib": lambda: timing.peak_bytes(entry.forward) / MIB}
        why = entry.contestant.refusal(case, backward=True)
        if why is not None:
            row["no_backward"] = why
            return samples
        row["step_result_mib"] = (out_bytes + gradient_bytes) / MIB
        return samples | {"step_extra_mib": lambda: timing.peak_bytes(entry.step) / MIB}


def _within(contestant: Contestant, sample: timing.Sample) -> timing.Sample:
    """The sample, taken in the contestant's context."""

    def run() -> float:
        with contestant.context():
            return sample()

    return run


def _guarded(sample: timing.Sample, row: Row) -> timing.Sample:
    """The sample, or NaN from the first time on that it raised; the row then holds the error."""

    def run() -> float:
        if "error" in row:
            return math.nan
        try:
            return sample()
        except Exception as error:
            row["error"] = _brief(error)
            return math.nan

    return run


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: {lines[0]}"[:400]
