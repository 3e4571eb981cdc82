"""Device memory that outlives the call that makes it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor


def make_lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """make()'s tensor, from the allocator's general memory, made on the current stream of `device`.

    A thread can be made to allocate from a private pool although no stream of its captures: `torch.cuda.use_mem_pool`,
    and the warm-up of `torch.compile(mode="reduce-overhead")`. The latter, on its way to the CUDA graph, gives away
    whatever of its pool is no result of the compiled function, also under a tensor that somebody kept. The pool is the
    thread's alone (in every PyTorch from 2.9 on), so another thread makes the tensor, which costs some 100
    microseconds. A pool of our own would not help: which of two that are entered counts differs between versions.
    """
    stream = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.stream(torch.cuda.current_stream(device))

    def apart() -> Tensor:
        with stream:
            return make()

    with ThreadPoolExecutor(1) as other:
        return other.submit(apart).result()
