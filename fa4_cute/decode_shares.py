"""Which keys a block of the decode kernel works on.

The blocks of one KV head each form a team, which read the same keys at the same time, since the heads of a key lie side
by side in memory. The key tiles of all sequences stand in one row, cut into equal shares, one a team. A cut is moved to
where the nearest chunk of tiles begins, and where chunks begin depends on nothing but the sequence's own length: each
chunk has a softmax of its own, folded into the sequence's in order, so results depend neither on the batch nor on who
computed what.

Multiprocessors do not read equally fast, by a quarter on an H100, and memory is read fastest where all read close to
each other. So work that is long enough (`DRAWN`, `MANY`) is drawn instead, piece by piece, as blocks get there: first
whole sequences that are short beside a share, the longest of them first, then the others in order, in units of a few
tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_cute.decode_config import WARPS
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import LANES, sums

DRAWN = 8
"""How many of a sequence a share has to hold for it to be drawn whole."""
MANY = 160
"""Tiles of a share from which on all work is drawn: what parts of sequences cost at the end is little beside that."""


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
    """The keys of a sequence: padded rows before them, their number, tiles visited (one at least), chunks of these.

    log: the binary logarithm of the chunks, unless a number of them was asked for.
    """

    pad: Int32
    length: Int32
    span: Span
    tiles: Int32
    chunks: Int32
    log: Int32


class Share(NamedTuple):
    """A block's work: the sequence, the chunk and its first tile that it begins with, and its number of tiles."""

    sequence: Int32
    chunk: Int32
    tile: Int32
    tiles: Int32


class Deal(NamedTuple):
    """How a call's work is dealt: in shares, of which this is the block's, or drawn.

    limit: the most tiles of a sequence that is drawn whole. longest: tiles of the longest of these, or 0.
    """

    share: Share
    drawn: Boolean
    limit: Int32
    longest: Int32


class Draws(NamedTuple):
    """A warp's place among the pieces of work that are drawn, which have numbers.

    They are counted in passes: of the sequences that are drawn whole, each pass takes those with more than half the
    tiles that the longest one left has; the last pass is that of the others. longest: the most tiles of this pass, 0 in
    the last one, -1 behind it. shorter: the most that this lane has met in a sequence of a later pass. base: the first
    of the 32 sequences that the lanes are at. begin: the number of the first piece of the lane's own. end: the number
    after the pieces of all 32.
    """

    longest: Int32
    shorter: Int32
    base: Int32
    begin: Int32
    end: Int32


@cute.jit
def keys_of(sequence: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]) -> Keys:
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
    span = key_span(Int32(0), calls.rows_q, calls.rows_q, length, window, tile_n)
    tiles = cutlass.max(span.end - span.begin, 1)
    # A power of two, which divides without a division, and of which teams, too, are often a part: as many as leave
    # a tile for each warp, up to 32 of 16 tiles, and 64 beyond.
    log = cutlass.min(31 - Int32(cute.arch.clz(cutlass.max(tiles // WARPS, 1))), 5)
    if tiles > 32 * 16:
        log = Int32(6)
    chunks = Int32(1) << log
    if calls.wanted > 0:
        chunks = cutlass.min(calls.wanted, tiles)
    return Keys(pad, length, span, tiles, chunks, log)


@cute.jit
def first_tile(chunk: Int32, keys: Keys, calls: Calls) -> Int32:
    """Where a chunk begins; chunks of a sequence differ by a tile at most."""
    each, rest = keys.tiles >> keys.log, keys.tiles & (keys.chunks - 1)
    more = chunk * rest >> keys.log
    if calls.wanted > 0:
        each, rest = keys.tiles // keys.chunks, keys.tiles % keys.chunks
        more = chunk * rest // keys.chunks
    return chunk * each + more


@cute.jit
def find_share(team: Int32, teams: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]) -> Deal:
    """How the call is dealt, and a team's share; called by a whole warp, whose lanes look at 32 sequences at a time."""
    total, tiles, longest = Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        tiles = _tiles_of_lane(base, calls, window, tile_n)
        total += tiles
        longest = cutlass.max(longest, tiles)
    total, longest = cute.arch.warp_redux_sync(total, "add"), cute.arch.warp_redux_sync(longest, "max")
    limit = Int32(Float32(total) * cute.arch.rcp_approx(Float32(teams * DRAWN)))
    drawn = longest <= limit or total >= teams * MANY
    share = Share(team, Int32(0), Int32(0), Int32(0))
    if drawn:
        if longest > limit:
            longest = Int32(0)
            for base in cutlass.range(0, calls.batch, LANES, unroll=1):
                tiles = _tiles_of_lane(base, calls, window, tile_n)
                longest = cutlass.max(longest, tiles if tiles <= limit else Int32(0))
            longest = cute.arch.warp_redux_sync(longest, "max")
    else:
        share = _between(_cut(total, team + cute.arch.lane_idx() % 2, teams), tiles, calls, window, tile_n)
    return Deal(share, drawn, limit, longest)


@cute.jit
def _tiles_of_lane(base: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]) -> Int32:
    """Tiles of the sequence `base` + lane; none past the last one."""
    sequence = base + cute.arch.lane_idx()
    keys = keys_of(sequence, calls, window, tile_n)
    return keys.tiles if sequence < calls.batch else Int32(0)


@cute.jit
def _cut(total: Int32, team: Int32, teams: Int32) -> Float32:
    """About team / teams of all tiles, without a division; never more than for the next team.

    That holds because each rounding keeps the order of what it rounds. Not a whole number: a tile more or less may make
    two chunks of one.
    """
    cut = Float32(total) * (Float32(team) * cute.arch.rcp_approx(Float32(teams)))
    return cut if team < teams else Float32(total)


@cute.jit
def _between(cut: Float32, tiles: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]) -> Share:
    """The share between the chunks that begin nearest to two places in the row of all tiles; by a whole warp.

    cut: the first place in even lanes, the other in odd ones. So one instruction rounds both, and a share ends where
    the next one begins, however the compiler contracts products and sums. tiles: of the lane's sequence, if there are
    no more sequences than lanes.
    """
    lane, counted = cute.arch.lane_idx(), Int32(0)
    first, last = cute.arch.shuffle_sync(cut, 0), cute.arch.shuffle_sync(cut, 1)
    first_sequence, before_first, last_sequence, before_last = Int32(0), Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        if calls.batch > LANES:
            tiles = _tiles_of_lane(base, calls, window, tile_n)
        before, sum_all = sums(tiles)
        end = counted + before + tiles
        exists = base + lane < calls.batch
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(exists and Float32(end) <= first))
        there = cute.arch.shuffle_sync(end, cutlass.max(passed - 1, 0))
        first_sequence += passed
        before_first = there if passed > 0 else before_first
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(exists and Float32(end) <= last))
        there = cute.arch.shuffle_sync(end, cutlass.max(passed - 1, 0))
        last_sequence += passed
        before_last = there if passed > 0 else before_last
        counted += sum_all
    is_first = lane % 2 == 0
    sequence, before = first_sequence if is_first else last_sequence, before_first if is_first else before_last
    sequence, chunk, tile, place = _nearest_chunk(sequence, before, cut, calls, window, tile_n)
    sequence, chunk, tile = (cute.arch.shuffle_sync(word, 0) for word in (sequence, chunk, tile))
    return Share(sequence, chunk, tile, cute.arch.shuffle_sync(place, 1) - cute.arch.shuffle_sync(place, 0))


