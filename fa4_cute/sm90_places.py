"""Which query rows a consumer warpgroup and its threads of the SM90 forward hold, and the key tiles that they see."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_core.problem import Kinds
from fa4_cute.params import Values
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import WorkItem
from fa4_cute.sm90_config import WARPGROUP, Sm90Config
from fa4_cute.sm90_parts import Item


def first_position(config: Sm90Config, group: Int32, work: WorkItem) -> Int32:
    """Position within the sequence of a warpgroup's first row."""
    return work.tile * config.positions + group * config.group_positions


def place(config: Sm90Config, group: Int32, work: WorkItem, r: int) -> tuple[Int32, Int32]:
    """Position within the sequence and query head of the thread's row r; row 1 is 8 rows below row 0.

    `packed` is a power of two, so 16 rows, and 8, are whole positions or parts of one: the quotients add up.
    """
    packed = config.packed
    thread, _, _ = cute.arch.thread_idx()
    within = thread % WARPGROUP
    of_warp, of_lane = within // 32 * 16, within % 32 // 4
    position = first_position(config, group, work) + of_warp // packed + of_lane // packed
    head = work.head * packed + (of_warp + of_lane) % packed
    return position + 8 * r // packed, head + 8 * r % packed


@cute.jit
def own_span(
    kinds: cutlass.Constexpr[Kinds], config: cutlass.Constexpr[Sm90Config], group: Int32, item: Item, values: Values
) -> Span:
    """The key tiles that a warpgroup's own rows see, of the item's; one at least.

    Rows further up see fewer tiles on the right, rows further down fewer on the left; for 128 rows, two at most.
    """
    if const_expr(not kinds.uneven):
        return item.span
    sequence = item.sequence
    window = Window(values.window_left, values.window_right)
    first = first_position(config, group, item.work)
    last = cutlass.min(first + config.group_positions, sequence.seqlen_q)
    own = key_span(first, last, sequence.seqlen_q, sequence.seqlen_k, window, config.tile_n)
    begin, full_begin, full_end, end = own
    if first >= last or end <= begin:  # no row of the sequence, or none that sees a key
        begin = item.span.begin
        full_begin, full_end, end = begin, begin, begin + 1
    return Span(begin, full_begin, full_end, end)
