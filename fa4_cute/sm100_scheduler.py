"""The scheduler warp of the SM100 forward, and how the other roles read what it publishes.

A work item is published word by word in shared memory, behind the ring `items`. Query rows that see no key are written
here, since no other role works on a Q tile without key tiles.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_core.problem import Kinds
from fa4_cute.kernels import drawn
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import Schedule, Sequence, WorkItem, draw, retire, sequence_of, start, take
from fa4_cute.sm100_config import ITEM_WORDS, Sm100Config
from fa4_cute.sm100_parts import Item
from fa4_cute.unseen import write_past_the_end, write_unseen

ITEM_READERS = 15
"""Warps that read each published item: all but the scheduler."""
NO_INDEX = 1 << 30
"""An index past every work item and every row."""


@cute.jit
def read_item(shared, rings, at, i=None):
    """The next work item, which every role reads once: the spans of both Q tiles, or of Q tile i alone, twice."""
    rings.items.wait(at)
    first, second = (0, 1) if i is None else (i, i)
    spans = [Span(*(shared.items[4 * tile + n] for n in range(4))) for tile in (first, second)]
    word = [shared.items[n] for n in range(8, 18)]
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        rings.items.release(at)
    return Item(word[0] >= 0, WorkItem(*word[:3]), Sequence(*word[3:8]), word[8], word[9], *spans)


class Scheduler:
    """The role, for the kinds and the config of one compiled kernel."""

    def __init__(self, kinds: Kinds, config: Sm100Config) -> None:
        self.kinds = kinds
        self.config = config

    @cute.jit
    def run(self, outputs, sink, shared, rings, lengths, extent, values):
        """The scheduler warp. Waits until every warp has read an item, draws the next and publishes it."""
        config, kinds = self.config, self.kinds
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        if const_expr(config.ctas > 1):
            program, programs = program // config.ctas, programs // config.ctas
        order = Schedule(lengths, extent, programs, config.positions, kinds.window_left or kinds.window_right)
        window = Window(values.window_left, values.window_right)
        at = rings.items.start()
        rings.items.acquire(at)
        first = start(order)
        valid, work, place = take(order, first, program, program)
        if const_expr(config.launch_control and kinds.varlen):
            write_past_the_end(outputs, kinds, config.packed, extent, lengths, program, programs)
        control_at = rings.control.start()
        while valid:
            sequence = sequence_of(work.batch, lengths, extent)
            first_row = work.tile * config.positions
            upper = self._span(sequence, window, first_row)
            lower = Span(Int32(0), Int32(0), Int32(0), Int32(0))
            if const_expr(config.q_tiles == 2):
                lower = self._span(sequence, window, first_row + config.tile_positions)
            begin, end = upper.begin, cutlass.max(upper.end, lower.end)
            if const_expr(drawn(kinds)):  # else every row sees every key
                if upper.begin == upper.end:
                    begin = lower.begin
                    self._write_unseen(outputs, sink, work, sequence, first_row)
                if lower.begin == lower.end and config.q_tiles == 2:
                    self._write_unseen(outputs, sink, work, sequence, first_row + config.tile_positions)
            if begin < end:
                words = (*upper, *lower, *work, *sequence, begin, end)
                self._publish(shared, rings, at, words + (Int32(0),) * (ITEM_WORDS - len(words)))
                at = rings.items.next(at)
                rings.items.acquire(at)
            following = None
            if const_expr(config.launch_control):
                following = self._take_over(shared, rings, control_at)
                control_at = rings.control.next(control_at)
                if const_expr(kinds.varlen):
                    write_past_the_end(outputs, kinds, config.packed, extent, lengths, following, programs)
                place = first  # answers may come in any order, and a place only moves on
            elif const_expr(outputs.counter is not None):
                following = draw(outputs.counter, programs)
            valid, work, place = take(order, place, program, following)
        self._publish(shared, rings, at, (Int32(-1),) * ITEM_WORDS)
        if const_expr(not config.launch_control):
            if const_expr(outputs.counter is not None):
                retire(outputs.counter, programs)
            if const_expr(kinds.varlen):
                write_past_the_end(outputs, kinds, config.packed, extent, lengths, program, programs)

    @cute.jit
    def _take_over(self, shared, rings, at) -> Int32:
        """The index of a block that has not started, and now never will; an index past every item if there is none."""
        with cute.arch.elect_one():
            cute.arch.fence_view_async_shared()  # the last answer has been read
            rings.control.expect(at, 16)
            cute.arch.issue_clc_query(rings.control.full_barrier(at), shared.answer, multicast=False)
        rings.control.wait(at)
        index, _, _, found = cute.arch.clc_response(shared.answer)
        cute.arch.sync_warp()
        return index if found != 0 else Int32(NO_INDEX)

    @cute.jit
    def _span(self, sequence, window, first_row):
        """The key tiles that a Q tile visits; (0, 0, 0, 0) if it sees no key."""
        config = self.config
        last_row = cutlass.min(first_row + config.tile_positions, sequence.seqlen_q)
        span = key_span(first_row, last_row, sequence.seqlen_q, sequence.seqlen_k, window, config.tile_n)
        if first_row >= sequence.seqlen_q or span.begin == span.end:
            span = Span(Int32(0), Int32(0), Int32(0), Int32(0))
        return span

    @cute.jit
    def _write_unseen(self, outputs, sink, work, sequence, first_row):
        """The rows of a Q tile that sees no key."""
        end = cutlass.min(first_row + self.config.tile_positions, sequence.rows_q)
        write_unseen(outputs, sink, self.kinds, self.config.packed, work, sequence, first_row, end)

    @cute.jit
    def _publish(self, shared, rings, at, words):
        with cute.arch.elect_one():
            for n in cutlass.range_constexpr(ITEM_WORDS):
                shared.items[n] = words[n]
            rings.items.publish(at)
