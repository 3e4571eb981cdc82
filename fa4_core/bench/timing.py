"""How a call is timed: kernel time through a CUDA graph, host time through a clock, peak memory.

Kernel time is that of a CUDA graph of `CALLS` calls, so launch gaps and Python stay out of it; the L2 cache is flushed
before every replay. Several calls are compared by `interleaved` rounds, each after a rest (`REST`), so that clocks and
heat treat all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch

CALLS = 20
"""Calls in one measurement. Their launches must stay well under the device's queue (1024), or the host would wait."""
WARMUP_CALLS = 3
REST = 6.0
"""How long the device rests before a measurement, over how long the last one took. Large products draw an H100 to its
power limit, which takes its clock from 1980 to some 1550 MHz and lets a kernel's time depend on what ran before: the
same calls spread over 10 % without the rest. With a rest of 3 they spread over 1 %, but for those of some 50 ms a
measurement (16k), which still did over 3 %."""

Call = Callable[[], object]
MakeCall = Callable[[], Call]
Sample = Callable[[], float]
"""One measurement; of device time, in milliseconds a call."""


class Prepared(NamedTuple):
    """A call ready to be measured again and again; `method` says how, for the result file."""

    sample: Sample
    method: str


class Timer(Protocol):
    """Turns a call into something that can be sampled."""

    def prepare(self, make_call: MakeCall) -> Prepared:
        """Runs `make_call` once, warms up the call that it returns, and gets it ready for sampling."""
        ...

    def host_us(self, call: Call, calls: int = CALLS) -> float:
        """Host time of one call in microseconds, over `calls` calls."""
        ...


class CudaTimer:
    """Kernel time on the current CUDA device, in milliseconds a call."""

    def __init__(self, calls: int = CALLS) -> None:
        """`calls`: how many calls one graph holds."""
        self.calls = calls
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
        self._last_ms = 0.0

    def prepare(self, make_call: MakeCall) -> Prepared:
        """Captures the call; one that cannot be captured is timed with events, and `method` says so."""
        stream = torch.cuda.Stream()
        # Autograd runs a backward on its forward's stream, so `make_call`, too, runs on the stream of the capture.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call = make_call()
            for _ in range(WARMUP_CALLS):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(self.calls):
                    call()
        except Exception as error:
            torch.cuda.synchronize()
            _leave_capture()
            return Prepared(lambda: self._time_events(call), f"events, not capturable: {type(error).__name__}")
        graph.replay()
        torch.cuda.synchronize()
        # The call is kept beside its graph: it owns the tensors whose addresses the graph holds.
        return Prepared(lambda call=call: self._time_graph(graph), "graph")

    def host_us(self, call: Call, calls: int = CALLS) -> float:
        """What the calls take to enqueue, not what the device takes to run them."""
        torch.cuda.synchronize()
        elapsed = _elapsed_us(call, calls)
        torch.cuda.synchronize()
        return elapsed

    def _time_graph(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._rest()
        self._flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        self._last_ms = start.elapsed_time(end)
        return self._last_ms / self.calls

    def _time_events(self, call: Call) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.calls)]
        self._rest()
        for start, end in pairs:
            self._flush.zero_()  # also keeps the device busy while the host launches the call
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in pairs]
        self._last_ms = sum(times)
        return statistics.median(times)

    def _rest(self) -> None:
        time.sleep(REST * self._last_ms / 1e3)


class WallTimer:
    """Time by the host's clock, for CPU tensors, whose calls return when they are done."""

    def __init__(self, calls: int = 1) -> None:
        """`calls`: how many calls one measurement holds."""
        self.calls = calls

    def prepare(self, make_call: MakeCall) -> Prepared:
        """Warms up with one call."""
        call = make_call()
        call()
        return Prepared(lambda: _elapsed_us(call, self.calls) / 1e3, "wall")

    def host_us(self, call: Call, calls: int = CALLS) -> float:
        """What the calls take from start to end, `self.calls` of them: on the CPU one is long enough."""
        return _elapsed_us(call, self.calls)


def _leave_capture() -> None:
    """Gives the device's random generator a state of its own again, which a failed capture leaves in capture.

    Seen: every later torch.randn on the device raised "Offset increment outside graph capture".
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _elapsed_us(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e6 / calls


def peak_bytes(call: Call) -> int:
    """Device memory that one call holds at its peak beyond what was allocated before, its results included."""
    call()  # what is set up once (handles, workspaces) is not a call's memory
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


Key = TypeVar("Key", bound=Hashable)


def interleaved(samples: Mapping[Key, Sample], rounds: int) -> dict[Key, list[float]]:
    """`rounds` measurements of each, one round after the other; every round starts with another one."""
    times: dict[Key, list[float]] = {key: [] for key in samples}
    keys = list(samples)
    for number in range(rounds):
        start = number % max(len(keys), 1)
        for key in keys[start:] + keys[:start]:
            times[key].append(samples[key]())
    return times
