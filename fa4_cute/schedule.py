"""Which query tiles a block works on, and in which order.

A launch is persistent: `programs` blocks share the work items, an item being one query tile of one head of one
sequence. Items have an order. Where they are alike, a block takes every `programs`-th of them; where they differ in
length, blocks draw the next one as they get there, from a counter in global memory that the last block leaves as it
found it.

- Causal and windows: the longest query tiles first, within sections of heads that just occupy the device, so that
  their keys and values stay in the L2 cache; the last section is larger, to even out what came before.
- Otherwise: the query tiles of one head side by side, so that blocks at work share keys and values.
- Packed sequences: the same within each sequence; the sequences in passes, each of those with more than half the keys
  that the longest one left has, so that the last items, which even out what came before, are short. Blocks find their
  sequences on the device, so the launch depends on no length: a warp walks `cu_seqlens`, 32 sequences at a time.

No result depends on the order: an item is computed by one block, in an order of keys of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

LANES = 32
"""Lanes of a warp."""
AT_ONCE = 4
"""Sequences whose bounds a lane reads at a time, so that reads overlap, while a block's first item waits for them."""
LAST_SECTION = 2
"""How much larger the last section is than the others (`Extent.section`): enough items to even out all before."""
SHORT = 256
"""Keys up to which sequences are taken in one pass: what an item costs beside its products makes them alike."""
NUMBERED = (1 << 30) - 1
"""Work items that a call may have; more, which only sequences that overlap could make, are not numbered."""


class Lengths(NamedTuple):
    """int32 tensors of sequence bounds; None where the call has none, fixed when the kernel is compiled."""

    cu_seqlens_q: cute.Tensor | None
    cu_seqlens_k: cute.Tensor | None
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None


class Extent(NamedTuple):
    """Run-time sizes of a call: rows of q and k (a sequence's in the dense layout, the total in varlen).

    section: heads (times batch elements) that are worked on side by side in the longest-first order.
    """

    batch: Int32
    heads: Int32
    seqlen_q: Int32
    seqlen_k: Int32
    section: Int32


class Sequence(NamedTuple):
    """One sequence: its first row in q and in k, the rows of q it holds, and the rows of q and k that take part."""

    offset_q: Int32
    offset_k: Int32
    rows_q: Int32
    seqlen_q: Int32
    seqlen_k: Int32


class WorkItem(NamedTuple):
    """A query tile: `tile` counts those of the sequence `batch`, `head` its heads, or groups that share a tile."""

    tile: Int32
    head: Int32
    batch: Int32


class Place(NamedTuple):
    """Where a block is in the order: how many items it has taken and, of packed sequences, where its warp's walk is.

    longest: keys of the longest sequence of this pass; -1 when no pass is left. shorter: the most keys that this lane
    has met in a sequence of a later pass, or -1. base: the first of the 32 sequences that the lanes are at. begin: the
    index of the first item of the lane's own. end: the index after the items of all 32.
    """

    turn: Int32
    longest: Int32
    shorter: Int32
    base: Int32
    begin: Int32
    end: Int32


@cute.jit
def sequence_of(batch: Int32, lengths: Lengths, extent: Extent) -> Sequence:
    """Bounds of a sequence, clamped into the tensors whatever the device's index tensors hold."""
    offset_q, seqlen_q = Int32(0), extent.seqlen_q
    offset_k, seqlen_k = Int32(0), extent.seqlen_k
    if const_expr(lengths.cu_seqlens_q is not None):
        offset_q, seqlen_q = _rows(lengths.cu_seqlens_q, batch, extent.seqlen_q)
        offset_k, seqlen_k = _rows(lengths.cu_seqlens_k, batch, extent.seqlen_k)
    rows_q = seqlen_q
    if const_expr(lengths.seqused_q is not None):
        seqlen_q = _clamp(lengths.seqused_q[batch], Int32(0), seqlen_q)
    if const_expr(lengths.seqused_k is not None):
        seqlen_k = _clamp(lengths.seqused_k[batch], Int32(0), seqlen_k)
    return Sequence(offset_q, offset_k, rows_q, seqlen_q, seqlen_k)


@cute.jit
def _clamp(value: Int32, low: Int32, high: Int32) -> Int32:
    return cutlass.min(cutlass.max(value, low), high)


@cute.jit
def _rows(cu_seqlens: cute.Tensor, batch: Int32, total: Int32) -> tuple[Int32, Int32]:
    begin = _clamp(cu_seqlens[batch], Int32(0), total)
    return begin, _clamp(cu_seqlens[batch + 1], begin, total) - begin


class Schedule(NamedTuple):
    """The order of a launch's work items; made inside the kernel, so that its last two fields stay static.

    longest_first: whether query tiles differ in length (causal, windows).
    """

    lengths: Lengths
    extent: Extent
    programs: Int32
    tile_m: int
    longest_first: bool


@cute.jit
def start(schedule: Schedule) -> Place:
    """Before the first item; called by a whole warp, as `take`."""
    longest = Int32(-1)
    if const_expr(schedule.lengths.cu_seqlens_q is not None):
        for base in cutlass.range(0, schedule.extent.batch, AT_ONCE * LANES, unroll=1):
            for n in cutlass.range_constexpr(AT_ONCE):
                keys, _ = _work_of_lane(schedule, base + n * LANES)
                longest = cutlass.max(longest, keys)
        longest = cute.arch.warp_reduction_max(longest)
    return Place(Int32(0), longest, Int32(-1), Int32(-LANES), Int32(0), Int32(0))


