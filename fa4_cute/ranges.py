"""Which keys a query tile sees: the span of key tiles it visits, and each row's first and last visible key.

Key j is visible to query i iff `i + shift - left <= j <= i + shift + right`, with `shift = seqlen_k - seqlen_q`
(bottom-right alignment) and j within the sequence; a side that is None is unbounded, causal is `right = 0`.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


class Span(NamedTuple):
    """Key tiles of one query tile, as tile indices: `[begin, end)` are visited, from the right to the left.

    Tiles of `[full_begin, full_end)` are seen whole by every row and need no mask; the others need one.
    """

    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32


class Window(NamedTuple):
    """Visible keys on each side of the diagonal; None is unbounded, and fixed when the kernel is compiled."""

    left: Int32 | None
    right: Int32 | None


@cute.jit
def visible_keys(row: Int32, seqlen_q: Int32, seqlen_k: Int32, window: Window) -> tuple[Int32, Int32]:
    """First visible key of a query row and the key after its last; empty where the second is not the larger."""
    diagonal = row + seqlen_k - seqlen_q
    first, end = Int32(0), seqlen_k
    if const_expr(window.left is not None):
        first = cutlass.max(diagonal - window.left, 0)
    if const_expr(window.right is not None):
        end = cutlass.min(diagonal + window.right + 1, seqlen_k)
    return first, end


@cute.jit
def key_span(
    row_begin: Int32, row_end: Int32, seqlen_q: Int32, seqlen_k: Int32, window: Window, tile_n: cutlass.Constexpr[int]
) -> Span:
    """The key tiles that the query rows `[row_begin, row_end)` visit; `begin == end` where they see no key."""
    first, full_last = visible_keys(row_begin, seqlen_q, seqlen_k, window)
    full_first, last = visible_keys(row_end - 1, seqlen_q, seqlen_k, window)
    begin = first // tile_n
    end = begin
    if last > first:
        end = cute.ceil_div(last, tile_n)
    full_end = cutlass.min(cutlass.max(cutlass.max(full_last, 0) // tile_n, begin), end)
    full_begin = cutlass.min(cutlass.max(cute.ceil_div(full_first, tile_n), begin), full_end)
    return Span(begin, full_begin, full_end, end)
