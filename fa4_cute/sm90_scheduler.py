"""The scheduler warp of the SM90 forward, and how the other warps read what it publishes.

A work item is published word by word in a slot of shared memory, behind the ring `items`. The rows of a query tile that
sees no key are written here, since no other role works on it.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_core.problem import Kinds
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import Schedule, Sequence, WorkItem, draw, retire, sequence_of, start, take
from fa4_cute.sm90_config import Sm90Config
from fa4_cute.sm90_parts import Item
from fa4_cute.unseen import write_past_the_end, write_unseen

ITEM_WORDS = 13
ITEM_ROOM = 16
"""Words of shared memory that a slot has."""


@cute.jit
def read_item(s_items, ring, at):
    """The work item in a slot; the calling lane, each of which lets go of the slot by itself, has read it."""
    ring.wait(at)
    word = [s_items[i, at.index] for i in range(ITEM_WORDS)]
    return Item(word[0] != 0, WorkItem(*word[1:4]), Sequence(*word[4:9]), Span(*word[9:13]))


@cute.jit
def _publish(s_items, slot, words):
    for at in cutlass.range_constexpr(ITEM_WORDS):
        s_items[at, slot] = words[at]


class Scheduler:
    """The role, for the kinds and the config of one compiled kernel."""

    def __init__(self, kinds: Kinds, config: Sm90Config) -> None:
        self.kinds = kinds
        self.config = config

    @cute.jit
    def run(self, outputs, sink, shared, rings, lengths, extent, values):
        """The scheduler warp. Waits on the items' empty barriers and completes their full ones.

        Where items are drawn it draws the next one when the load warp is nearly through with the last, which is when
        that lets go of the only slot (`sm90_forward.DRAW_AHEAD`).
        """
        config = self.config
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        longest_first = self.kinds.window_left or self.kinds.window_right
        order = Schedule(lengths, extent, programs, config.positions, longest_first)
        window = Window(values.window_left, values.window_right)
        at = rings.items.start()
        valid, work, place = take(order, start(order), program, program)
        while valid:
            sequence = sequence_of(work.batch, lengths, extent)
            first = work.tile * config.positions
            last = cutlass.min(first + config.positions, sequence.seqlen_q)
            span = key_span(first, last, sequence.seqlen_q, sequence.seqlen_k, window, config.tile_n)
            if span.begin == span.end or first >= sequence.seqlen_q:
                end = cutlass.min(first + config.positions, sequence.rows_q)
                write_unseen(outputs, sink, self.kinds, config.packed, work, sequence, first, end)
            else:
                with cute.arch.elect_one():
                    _publish(shared.items, at.index, (Int32(1), *work, *sequence, *span))
                    rings.items.publish(at)
                at = rings.items.next(at)
                rings.items.acquire(at)
            index = None
            if const_expr(outputs.counter is not None):
                index = draw(outputs.counter, programs)
            valid, work, place = take(order, place, program, index)

        with cute.arch.elect_one():
            _publish(shared.items, at.index, (Int32(0),) * ITEM_WORDS)
            rings.items.publish(at)
        if const_expr(outputs.counter is not None):
            retire(outputs.counter, programs)
        if const_expr(self.kinds.varlen):
            write_past_the_end(outputs, self.kinds, config.packed, extent, lengths, program, programs)
