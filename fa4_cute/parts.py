"""What the kernels of both architectures are handed: TMA maps, and what they write by ordinary stores."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute


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
