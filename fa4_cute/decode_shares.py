"""Which keys a block of the decode kernel works on.

The blocks of one KV head each form a team, which read the same keys at the same time, since the heads of a key lie side
by side in memory. The key tiles of the long sequences stand in one row, cut into equal shares, one a team. A cut is
moved to where the nearest chunk of tiles begins, and where chunks begin depends on nothing but the sequence's own
length: each chunk has a softmax of its own, folded into the sequence's in order, so results depend neither on the batch
nor on who computed what.

Multiprocessors do not read equally fast, by a quarter on an H100. So the sequences that are short beside a share
(`DRAWN`) are left out of the row, and blocks draw them, whole, when they are through with their shares: all end at
about the same time.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_cute.decode_config import COUNTED, LEAST, MOST_CHUNKS, TILE_N
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import LANES, sums

DRAWN = 8
"""How many of a sequence an equal share of all tiles has to hold for it to be drawn: blocks end within so much."""


class Calls(NamedTuple):
    """The sequences of a call: int32 tensors (batch,) of lengths and of padded rows, or None, and sizes.

    capacity: rows of a sequence's cache. length: of every sequence, where no tensor says it. added: rows appended
    behind cache_seqlens. wanted: chunks a sequence, 0 for the default.
    """

    seqlens: cute.Tensor | None
    leftpad: cute.Tensor | None
    batch: Int32
    rows_q: Int32
    capacity: Int32
    length: Int32
    added: Int32
    wanted: Int32


class Keys(NamedTuple):
    """The keys of a sequence: padded rows before them, their number, tiles visited (one at least), tiles of a chunk.

    log: the chunk's binary logarithm, unless a number of chunks was asked for.
    """

    pad: Int32
    length: Int32
    span: Span
    tiles: Int32
    chunk: Int32
    log: Int32


class Share(NamedTuple):
    """A block's work: the sequence and the tile in it that it begins with, and its number of tiles."""

    sequence: Int32
    tile: Int32
    tiles: Int32


@cute.jit
def keys_of(sequence: Int32, calls: Calls, window: Window) -> Keys:
    """The keys of a sequence; past the last one, those of the last. Clamped, whatever the device says."""
    length = calls.length
    sequence = cutlass.min(sequence, calls.batch - 1)
    if const_expr(calls.seqlens is not None):
        length = calls.seqlens[sequence]
    # Clamped before and after the sum: a wild length must not wrap around.
    length = cutlass.min(cutlass.min(cutlass.max(length, 0), calls.capacity) + calls.added, calls.capacity)
    pad = Int32(0)
    if const_expr(calls.leftpad is not None):
        pad = cutlass.min(cutlass.max(calls.leftpad[sequence], 0), length)
    length -= pad
    span = key_span(Int32(0), calls.rows_q, calls.rows_q, length, window, TILE_N)
    tiles = cutlass.max(span.end - span.begin, 1)
    # A power of two, LEAST at least: up to 32 chunks of up to 16 tiles, and then more chunks.
    least = cutlass.max(cutlass.min(cute.ceil_div(tiles, 32), 16), cute.ceil_div(tiles, MOST_CHUNKS))
    log = 32 - Int32(cute.arch.clz(cutlass.max(least, LEAST) - 1))
    chunk = Int32(1) << log
    if calls.wanted > 0:
        chunk = cute.ceil_div(tiles, calls.wanted)
    return Keys(pad, length, span, tiles, chunk, log)


@cute.jit
def chunks_in(tiles: Int32, keys: Keys, calls: Calls) -> Int32:
    """How many chunks so many tiles make, the last one perhaps in part; a division takes longer than all the rest."""
    chunks = (tiles + keys.chunk - 1) >> keys.log
    if calls.wanted > 0:
        chunks = cute.ceil_div(tiles, keys.chunk)
    return chunks


@cute.jit
def next_shared(sequence: Int32, drawn: Int32, calls: Calls, window: Window) -> tuple[Int32, Keys]:
    """The first sequence from here on that is not drawn, and its keys; drawn as in `find_share`."""
    keys = keys_of(sequence, calls, window)
    while keys.tiles <= drawn and sequence < calls.batch:
        sequence += 1
        keys = keys_of(sequence, calls, window)
    return sequence, keys


