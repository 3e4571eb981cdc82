"""Which query tiles a block works on, and in which order.

A launch is persistent: `programs` blocks share the work items, an item being one query tile of one head of one
sequence. Items have an order. Where they are alike, a block takes every `programs`-th of them; where they differ in
length, blocks draw the next one as they get there, from a counter in global memory that the last block leaves as it
found it.

- Causal and windows: the longest query tiles first, within sections of heads whose keys and values fit the L2 cache.
- Otherwise: the query tiles of one head side by side, so that blocks at work share keys and values.
- Packed sequences: the same within each sequence; sequences in the order of the call. Blocks find their sequence on the
  device by walking `cu_seqlens`, so the launch depends on no length.

No result depends on the order: an item is computed by one block, in an order of keys of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


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
    """A query tile: `tile` counts tiles of the sequence `batch`; `head` is a query head."""

    tile: Int32
    head: Int32
    batch: Int32


class Place(NamedTuple):
    """Where a block is in the order: its turn, and in varlen the sequence reached and the index of its first item."""

    turn: Int32
    batch: Int32
    first: Int32


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


def start() -> Place:
    """Before the first item."""
    return Place(Int32(0), Int32(0), Int32(0))


@cute.jit
def draw(counter: cute.Tensor, programs: Int32) -> Int32:
    """One warp draws its block's next index, after the first `programs` ones; the counter answers in about 1 us.

    counter: int32 (2,), zeros between launches: indices given away, and blocks that are done.
    """
    index = Int32(0)
    if cute.arch.lane_idx() == 0:
        index = programs + cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(index, 0)


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
    """The block's next item: whether there is one, the item, and the place after it.

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
        # Sections are worked on one after the other, a smaller one first: the last has to even out what came before.
        short = (extent.section - pairs % extent.section) % extent.section
        section = (index + short * tiles) // (extent.section * tiles)
        first_pair = cutlass.max(section * extent.section - short, 0)
        width = extent.section
        if section == 0:
            width = extent.section - short
        rest = index - first_pair * tiles
        tile = tiles - 1 - rest // width
        pair = first_pair + rest % width
    else:
        pair = index // tiles
        tile = index - pair * tiles
    item = WorkItem(tile, pair % extent.heads, pair // extent.heads)
    return valid, item, Place(place.turn + 1, place.batch, place.first)


@cute.jit
def _packed(schedule: Schedule, place: Place, index: Int32) -> tuple[cutlass.Boolean, WorkItem, Place]:
    extent = schedule.extent
    batch, first = place.batch, place.first
    items = _items_of(schedule, batch)
    while batch < extent.batch and index >= first + items:
        first += items
        batch += 1
        items = _items_of(schedule, batch)
    tiles = cutlass.max(items // extent.heads, 1)
    rest = index - first
    if const_expr(schedule.longest_first):
        tile = tiles - 1 - rest // extent.heads
        head = rest % extent.heads
    else:
        head = rest // tiles
        tile = rest - head * tiles
    return batch < extent.batch, WorkItem(tile, head, batch), Place(place.turn + 1, batch, first)


@cute.jit
def _items_of(schedule: Schedule, batch: Int32) -> Int32:
    """Work items of a sequence; 0 past the last."""
    items = Int32(0)
    if batch < schedule.extent.batch:
        rows = sequence_of(batch, schedule.lengths, schedule.extent).rows_q
        items = cute.ceil_div(rows, schedule.tile_m) * schedule.extent.heads
    return items
