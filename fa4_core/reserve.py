"""Zeroed counters for launches that a CUDA graph captures."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fa4_core.lasting import make_lasting


class Reserve:
    """Zeroed int32 counters for captured launches, each of which keeps its own: graphs may run beside anything else.

    Zeroing them in the graph would cost every replay some 2 microseconds a launch. They are made outside of captures,
    `room` of them ahead, and never given back: a graph's launch holds its counters for as long as the graph may live.

    is_low: whether `fill` would make new ones; kept up to date, since every launch asks.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self.room = room
        self.is_low = True
        self._device = device
        self._kept: list[Tensor] = []
        self._lock = threading.Lock()
        self.free = torch.empty(0, dtype=torch.int32, device=device)

    def fill(self) -> None:
        """Makes new counters where few are left. What was taken before stays: a graph has nothing but its address."""
        with self._lock:
            if self.is_low:
                self.free = make_lasting(self._zeros, self._device)
                self._kept.append(self.free)
                self.is_low = False

    def _zeros(self) -> Tensor:
        zeros = torch.zeros(self.room, dtype=torch.int32, device=self._device)
        if self._device.type == "cuda":
            # Once in many captures: no replay, on whatever stream, may come before the zeros.
            torch.cuda.current_stream(self._device).synchronize()
        return zeros

    def take(self, n: int) -> Tensor | None:
        """n counters that nobody else gets, or None where so many are not left."""
        with self._lock:
            if n > self.free.numel():
                return None
            taken, self.free = self.free[:n], self.free[n:]
            self.is_low = self.free.numel() < self.room // 2
            return taken
