"""Making the results of calls: contiguous tensors, uninitialised, at little host time."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

UNREAD = 2**18
"""Bytes that a device keeps for results that nobody reads."""

_making = threading.Lock()
_guards = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]
_empty_strided_cuda = getattr(_guards, "_empty_strided_cuda", None)
"""What code compiled by PyTorch allocates with, at a third of what `torch.empty` costs; private to PyTorch."""


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))


def allocator(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_read: bool = True
) -> Callable[[], Tensor]:
    """A function that makes such a contiguous tensor; a CUDA `device` must be the current one, here and in its calls.

    is_read: whether anybody reads the tensor. A small one that nobody does is not made: all such lie in the same
    memory, where launches on several streams, or in CUDA graphs, may write at once.
    """
    size = math.prod(shape) * dtype.itemsize
    if not is_read and size <= UNREAD and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        unread = _unread(device)[:size].view(dtype).view(shape)
        return lambda: unread
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return functools.partial(_empty_strided_cuda, tuple(shape), contiguous_stride(shape), dtype)
    return functools.partial(torch.empty, tuple(shape), dtype=dtype, device=device)


def _unread(device: torch.device) -> Tensor:
    with _making:  # or two threads would have one each, of which one is forgotten
        return _make_unread(device)


@functools.cache
def _make_unread(device: torch.device) -> Tensor:
    from fa4_core.lasting import make_lasting  # no import of `dispatch` needs it

    def make() -> Tensor:
        made = torch.empty(UNREAD, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            # Once: other streams write there, too, which must not come before the last use of what lay there until now.
            torch.cuda.current_stream(device).synchronize()
        return made

    return make_lasting(make, device)
