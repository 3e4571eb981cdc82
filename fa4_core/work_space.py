"""Work space of the decode kernels: parts of a split, and counters that every launch leaves as it found them, at zero.

It is kept, by stream: a stream's launches follow one another. Any host thread may ask at any time, two on one stream
included. The common path takes no lock: it reads one entry of a dict, which is one operation, and an entry never
changes. What grows is a new entry, made under a lock; who still holds the old one, too small for the other but not for
itself, launches with it, on the stream that its memory goes back to.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fa4_core.lasting import make_lasting
from fa4_core.reserve import Reserve

ARRIVALS = 2**18
"""Counters that a stream's work space holds at first, and what is kept ready for captures: 1 MiB each."""


class _Space(NamedTuple):
    """One stream's work space, which its launches use one after the other, and its device's reserve."""

    parts: Tensor
    arrivals: Tensor
    reserve: Reserve


_spaces: dict[tuple[torch.device, int], _Space] = {}
_reserves: dict[torch.device, Reserve] = {}
_growing = threading.Lock()


def work_space(n_parts: int, n_arrivals: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 numbers, and zeroed int32 counters, which every launch leaves at zero: as many of each or more.

    They are the next launch's on the current stream of `device`, the current one, or in the capture that the stream is
    in.
    """
    if device.type != "cuda":
        return _new(n_parts, n_arrivals, device)
    if torch._C._cuda_isCurrentStreamCapturing():
        reserve = _reserves.get(device)
        taken = None if reserve is None else reserve.take(n_arrivals)
        if taken is None:
            return _new(n_parts, n_arrivals, device)
        return torch.empty(n_parts, dtype=torch.float32, device=device), taken
    return kept(n_parts, n_arrivals, device, torch._C._cuda_getCurrentRawStream(device.index))


def kept(n_parts: int, n_arrivals: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """`work_space` outside of captures; stream: the handle of the device's current one."""
    space = _spaces.get((device, stream))
    if space is None or not _holds(space, n_parts, n_arrivals) or space.reserve.is_low:
        space = _grow(n_parts, n_arrivals, device, stream)
    return space.parts, space.arrivals


def _new(n_parts: int, n_arrivals: int, device: torch.device) -> tuple[Tensor, Tensor]:
    parts = torch.empty(n_parts, dtype=torch.float32, device=device)
    return parts, torch.zeros(n_arrivals, dtype=torch.int32, device=device)


def _holds(space: _Space, n_parts: int, n_arrivals: int) -> bool:
    return space.parts.numel() >= n_parts and space.arrivals.numel() >= n_arrivals


def _grow(n_parts: int, n_arrivals: int, device: torch.device, stream: int) -> _Space:
    """Makes what is missing of a stream's entry and of the reserve; each is made once, whoever comes at that time."""
    with _growing:
        reserve = _reserves.get(device)
        if reserve is None:
            reserve = _reserves[device] = Reserve(device, ARRIVALS)
        reserve.fill()
        space = _spaces.get((device, stream))
        if space is None or not _holds(space, n_parts, n_arrivals):
            n_parts = max(n_parts, 0 if space is None else space.parts.numel())
            n_arrivals = max(n_arrivals, ARRIVALS if space is None else space.arrivals.numel())
            parts = make_lasting(lambda: torch.empty(n_parts, dtype=torch.float32, device=device), device)
            arrivals = make_lasting(lambda: torch.zeros(n_arrivals, dtype=torch.int32, device=device), device)
            space = _spaces[device, stream] = _Space(parts, arrivals, reserve)
        return space
