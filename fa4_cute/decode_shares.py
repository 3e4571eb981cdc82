"""Which keys a block of the decode kernel works on.

The blocks of one KV head each form a team, which read the same keys at the same time, since the heads of a key lie side
by side in memory. The key tiles of all sequences stand in one row, cut into equal shares, one a team. A cut is moved to
where the nearest chunk of tiles begins, and where chunks begin depends on nothing but the sequence's own length: each
chunk has a softmax of its own, folded into the sequence's in order, so results depend neither on the batch nor on who
computed what.

Multiprocessors do not read equally fast, by a quarter on an H100. Where sequences are short beside a share (`DRAWN`),
blocks therefore draw whole ones, as they get there, and all end at about the same time.
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
"""How many of the longest sequence a share has to hold for sequences to be drawn: the last ones end within so much."""


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
def tiles_there(sequence: Int32, keys: Keys, calls: Calls) -> Int32:
    """Tiles of a sequence, whose keys these are; none past the last one."""
    return keys.tiles if sequence < calls.batch else Int32(0)


@cute.jit
def find_share(
    team: Int32, teams: Int32, calls: Calls, window: Window, tile_n: cutlass.Constexpr[int]
) -> tuple[Share, Boolean]:
    """The first share of a team, and whether it draws more of them; called by a whole warp.

    Its lanes look at 32 sequences at a time.
    """
    lane = cute.arch.lane_idx()
    total, longest, tiles = Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, calls.batch, LANES, unroll=1):
        keys = keys_of(base + lane, calls, window, tile_n)
        tiles = tiles_there(base + lane, keys, calls)
        total += tiles
        longest = cutlass.max(longest, keys.tiles)
    total, longest = cute.arch.warp_redux_sync(total, "add"), cute.arch.warp_redux_sync(longest, "max")
    share = Share(team, Int32(0), Int32(0), Int32(0))
    drawn = Float32(longest) * DRAWN * Float32(teams) <= Float32(total)
    if drawn:
        share = Share(team, Int32(0), Int32(0), tiles_there(team, keys_of(team, calls, window, tile_n), calls))
    else:
        share = _between(_cut(total, team + lane % 2, teams), tiles, calls, window, tile_n)
    return share, drawn


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
            tiles = tiles_there(base + lane, keys_of(base + lane, calls, window, tile_n), calls)
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
