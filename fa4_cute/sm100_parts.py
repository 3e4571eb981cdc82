"""What the roles of the SM100 forward hand each other: TMA maps, rings, shared memory, operands, work items."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_cute.params import Values
from fa4_cute.pipelines import Ring
from fa4_cute.ranges import Span
from fa4_cute.schedule import Sequence, WorkItem
from fa4_cute.sm100_rings import MmaRing, Signal
from fa4_cute.sm100_tmem import TmemRows


class Rings(NamedTuple):
    items: Ring
    q: MmaRing
    s: MmaRing
    p_rest: Signal
    o: Signal
    scales: Ring
    out: Ring
    factor: Signal
    control: Ring
    kv: MmaRing


class Shared(NamedTuple):
    """Shared memory; slots or Q tiles are the last mode. answer: 16 bytes that launch control writes."""

    answer: cute.Pointer
    items: cute.Tensor
    factor: cute.Tensor
    scale: cute.Tensor
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor


class Operands(NamedTuple):
    """What the MMAs read and write; s, p and o have an entry a Q tile, s and p of a single one an entry a place."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    s: list
    p: list
    o: list


class Item(NamedTuple):
    """A work item: key tiles `[begin, end)` are loaded; `upper` and `lower` are those of Q tile 0 and of Q tile 1."""

    valid: Boolean
    work: WorkItem
    sequence: Sequence
    begin: Int32
    end: Int32
    upper: Span
    lower: Span

    def span(self, i: int) -> Span:
        """The key tiles that Q tile i visits."""
        return self.upper if i == 0 else self.lower


class Place(NamedTuple):
    """A softmax thread's row. use: 0 if the tensors have no such row, 1 if it takes no part (seqused_q), else 2."""

    row: Int32
    head: Int32
    batch: Int32
    use: Int32


class SoftmaxState(NamedTuple):
    """What stays the same over a softmax thread's tiles. factor: where its row's goes, and the barrier it is behind."""

    i: Int32
    row: Int32
    factor: cute.Tensor
    factor_barrier: cute.Pointer
    tmem: TmemRows
    rings: Rings
    values: Values
