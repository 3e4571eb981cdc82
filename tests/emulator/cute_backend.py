"""The project's CuTe DSL kernels on CPU tensors: compiled for a GPU, run in the emulator, behind the project's own API.

Inside `emulated_cute("sm_100a")`, `dispatch.attention(q, k, v, backend="cute")` on CPU tensors checks, pads and
differentiates as on a GPU; each forward compiles for that architecture and runs here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cute_compile import Request, compile_kernel
from .cute_host import HostFunction
from .errors import RaceError
from .launcher import load_program
from .machine import Result
from .patching import replaced
from .program import Program

FACTORIES = {"sm_90a": "fa4_cute.sm90_forward:Sm90Forward", "sm_100a": "fa4_cute.sm100_forward:Sm100Forward",
             "sm_103a": "fa4_cute.sm100_forward:Sm100Forward"}  # fmt: skip
MAX_DYNAMIC_SHARED = 232448


@functools.lru_cache(maxsize=64)
def kernel(request: Request) -> tuple[Program, HostFunction]:
    """A compiled kernel, ready to run."""
    kept = compile_kernel(request)
    program = load_program(kept.ptx)
    return program, HostFunction(kept.ir, program.kernel.name)


def run(request: Request, arguments: list[Any], *, seed: int = 0, program: Program | None = None, **machine) -> Result:
    """Calls a kernel's host function. program: runs in place of the compiled one. machine: options of `Machine`."""
    compiled, host = kernel(request)
    machine.setdefault("dynamic_shared", MAX_DYNAMIC_SHARED)
    return host.call(program or compiled, arguments, seed=seed, **machine)


def request_of(problem, inputs, arch: str, config: Any = None, counted: bool = False) -> Request:
    """What is compiled for a checked problem; config: the kernel's own type, None for its choice."""
    sink_dtype = None if inputs.sink is None else inputs.sink.dtype
    return Request(arch, FACTORIES[arch], (problem.kinds, config, counted), (problem.kinds, sink_dtype, counted))