@cute.jit
def _nearest_chunk(
    sequence: Int32, before: Int32, at: Float32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]
) -> tuple[Int32, Int32, Int32, Int32]:
    """The chunk that begins nearest to `at`, of a sequence whose tiles begin at `before`, or the next one's first.

    Nearest but for rounding. at: a place among all tiles. Returns (sequence, chunk, tile in the sequence, its place
    among all tiles).
    """
    keys = keys_of(sequence, calls, window, tile_n)
    chunks_before = (at - Float32(before)) * Float32(keys.chunks) * cute.arch.rcp_approx(Float32(keys.tiles))
    chunk = cutlass.min(Int32(chunks_before + 0.5), keys.chunks)
    tile = first_tile(chunk, keys, calls)
    place, passed = before + tile, chunk == keys.chunks
    return sequence + Int32(passed), Int32(0) if passed else chunk, Int32(0) if passed else tile, place


@cute.jit
def start_draws(deal: Deal) -> Draws:
    """Before the first piece is drawn."""
    return Draws(deal.longest, Int32(0), Int32(-LANES), Int32(0), Int32(0))


@cute.jit
def find_drawn(
    number: Int32,
    draws: Draws,
    limit: Int32,
    calls: Calls,
    window: Window,
    tile_n: cutlass.Constexpr[int],
    unit_log: cutlass.Constexpr[int],
) -> tuple[Share, Draws]:
    """The piece of a number, which is not below the last one asked for; no tiles where there is none. By a whole warp.

    unit_log: the binary logarithm of the tiles of a unit.
    """
    longest, shorter, base, begin, end = draws
    while longest >= 0 and number >= end:
        base += LANES
        if base >= calls.batch:
            longest = cute.arch.warp_redux_sync(shorter, "max") if longest > 0 else Int32(-1)
            shorter, base = Int32(0), Int32(0)
        sequence = base + cute.arch.lane_idx()
        keys, exists = keys_of(sequence, calls, window, tile_n), sequence < calls.batch
        later = longest // 2 if longest > WARPS else Int32(0)  # up to so many tiles
        shorter = cutlass.max(shorter, keys.tiles if exists and keys.tiles <= later else Int32(0))
        pieces = Int32(exists and keys.tiles > later and keys.tiles <= longest)
        if longest == 0 and exists and keys.tiles > limit:
            log = _unit_chunks_log(keys, calls, unit_log)
            pieces = (keys.chunks + (Int32(1) << log) - 1) >> log
        before, total = sums(pieces)
        begin, end = end + before, end + total
    # The last lane whose pieces do not begin behind the number has it.
    lane = cute.arch.popc(cute.arch.vote_ballot_sync(begin <= number)) - 1
    piece, sequence = number - cute.arch.shuffle_sync(begin, lane), base + lane
    chunk, tile, tiles = Int32(0), Int32(0), Int32(0)
    if longest >= 0:
        keys = keys_of(sequence, calls, window, tile_n)
        tiles = keys.tiles
        if longest == 0:
            log = _unit_chunks_log(keys, calls, unit_log)
            chunk = piece << log
            tile = first_tile(chunk, keys, calls)
            tiles = first_tile(cutlass.min(chunk + (Int32(1) << log), keys.chunks), keys, calls) - tile
    return Share(sequence, chunk, tile, tiles), Draws(longest, shorter, base, begin, end)


@cute.jit
def _unit_chunks_log(keys: Keys, calls: Calls, unit_log: cutlass.Constexpr[int]) -> Int32:
    """The binary logarithm of the chunks of a unit of a sequence: one, or as many as have no more tiles than a unit."""
    each = keys.tiles >> keys.log
    if calls.wanted > 0:
        each = keys.tiles // keys.chunks
    return cutlass.max(unit_log - (32 - Int32(cute.arch.clz(each - 1))), 0)
