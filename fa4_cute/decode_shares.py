"""Which keys a block of the decode kernel works on.

The blocks of one KV head each form a team, which read the same keys at the same time, since the heads of a key lie side
by side in memory. The key tiles of all sequences stand in one row, cut into equal shares, one a team. A cut is moved to
where the nearest chunk of tiles begins, and where chunks begin depends on nothing but the sequence's own length: each
chunk has a softmax of its own, folded into the sequence's in order, so results depend neither on the batch nor on who
computed what.

Multiprocessors do not read equally fast, by a quarter on an H100. Where there are enough sequences that are short
beside a share (`DRAWN`), only the others are cut into shares; of the short ones blocks draw whole ones, as they get
there, the longest first, and all end at about the same time.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from fa4_cute.decode_config import WARPS
from fa4_cute.ranges import Span, Window, key_span
from fa4_cute.schedule import LANES, sums

DRAWN = 8
"""How many of a sequence a share has to hold for it to be short: the last ones end within so much."""


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
    """How a call's sequences are dealt: the block's share of those of more than `limit` tiles; the others are drawn.

    limit: 0 where none is drawn. longest: tiles of the longest one that is drawn, or 0. shared: tiles of all shares.
    """

    share: Share
    limit: Int32
    longest: Int32
    shared: Int32


class Draws(NamedTuple):
    """A warp's place among the sequences that are drawn, which have numbers: the longest ones the first.

    They are counted in passes, each of those with more than half the tiles that the longest one left has. longest: the
    most tiles of this pass, 0 when no pass is left. shorter: the most that this lane has met in one of a later pass.
    base: the first of the 32 sequences that the lanes are at. found: which of them belong to the pass, a bit each.
    begin, end: the number of the first of these, and the one after the last.
    """

    longest: Int32
    shorter: Int32
    base: Int32
    found: Int32
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
    shared, tiles = Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        tiles = _tiles_of_lane(base, calls, window, tile_n)
        shared += tiles
    shared = cute.arch.warp_redux_sync(shared, "add")
    limit, longest = Int32(0), Int32(0)
    if calls.batch > teams:  # else there are too few
        limit = Int32(Float32(shared) * cute.arch.rcp_approx(Float32(teams * DRAWN)))
        short, drawn = Int32(0), Int32(0)
        for base in cutlass.range(0, calls.batch, LANES, unroll=1):
            if calls.batch > LANES:
                tiles = _tiles_of_lane(base, calls, window, tile_n)
            mine = tiles if tiles <= limit else Int32(0)
            short += mine
            longest = cutlass.max(longest, mine)
            drawn += cute.arch.popc(cute.arch.vote_ballot_sync(mine > 0))
        if drawn > teams:
            shared -= cute.arch.warp_redux_sync(short, "add")
            longest = cute.arch.warp_redux_sync(longest, "max")
        else:
            limit, longest = Int32(0), Int32(0)
    share = Share(Int32(0), Int32(0), Int32(0), Int32(0))
    if shared > 0:
        cut = _cut(shared, team + cute.arch.lane_idx() % 2, teams)
        share = _between(cut, tiles, limit, calls, window, tile_n)
    return Deal(share, limit, longest, shared)


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
def _between(
    cut: Float32, tiles: Int32, limit: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]
) -> Share:
    """The share between the chunks that begin nearest to two places in the row of all tiles; by a whole warp.

    cut: the first place in even lanes, the other in odd ones. So one instruction rounds both, and a share ends where
    the next one begins, however the compiler contracts products and sums. tiles: of the lane's sequence, if there are
    no more sequences than lanes. limit: the tiles of sequences up to which they are not in the row.
    """
    lane, counted = cute.arch.lane_idx(), Int32(0)
    first, last = cute.arch.shuffle_sync(cut, 0), cute.arch.shuffle_sync(cut, 1)
    first_sequence, before_first, last_sequence, before_last = Int32(0), Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        if calls.batch > LANES:
            tiles = _tiles_of_lane(base, calls, window, tile_n)
        mine = tiles if tiles > limit else Int32(0)
        before, sum_all = sums(mine)
        end = counted + before + mine
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
    if tile == 0:
        sequence = next_in_row(sequence, limit, calls, window, tile_n)
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
def next_in_row(sequence: Int32, limit: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]) -> Int32:
    """The first sequence from this one on that shares are made of, or `batch` and more; by a whole warp."""
    if limit > 0:
        base, found = sequence, Int32(0)
        while found == 0 and base < calls.batch:
            found = cute.arch.vote_ballot_sync(_tiles_of_lane(base, calls, window, tile_n) > limit)
            sequence = base + _first_bit(found)
            base += LANES
    return sequence


@cute.jit
def start_draws(deal: Deal) -> Draws:
    """Before the first one is drawn."""
    return Draws(deal.longest, Int32(0), Int32(-LANES), Int32(0), Int32(0), Int32(0))


@cute.jit
def find_drawn(
    number: Int32, draws: Draws, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]
) -> tuple[Int32, Draws]:
    """The sequence of a number, not below the last one asked for; `batch` if there is none. By a whole warp."""
    longest, shorter, base, found, begin, end = draws
    lane = cute.arch.lane_idx()
    while longest > 0 and number >= end:
        base += LANES
        if base >= calls.batch:
            longest, shorter, base = cute.arch.warp_redux_sync(shorter, "max"), Int32(0), Int32(0)
        tiles = _tiles_of_lane(base, calls, window, tile_n)
        later = longest // 2 if longest > WARPS else Int32(0)  # up to so many tiles
        shorter = cutlass.max(shorter, tiles if tiles <= later else Int32(0))
        found = cute.arch.vote_ballot_sync(tiles > later and tiles <= longest)
        begin, end = end, end + cute.arch.popc(found)
    # The lane before which as many bits are set as numbers before this one.
    mine = (found >> lane) % 2 != 0 and cute.arch.popc(found & ((Int32(1) << lane) - 1)) == number - begin
    sequence = base + _first_bit(cute.arch.vote_ballot_sync(mine))
    return sequence if longest > 0 else calls.batch, Draws(longest, shorter, base, found, begin, end)


@cute.jit
def _first_bit(bits: Int32) -> Int32:
    """The lowest bit that is set; 32 where none is."""
    return cute.arch.popc((bits & -bits) - 1)