@cute.jit
def draw(counter: cute.Tensor, programs: Int32) -> Int32:
    """One warp draws its block's next index, after the first `programs` ones."""
    return programs + cute.arch.shuffle_sync(ask(counter), 0)


@cute.jit
def ask(counter: cute.Tensor) -> Int32:
    """How many indices `draw` has given away, with this one taken, in a warp's first lane: it comes in about 1 us.

    counter: int32 (2,), zeros between launches: indices given away, and blocks that are done.
    """
    answer = Int32(0)
    if cute.arch.lane_idx() == 0:
        answer = cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return answer


@cute.jit
def retire(counter: cute.Tensor, programs: Int32):
    """One warp of a block that found no more items; the last block zeros the counter for the next launch."""
    if cute.arch.lane_idx() == 0:
        done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
        if done == programs - 1:
            counter[0] = Int32(0)
            counter[1] = Int32(0)


@cute.jit
def take(
    schedule: Schedule, place: Place, program: Int32, index: Int32 | None = None
) -> tuple[cutlass.Boolean, WorkItem, Place]:
    """The block's next item: whether there is one, the item, and the place after it; called by a whole warp.

    index: the item's place in the order, from `draw`, not below the last one; None takes every `programs`-th item.
    """
    if const_expr(index is None):
        index = place.turn * schedule.programs + program
    if const_expr(schedule.lengths.cu_seqlens_q is None):
        return _dense(schedule, place, index)
    else:
        return _packed(schedule, place, index)


@cute.jit
def _dense(schedule: Schedule, place: Place, index: Int32) -> tuple[cutlass.Boolean, WorkItem, Place]:
    extent = schedule.extent
    tiles = cutlass.max(cute.ceil_div(extent.seqlen_q, schedule.tile_m), 1)
    pairs = extent.heads * extent.batch
    valid = index < tiles * pairs
    if const_expr(schedule.longest_first):
        # One section after the other, a part of one first.
        last_pair = cutlass.max(pairs - LAST_SECTION * extent.section, 0)
        short = (extent.section - last_pair % extent.section) % extent.section
        section = (index + short * tiles) // (extent.section * tiles)
        first_pair = cutlass.max(section * extent.section - short, 0)
        width = extent.section
        if section == 0:
            width = extent.section - short
        if first_pair >= last_pair:
            first_pair = last_pair
            width = pairs - last_pair
        rest = index - first_pair * tiles
        tile = tiles - 1 - rest // width
        pair = first_pair + rest % width
    else:
        pair = index // tiles
        tile = index - pair * tiles
    item = WorkItem(tile, pair % extent.heads, pair // extent.heads)
    return valid, item, Place(place.turn + 1, *place[1:])


@cute.jit
def _packed(schedule: Schedule, place: Place, index: Int32) -> tuple[cutlass.Boolean, WorkItem, Place]:
    extent = schedule.extent
    turn, longest, shorter, base, begin, end = place
    while longest >= 0 and index >= end:
        base += LANES
        if base >= extent.batch:
            longest = cute.arch.warp_reduction_max(shorter)
            shorter, base = Int32(-1), Int32(0)
        keys, items = _work_of_lane(schedule, base)
        later = longest // 2 if longest > SHORT else Int32(-1)  # up to so many keys
        shorter = cutlass.max(shorter, keys if keys <= later else Int32(-1))
        items = items if keys > later and keys <= longest else Int32(0)
        begin = end
        if cute.arch.vote_any_sync(items > 0):
            before, total = sums(items)
            begin, end = cutlass.min(end + before, NUMBERED), cutlass.min(end + total, NUMBERED)
    # The last lane whose items do not begin behind the index has the item.
    lane = cute.arch.popc(cute.arch.vote_ballot_sync(begin <= index)) - 1
    first = cute.arch.shuffle_sync(begin, lane)
    following = cute.arch.shuffle_sync(begin, lane + 1)
    items = (following if lane < LANES - 1 else end) - first
    tiles = cutlass.max(cute.ceil_div(items, extent.heads), 1)  # rounded up, since `NUMBERED` may have cut items off
    rest = index - first
    if const_expr(schedule.longest_first):
        tile = tiles - 1 - rest // extent.heads
        head = rest % extent.heads
    else:
        head = rest // tiles
        tile = rest - head * tiles
    return longest >= 0, WorkItem(tile, head, base + lane), Place(turn + 1, longest, shorter, base, begin, end)


@cute.jit
def _work_of_lane(schedule: Schedule, base: Int32) -> tuple[Int32, Int32]:
    """Keys and work items of the sequence `base + lane`; -1 and 0 where there is none, or none of its rows is."""
    batch = base + cute.arch.lane_idx()
    # Read without a branch, so that the reads of several sequences overlap.
    sequence = sequence_of(cutlass.min(batch, schedule.extent.batch - 1), schedule.lengths, schedule.extent)
    exists = batch < schedule.extent.batch and sequence.rows_q > 0
    items = cute.ceil_div(sequence.rows_q, schedule.tile_m) * schedule.extent.heads
    return sequence.seqlen_k if exists else Int32(-1), items if exists else Int32(0)


@cute.jit
def sums(value: Int32) -> tuple[Int32, Int32]:
    """Sums over the lanes before this one, and over all, up to `NUMBERED`; no value is below 0 or above that."""
    lane, total = cute.arch.lane_idx(), value
    for distance in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(total, distance, mask_and_clamp=0)
        total = cutlass.min(total + (other if lane >= distance else Int32(0)), NUMBERED)
    before = cute.arch.shuffle_sync_up(total, 1, mask_and_clamp=0)
    return before if lane > 0 else Int32(0), cute.arch.shuffle_sync(total, LANES - 1)