@cute.jit
def find_share(team: Int32, teams: Int32, calls: Calls, window: Window) -> tuple[Share, Int32]:
    """A team's share, and the most tiles of a sequence that is drawn, 0 where none is; called by a whole warp.

    Its lanes look at 32 sequences at a time.
    """
    lane = cute.arch.lane_idx()
    total, shortest, tiles = Int32(0), COUNTED, Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        keys = keys_of(base + lane, calls, window)
        tiles = keys.tiles if base + lane < calls.batch else Int32(0)
        total += tiles
        shortest = cutlass.min(shortest, keys.tiles)
    total, shortest = cute.arch.warp_redux_sync(total, "add"), cute.arch.warp_redux_sync(shortest, "min")
    drawn = Int32(Float32(total) * cute.arch.rcp_approx(Float32(DRAWN * teams)))
    if shortest > drawn:
        drawn = Int32(0)
    else:
        total = Int32(0)
        for base in cutlass.range(0, calls.batch, LANES, unroll=1):
            tiles = _shared_tiles(base + lane, drawn, calls, window)
            total += tiles
        total = cute.arch.warp_redux_sync(total, "add")
    share = Share(Int32(0), Int32(0), Int32(0))
    if total > 0:
        first, last = _cut(total, team, teams), _cut(total, team + 1, teams)
        share = _between(first, last, tiles, drawn, calls, window)
    return share, drawn


@cute.jit
def _shared_tiles(sequence: Int32, drawn: Int32, calls: Calls, window: Window) -> Int32:
    """Tiles of a sequence in the row of those that are shared; none of one that is drawn, or past the last one."""
    keys = keys_of(sequence, calls, window)
    return keys.tiles if sequence < calls.batch and keys.tiles > drawn else Int32(0)


@cute.jit
def _cut(total: Int32, team: Int32, teams: Int32) -> Int32:
    """About team / teams of the tiles, the same for every block that asks; whole numbers take a division longer."""
    cut = Int32(Float32(total) * (Float32(team) * cute.arch.rcp_approx(Float32(teams))))
    return cut if team < teams else total


@cute.jit
def _between(
    first: Int32,
    last: Int32,
    tiles: Int32,
    drawn: Int32,
    calls: Calls,
    window: Window,
) -> Share:
    """The share between the chunks that begin nearest to two places in the row of shared tiles; by a whole warp.

    tiles: of the lane's sequence, if there are no more sequences than lanes. The share may begin at the end of a
    sequence, which is the beginning of the next one that is shared.
    """
    lane = cute.arch.lane_idx()
    counted = Int32(0)
    first_sequence, before_first, last_sequence, before_last = Int32(0), Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        if calls.batch > LANES:
            tiles = _shared_tiles(base + lane, drawn, calls, window)
        before, sum_all = sums(tiles)
        end = counted + before + tiles
        exists = base + lane < calls.batch
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(exists and end <= first))
        there = cute.arch.shuffle_sync(end, cutlass.max(passed - 1, 0))
        first_sequence += passed
        before_first = there if passed > 0 else before_first
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(exists and end <= last))
        there = cute.arch.shuffle_sync(end, cutlass.max(passed - 1, 0))
        last_sequence += passed
        before_last = there if passed > 0 else before_last
        counted += sum_all
    first_sequence, tile, begin = _nearest_chunk(first_sequence, before_first, first, calls, window)
    _, _, end = _nearest_chunk(last_sequence, before_last, last, calls, window)
    return Share(first_sequence, tile, end - begin)


@cute.jit
def _nearest_chunk(
    sequence: Int32, before: Int32, at: Int32, calls: Calls, window: Window
) -> tuple[Int32, Int32, Int32]:
    """Where the chunk nearest to tile `at` begins, in a sequence whose tiles begin at `before`, or after it.

    Returns (sequence, tile in it, its place among all tiles that are shared).
    """
    keys = keys_of(sequence, calls, window)
    tile = (at - before + keys.chunk // 2) & -keys.chunk
    if calls.wanted > 0:
        tile = (at - before + keys.chunk // 2) // keys.chunk * keys.chunk
    place = before + cutlass.min(tile, keys.tiles)
    passed = tile >= keys.tiles
    return sequence + Int32(passed), Int32(0) if passed else tile, place
