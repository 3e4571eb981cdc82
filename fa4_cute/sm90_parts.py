"""What the roles of the SM90 forward hand each other: work items, rings, shared memory, a consumer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32

from fa4_cute.params import Values
from fa4_cute.pipelines import Ring
from fa4_cute.ranges import Span
from fa4_cute.schedule import Sequence, WorkItem
from fa4_cute.softcap import Cap


class Item(NamedTuple):
    """A published work item, as consumers read it."""

    valid: Boolean
    work: WorkItem
    sequence: Sequence
    span: Span


class Rings(NamedTuple):
    items: Ring
    q: Ring
    k: Ring
    v: Ring


class Shared(NamedTuple):
    """Shared memory: published items, and tiles with their slots in the last mode."""

    items: cute.Tensor
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor


class State(NamedTuple):
    """What a consumer warpgroup holds: operands as wgmma takes them, accumulators and statistics of its rows."""

    group: Int32
    mma_s: cute.TiledMma
    mma_o: cute.TiledMma
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    p: cute.Tensor
    acc_s: cute.Tensor
    acc_o: cute.Tensor
    pivot: cute.Tensor
    row_sum: cute.Tensor
    skips: cute.Tensor
    rings: Any
    values: Values
    cap: Cap | None
