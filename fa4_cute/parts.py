"""What the kernels of both architectures are handed: TMA maps, and what they write by ordinary stores."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_cute.ranges import Span


class Maps(NamedTuple):
    """TMA copies with the coordinate tensors that they read or write."""

    q: cute.CopyAtom
    m_q: cute.Tensor
    k: cute.CopyAtom
    m_k: cute.Tensor
    v: cute.CopyAtom
    m_v: cute.Tensor
    out: cute.CopyAtom
    m_out: cute.Tensor


class Outputs(NamedTuple):
    """What the kernel writes by ordinary stores, and the counter that items are drawn from."""

    out: cute.Tensor
    lse: cute.Tensor
    counter: cute.Tensor | None
    counts: cute.Tensor | None


@cute.jit
def count_row(
    counts: cute.Tensor,
    varlen: cutlass.Constexpr[bool],
    row: Int32,
    head: Int32,
    batch: Int32,
    span: Span,
    skips: Int32,
):
    """For tests: key tiles visited and rescales skipped of a row, whose thread calls it."""
    of_row = counts[head, row, None] if const_expr(varlen) else counts[batch, head, row, None]
    of_row[0] = span.end - span.begin
    of_row[1] = skips