def forward(
    problem,
    inputs,
    arch: str,
    config: Any = None,
    *,
    counted: bool = False,
    programs: int = 2,
    seed: int = 0,
    observe: Callable[[Request, Result], None] | None = None,
    **machine,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Out, LSE and counts (rows' key tiles visited and rescales skipped) of a checked problem, on `programs` blocks."""
    from fa4_cute import kernels

    kinds = problem.kinds
    out = torch.full(problem.out_shape, math.nan, dtype=inputs.q.dtype)
    lse = torch.full(problem.lse_shape, math.nan)
    counts = torch.full((*problem.lse_shape, 2), -1, dtype=torch.int32) if counted else None
    counter = torch.zeros(2, dtype=torch.int32) if kernels.drawn(kinds) else None
    scale = problem.softcap if kinds.softcap else problem.softmax_scale
    arguments = [
        inputs.q, inputs.k, inputs.v, out, lse, inputs.sink, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        inputs.seqused_q, inputs.seqused_k, scale * math.log2(math.e),
        problem.softmax_scale / problem.softcap if kinds.softcap else None,
        problem.window_left if kinds.window_left else None, problem.window_right if kinds.window_right else None,
        problem.rescale_threshold, 4, programs, counter, counts,
    ]  # fmt: skip
    if problem.total_q > 0 and problem.batch > 0:
        chosen = config or kernels.config(kinds, arch)
        machine.setdefault("dynamic_shared", chosen.shared_bytes)
        machine.setdefault("tolerate", ())
        request = request_of(problem, inputs, arch, config, counted)
        result = run(request, arguments, seed=seed, **machine)
        if observe is not None:
            observe(request, result)
    else:
        out.zero_()
        lse.fill_(-math.inf)
    if counter is not None and counter.any():
        raise AssertionError(f"the launch left its counter at {counter.tolist()}")
    return out, lse, counts


@contextmanager
def emulated_cute(
    arch: str,
    *,
    config: Any = None,
    programs: int = 2,
    seed: int = 0,
    observe: Callable[[Request, Result], None] | None = None,
    **machine,
) -> Iterator[None]:
    """Runs the `cute` backend's forward for `arch` on a device of `programs` multiprocessors, by its own host code.

    Replaced are only the questions which device this is and the compiled kernel itself; the rest as `forward` has it.
    """
    import fa4_cute
    from fa4_core import ops
    from fa4_cute import kernels, launch

    counters: list[Tensor] = []

    def counter(device) -> Tensor:
        counters.append(torch.zeros(2, dtype=torch.int32))
        return counters[-1]

    def compiled(kinds, sink_dtype, counted, device):
        return [form(kinds, sink_dtype, counted, long) for long in (False, True)]

    def form(kinds, sink_dtype, counted, long):
        chosen = config or kernels.config(kinds, arch, long)
        # Requests of the usual form name none: the kernel's own choice, which other tests have compiled, too.
        given = chosen if long and len(kernels.forms(kinds, arch)) > 1 else config
        request = Request(arch, FACTORIES[arch], (kinds, given, counted), (kinds, sink_dtype, counted))
        options = {"dynamic_shared": chosen.shared_bytes, "tolerate": (), **machine}

        def call(*arguments) -> None:
            result = run(request, list(arguments), seed=seed, **options)
            if observe is not None:
                observe(request, result)
            if any(each.any() for each in counters):
                raise AssertionError("a launch left its counter other than zero")

        return call

    places: dict[tuple[Any, str], Any] = {
        (fa4_cute, "_unavailable"): lambda device: None,
        (kernels, "architecture"): lambda device: arch,
        (kernels, "config"): (lambda kinds, arch, long=False: config) if config else kernels.config,
        (launch, "_kernels"): compiled,
        (launch, "_prepared"): launch._prepared.__wrapped__,
        (ops, "_call_of"): ops._call_of.__wrapped__,
        (ops, "_last"): ops._NO_CALL,
        (launch, "_counter"): counter,
        (torch.cuda, "get_device_properties"): lambda device: SimpleNamespace(multi_processor_count=programs),
    }
    with replaced(places):
        yield


@contextmanager
def emulated_cute_decode(arch: str, *, programs: int = 3, seed: int = 0, **machine) -> Iterator[list[Request]]:
    """Runs the `cute` backend's calls on KV caches for `arch`, on a device of `programs` multiprocessors.

    Gives the kernels that ran. What a call appends is the `triton` backend's to write, so none may.
    """
    import fa4_cute
    from fa4_core import kvcache
    from fa4_cute import decode_launch, kernels
    from fa4_cute.decode_config import config_for

    ran: list[Request] = []

    def compiled(kinds, sink_dtype, device):
        request = Request(arch, "fa4_cute.decode:Decode", (kinds,), (sink_dtype,))
        # Of a tile that ends past its sequence, keys that nobody brought are read, as NaNs here, and then hidden.
        options = {"dynamic_shared": config_for(kinds).shared_bytes, "tolerate": ("uninitialised read",), **machine}

        def call(*arguments) -> None:
            result = run(request, list(arguments), seed=seed, **options)
            ran.append(request)
            # Nothing else that is unwritten may be read: matrix products alone read by ldmatrix.
            unwritten = [note for note in result.notes if note.startswith("uninitialised read")]
            if not all("ldmatrix reads" in note for note in unwritten):
                raise RaceError("\n".join(unwritten))
            if arguments[-1].any():
                raise AssertionError("a launch left its counters other than zero")

        return call

    places: dict[tuple[Any, str], Any] = {
        (fa4_cute, "_unavailable"): lambda device: None,
        (kernels, "architecture"): lambda device: arch,
        (decode_launch, "_kernel"): compiled,
        (decode_launch, "_call_of"): decode_launch._call_of.__wrapped__,
        (kvcache, "_call_of"): kvcache._call_of.__wrapped__,
        (torch.cuda, "get_device_properties"): lambda device: SimpleNamespace(multi_processor_count=programs),
    }
    with replaced(places):
        yield ran
