"""The decode kernel: few query rows on long KV caches, contiguous or paged, split over the keys.

A fixed number of programs shares the work, which they lay out themselves from the lengths on the device: a grid made
for the capacity would spend its time on empty blocks. As many programs as there are KV heads form a team, one for each
head, and read the same keys at the same time, since the heads of a key lie side by side in memory. The tiles of keys of
all sequences stand in one row, cut into equal shares, one a team; one loop walks a share's tiles without a break, so
that the next tile is on its way from memory while one sequence ends and another begins. The walk is computed twice,
ahead for the loads and behind for the arithmetic.

A share begins and ends where a chunk does, and where chunks begin depends on nothing but the sequence's own length.
Each chunk has a softmax of its own, folded into the sequence's in order: in registers where one program has all that
came before, else in memory, by the program that ends last. The operations are the same either way, so results depend
neither on the batch nor on who computed what.

The products are transposed, S^T = K Q^T and O^T = V^T P^T: keys and value columns, of which there are many, lie along
the tensor cores' long side, and the few query rows along the short one, so that no warp repeats another's work.
Sources: Dao et al., "Flash-Decoding for long-context inference" (2023) for the split; Kwon et al., "PagedAttention"
(2023) for the page table; Shah et al., "FlashAttention-3" (2024) for packing the query heads of a KV head.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fa4_triton.steps import LN_2, LOG2_E, Statistics, Strided, Values, block_of, key_tiles, log2_scores, visible


@triton.constexpr_function
def merge_step(dim_v):
    """Parts that are read at once in a merge, for all that fits into registers waits for memory but once."""
    return max(1, min(16, 8192 // (dim_v * MERGED)))


class Rows(NamedTuple):
    """Where query rows and valid keys lie, by sequence. Pointers are int32 or None; counts are rows.

    cu_q, used_q: as in `steps.Sequences`; without cu_q a sequence holds rows_q rows. used_k: valid keys, or without it
    length_k for every sequence; `added` more were appended since, and the first leftpad are none. cache: for each
    sequence its row of a contiguous cache, or None for its own number. pages: (batch, stride_pages) page numbers, or
    None for a contiguous cache of rows_k rows and n_blocks batch elements (paged: rows a table reaches, and pages).
    """

    cu_q: tl.tensor
    used_q: tl.tensor
    used_k: tl.tensor
    leftpad: tl.tensor
    cache: tl.tensor
    pages: tl.tensor
    stride_pages: tl.tensor
    batch: tl.tensor
    rows_q: tl.tensor
    rows_k: tl.tensor
    n_blocks: tl.tensor
    length_k: tl.tensor
    added: tl.tensor


MOST_CHUNKS = 32
"""Chunks that a sequence has by default at most; see `keys_of`."""
HELD = tl.constexpr(2**16)
"""Unit of `Splits.arrivals`."""
MERGED = tl.constexpr(4)
"""Query rows that are merged at once."""


class Splits(NamedTuple):
    """Work space of the split, for each sequence and KV head (a pair).

    parts: float32, for each of `slots` chunks O unnormalised (rows, DIM_V), and after them all, for each row of each,
    its maximum (log2 units) and its sum. arrivals: int32 for each pair, 0 between launches: the chunks that arrived,
    and in units of HELD how many of them the first part holds. `wanted`: chunks a sequence, 0 for the default.
    """

    parts: tl.tensor
    arrivals: tl.tensor
    slots: tl.tensor
    wanted: tl.tensor


class Descale(NamedTuple):
    """float32 factor of an fp8 cache by (batch, KV head): pointer (or None) and strides in elements."""

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor


class Keys(NamedTuple):
    """The keys of a sequence (or of a vector of them): padded rows before them, their number, the tiles that are
    visited from `begin` on (one at least), and the chunks of these."""

    pad: tl.tensor
    length: tl.tensor
    begin: tl.tensor
    tiles: tl.tensor
    chunks: tl.tensor


@triton.jit
def valid_keys(rows, i, within):
    """(pad, length): the padded rows and the valid keys of sequence i; clamped, whatever the device says."""
    filled = i * 0 + rows.length_k
    if rows.used_k is not None:
        filled = tl.load(rows.used_k + i, mask=within, other=0)
    # Clamped before and after the sum: a wild length must not wrap around.
    filled = tl.minimum(tl.minimum(tl.maximum(filled, 0), rows.rows_k) + rows.added, rows.rows_k)
    pad = i * 0
    if rows.leftpad is not None:
        pad = tl.minimum(tl.maximum(tl.load(rows.leftpad + i, mask=within, other=0), 0), filled)
    return pad, filled - pad


@triton.jit
def keys_of(rows, values, splits, i, TILE_N: tl.constexpr):
    """The keys of sequence i, a number or a vector; past the last sequence they are empty."""
    pad, length = valid_keys(rows, i, i < rows.batch)
    begin, _, _, end = key_tiles(values, 0, rows.rows_q - 1, rows.rows_q, length, TILE_N)
    tiles = tl.maximum(end - begin, 1)
    # Up to 128 tiles, 16 chunks of two tiles or more: a short sequence alone gives work to many programs. Beyond, 32:
    # enough for a long one, and few enough to merge.
    chunks = tl.where(tiles <= 128, tl.minimum(tl.maximum(tiles // 2, 1), 16), 32)
    if splits.wanted > 0:
        chunks = tl.minimum(splits.wanted, tiles)
    return Keys(pad, length, begin, tiles, chunks)


@triton.jit
def part_begin(tiles, part, parts):
    """The tile at which a part of a sequence begins, cut into so many that they differ by a tile at most."""
    whole = tiles // parts
    return whole * part + (tiles - whole * parts) * part // parts


@triton.jit
def nearest_chunk(keys, before, at):
    """The chunk that begins nearest to tile `at`, of a sequence whose tiles begin at `before`, or the next one's first.

    Nearest but for rounding, which is spelled out: a share has to end where the next one begins. Returns (sequences
    passed, chunk, tile in the sequence, its place among all tiles).
    """
    tiles_before = (at - before).to(tl.float32)
    chunk = tl.fma(tiles_before * keys.chunks, 1.0 / keys.tiles.to(tl.float32), 0.5).to(tl.int32)
    chunk = tl.minimum(chunk, keys.chunks)
    tile = part_begin(keys.tiles, chunk, keys.chunks)
    passed = (chunk == keys.chunks).to(tl.int32)
    return passed, tl.where(passed == 1, 0, chunk), tl.where(passed == 1, 0, tile), before + tile


@triton.jit
def tiles_of(rows, values, splits, i, TILE_N: tl.constexpr):
    """The tiles of a vector of sequences; 0 past the last sequence."""
    return tl.where(i < rows.batch, keys_of(rows, values, splits, i, TILE_N).tiles, 0)


@triton.jit
def four_tiles(rows, values, splits, i, TILE_N: tl.constexpr):
    """The tiles of the sequences i, i + 1, i + 2 and i + 3."""
    return (
        tiles_of(rows, values, splits, i, TILE_N),
        tiles_of(rows, values, splits, i + 1, TILE_N),
        tiles_of(rows, values, splits, i + 2, TILE_N),
        tiles_of(rows, values, splits, i + 3, TILE_N),
    )


@triton.jit
def find_share(rows, values, splits, team, teams, TILE_N: tl.constexpr):
    """The share of a team: (sequence, chunk and tile in it, number of tiles).

    It begins with the chunk that begins nearest to the team's place among all tiles. Where sequences are alike, a share
    is a number of whole ones, so that nothing is merged, or, of fewer sequences than teams, one piece of a single one.

    Nothing is loaded before the share is known, so this is made to be short. A vector of 32 numbers lies in every warp,
    and no sum waits for other warps; a lane takes four sequences. Sums of one number each are one instruction in 32
    bits, which 2^29 keys a sequence do not exceed within a step.
    """
    LANES: tl.constexpr = 32
    STEP: tl.constexpr = 4 * LANES
    lane = tl.arange(0, LANES)
    total = tl.zeros([], tl.int64)
    most = 0
    for start in range(0, rows.batch, STEP):
        t0, t1, t2, t3 = four_tiles(rows, values, splits, start + 4 * lane, TILE_N)
        total += tl.sum(t0 + t1 + t2 + t3, 0)
        most = tl.maximum(most, tl.max(tl.maximum(tl.maximum(t0, t1), tl.maximum(t2, t3)), 0))
    # Sequences in `pieces` (one, unless there are fewer sequences than teams, and no more than the first one's chunks),
    # `each` for every team that takes some: where that leaves few teams idle, and the longest share is within 5 % of
    # the mean.
    keys = keys_of(rows, values, splits, 0, TILE_N)
    pieces = tl.maximum(tl.minimum(teams // rows.batch, keys.chunks), 1)
    each = (rows.batch + teams - 1) // teams
    taking = (rows.batch + each - 1) // each
    alike = tl.cast(each * taking, tl.int64) * most * 20 <= total * 21
    by_pieces = alike & (taking * pieces * 16 >= teams * 15)
    # A division of 64 bits takes a subroutine.
    size = tl.cast(total.to(tl.int32) // teams, tl.int64) if total < 2**31 else total // teams
    rest = (total - size * teams).to(tl.int32)
    first = size * team + tl.minimum(team, rest)
    last = first + size + (team < rest)
    if by_pieces:
        first = tl.cast(tl.minimum(team * each, rows.batch * pieces), tl.int64)
        last = tl.minimum(first + each, rows.batch * pieces)
    first_sequence = 0
    last_sequence = 0
    before_first = tl.zeros([], tl.int64)
    before_last = tl.zeros([], tl.int64)
    counted = tl.zeros([], tl.int64)
    for start in range(0, rows.batch, STEP):
        i = start + 4 * lane
        t0, t1, t2, t3 = four_tiles(rows, values, splits, i, TILE_N)
        of_lane = t0 + t1 + t2 + t3
        end = counted + (tl.cumsum(of_lane, 0) - of_lane)
        passed_first = tl.zeros([LANES], tl.int32)
        passed_last, tiles_first, tiles_last = passed_first, passed_first, passed_first
        for j in tl.static_range(4):
            tiles = t0 if j == 0 else t1 if j == 1 else t2 if j == 2 else t3
            end += tiles
            place = tl.where(by_pieces, (i + j + 1) * pieces, end)
            by_first = ((place <= first) & (i + j < rows.batch)).to(tl.int32)
            by_last = ((place <= last) & (i + j < rows.batch)).to(tl.int32)
            passed_first += by_first
            passed_last += by_last
            tiles_first += by_first * tiles
            tiles_last += by_last * tiles
        counted += tl.sum(of_lane, 0)
        first_sequence += tl.sum(passed_first, 0)
        before_first += tl.sum(tiles_first, 0)
        last_sequence += tl.sum(passed_last, 0)
        before_last += tl.sum(tiles_last, 0)
    keys = keys_of(rows, values, splits, last_sequence, TILE_N)
    if by_pieces:
        last = before_last + part_begin(keys.tiles, (last - last_sequence * pieces).to(tl.int32), pieces)
    _, _, _, end = nearest_chunk(keys, before_last, last)
    keys = keys_of(rows, values, splits, first_sequence, TILE_N)
    if by_pieces:
        first = before_first + part_begin(keys.tiles, (first - first_sequence * pieces).to(tl.int32), pieces)
    passed, chunk, tile, begin = nearest_chunk(keys, before_first, first)
    return first_sequence + passed, chunk, tile, (end - begin).to(tl.int32)


@triton.jit
def block_number(rows, sequence):
    """The batch element of a contiguous cache that holds a sequence; clamped into the cache."""
    number = sequence
    if rows.cache is not None:
        number = tl.load(rows.cache + sequence, mask=sequence < rows.batch, other=0)
        number = tl.minimum(tl.maximum(number, 0), rows.n_blocks - 1)
    return number


@triton.constexpr_function
def pages_of(page, tile_n, padded):
    """Pages of a tile, where each holds as many of its keys and begins with one of them; else 0."""
    whole = 0 if padded else tile_n // page if tile_n % page == 0 else int(page % tile_n == 0)
    return whole if whole <= 8 else 0


@triton.jit
def page_numbers(rows, sequence, pad, length, first, PAGE: tl.constexpr, TILE_N: tl.constexpr):
    """The pages of TILE_N keys from `first` on, clamped: a number of each page (`pages_of`), else one of each key."""
    PAGES: tl.constexpr = pages_of(PAGE, TILE_N, rows.leftpad is not None)
    there = (sequence < rows.batch) & (length > 0)
    last = tl.maximum(length - 1, 0)
    place = rows.pages + sequence.to(tl.int64) * rows.stride_pages
    if PAGES > 0:
        numbers = ()
        for j in tl.static_range(PAGES):
            page = tl.load(place + tl.minimum(first // PAGE + j, last // PAGE), mask=there & (first >= 0), other=0)
            numbers = numbers + (tl.minimum(tl.maximum(page, 0), rows.n_blocks - 1),)  # noqa: RUF005 (no * in Triton)
        return numbers
    else:
        key = first + tl.arange(0, TILE_N)
        page = tl.load(place + (pad + tl.minimum(key, last)) // PAGE, mask=there & (key >= 0), other=0)
        return (tl.minimum(tl.maximum(page, 0), rows.n_blocks - 1),)


@triton.jit
def cache_rows(cache, rows, block, pad, first, PAGE: tl.constexpr, TILE_N: tl.constexpr):
    """Offsets in elements of TILE_N keys' rows from `first` on, without the head; block: batch element or page(s)."""
    key = tl.arange(0, TILE_N)
    if PAGE == 0:
        base = block.to(tl.int64) * cache.stride_b + (pad + first).to(tl.int64) * cache.stride_s
        offsets = base + key * cache.stride_s
    else:
        PAGES: tl.constexpr = pages_of(PAGE, TILE_N, rows.leftpad is not None)
        if PAGES == 1:
            base = block[0].to(tl.int64) * cache.stride_b + (first % PAGE).to(tl.int64) * cache.stride_s
            offsets = base + key * cache.stride_s
        elif PAGES > 1:
            # Which page a row lies in is known to the compiler, so choosing costs nothing. Pages are chosen, not their
            # offsets: of a choice, Triton 3.9 does not know that it is a multiple of the stride's alignment.
            page = block[0]
            for j in tl.static_range(1, PAGES):
                page = tl.where(key // PAGE == j, block[j], page)
            offsets = page.to(tl.int64) * cache.stride_b + key % PAGE * cache.stride_s
        else:
            offsets = block[0].to(tl.int64) * cache.stride_b + ((pad + first + key) % PAGE) * cache.stride_s
    return offsets


@triton.jit
def load_cache(cache, head, offsets, seen, like: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """(keys, D) tile in dtype `like`, zero where not seen; fp8 e4m3 comes as bytes and is 2^-8 times its value."""
    column = tl.arange(0, D)
    ptrs = cache.ptr + (head.to(tl.int64) * cache.stride_h + offsets)[:, None] + column[None, :]
    mask = seen[:, None]
    if DIM != D:
        mask = mask & (column < DIM)[None, :]
    tile = tl.load(ptrs, mask=mask, other=0)
    if cache.ptr.dtype.element_ty == tl.uint8:
        bits = tile.to(tl.uint16)
        magnitude = bits & 0x7F
        # Sign, exponent and mantissa in float16's places; NaN, the one value without a number, is all ones.
        half = ((bits & 0x80) << 8) | tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7)
        tile = half.to(tl.uint16).to(tl.float16, bitcast=True).to(like)
    return tile


@triton.jit
def descale_of(cache, descale, sequence, head):
    """What the elements of a cache as `load_cache` gives them are to be multiplied with."""
    factor = 1.0
    if cache.ptr.dtype.element_ty == tl.uint8:
        factor = 256.0
        if descale.ptr is not None:
            factor *= tl.load(descale.ptr + sequence * descale.stride_b + head * descale.stride_h)
    return factor


@triton.jit
def attend_tile(q_tile, k_tile, v_tile, values, scale_k, row_q, key, len_q, len_k, state, FP8: tl.constexpr):
    """Folds one tile into (O^T, row maxima, sums by key): the online softmax, with the running maximum followed.

    The sums stay apart by key until a chunk ends: one reduction across warps instead of one a tile.
    """
    acc, row_max, sums = state
    products = tl.dot(k_tile, q_tile.T, input_precision=values.precision)
    if FP8:
        products *= scale_k
    scores, factor = log2_scores(values, products)
    seen = visible(values, row_q[None, :], key[:, None], len_q, len_k)
    scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 0) * factor)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - pivot)
    p = tl.exp2(scores * factor - pivot[None, :])
    sums = sums * rescale[None, :] + p
    acc = tl.dot(v_tile.T, p.to(q_tile.dtype), acc * rescale[None, :], input_precision=values.precision)
    return acc, new_max, sums


@triton.jit
def fold_chunk(whole, part):
    """(O^T, row maxima, row sums) of what came before and of one chunk, as one; the roundings are spelled out."""
    acc, row_max, row_sum = whole
    part_acc, part_max, part_sum = part
    top = tl.maximum(row_max, part_max)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(row_max - pivot)
    part_factor = tl.exp2(part_max - pivot)
    acc = tl.fma(part_acc, tl.broadcast_to(part_factor[None, :], part_acc.shape), acc * factor[None, :])
    return acc, top, tl.fma(part_sum, part_factor, row_sum * factor)


@triton.jit
def part_pointers(splits, pairs, pair, slot, row, n_rows, BYTES: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr):
    """Pointers to a part's O^T (DV, rows), of which n_rows are there, to its row maxima, and the mask of O^T.

    BYTES: that are moved at once, of rows of 32 bytes or a multiple.
    """
    first = (pair * splits.slots + slot) * n_rows
    base = tl.multiple_of(splits.parts + first * DIM_V, BYTES)
    column = tl.arange(0, DV)
    statistics = splits.parts + pairs * splits.slots * n_rows * DIM_V + 2 * (first + row)
    mask = tl.broadcast_to((row < n_rows)[None, :], [DV, row.shape[0]])
    if DIM_V != DV:
        mask = mask & (column < DIM_V)[:, None]
    return base + (row[None, :] * DIM_V + column[:, None]), statistics, mask


@triton.jit
def store_part(splits, pairs, pair, slot, row, n_rows, state, DIM_V: tl.constexpr, DV: tl.constexpr):
    """Stores a chunk's state (O^T, row maxima, row sums)."""
    acc, row_max, row_sum = state
    # 16 bytes at once would cost shared memory that the second program needs.
    outs, statistics, mask = part_pointers(splits, pairs, pair, slot, row, n_rows, 8, DIM_V, DV)
    tl.store(outs, acc, mask=mask)
    tl.store(statistics, row_max, mask=row < n_rows)
    tl.store(statistics + 1, row_sum, mask=row < n_rows)


@triton.jit
def merge_parts(splits, pairs, pair, held, chunks, row, n_rows, DIM_V: tl.constexpr, DV: tl.constexpr):
    """The state of MERGED rows over a pair's chunks, folded in their order; the first part holds `held` of them.

    A kernel meets this code when it ends, and waits for it to come from memory: it is meant to be few instructions.
    """
    state = (
        tl.zeros([DV, MERGED], tl.float32),
        tl.full([MERGED], float("-inf"), tl.float32),
        tl.zeros([MERGED], tl.float32),
    )
    STEP: tl.constexpr = merge_step(DV)
    outs, statistics, mask = part_pointers(splits, pairs, pair, 0, row, n_rows, 16, DIM_V, DV)
    # Part 0, and then the chunks that it does not hold.
    for at in range(held - 1, chunks, STEP):
        for j in tl.static_range(STEP):
            before = tl.where(at + j < held, 0, at + j) * n_rows.to(tl.int64)
            used = (row < n_rows) & (at + j < chunks)
            acc = tl.load(outs + before * DIM_V, mask=mask & (at + j < chunks), other=0.0, cache_modifier=".cg")
            row_max = tl.load(statistics + 2 * before, mask=used, other=float("-inf"), cache_modifier=".cg")
            row_sum = tl.load(statistics + 2 * before + 1, mask=used, other=0.0, cache_modifier=".cg")
            state = fold_chunk(state, (acc, row_max, row_sum))
    return state


@triton.jit
def with_sink(lse, logit):
    """LSE (log2 units) with one more logit (natural-log units), and the factor that O takes."""
    logit = logit * LOG2_E
    top = tl.maximum(lse, logit)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(lse - pivot) + tl.exp2(logit - pivot)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    return tl.where(some, top + tl.log2(total), float("-inf")), tl.exp2(lse - pivot) / total


@triton.jit
def store_result(out, lse, sink, batch, start_q, head, row_q, used, scale_v, state, DIM_V: tl.constexpr,
                 DV: tl.constexpr):  # fmt: skip
    """Normalises a state (O^T, row maxima, row sums), adds the sink, and stores out and, if wanted, lse."""
    acc, row_max, row_sum = state
    some = row_sum != 0.0
    row_sum = tl.where(some, row_sum, 1.0)
    row_lse = tl.where(some, row_max + tl.log2(row_sum), float("-inf"))
    factor = scale_v / row_sum
    if sink is not None:
        row_lse, share = with_sink(row_lse, tl.load(sink + head, mask=used, other=0.0).to(tl.float32))
        factor *= share
    column = tl.arange(0, DV)
    position = (start_q + row_q).to(tl.int64)
    batch = batch.to(tl.int64)
    at = out.ptr + batch * out.stride_b + position * out.stride_s + head * out.stride_h
    o = (acc * factor[None, :]).to(out.ptr.dtype.element_ty)
    tl.store(at[None, :] + column[:, None], o, mask=used[None, :] & (column < DIM_V)[:, None])
    if lse.ptr is not None:
        at = lse.ptr + batch * lse.stride_b + position * lse.stride_s + head * lse.stride_h
        tl.store(at, row_lse * LN_2, mask=used)


@triton.jit
def attention_decode(
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    lse: Statistics,
    sink,
    rows: Rows,
    values: Values,
    splits: Splits,
    heads_kv,
    k_descale: Descale,
    v_descale: Descale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Writes out and lse; any number of programs may share the work. All query rows of a KV head fit into one tile.

    ROWS: query rows of a tile, of which row r is query r // GROUP of the KV head's query head r % GROUP. PAGE: rows of
    a page, 0 for a contiguous cache.
    """
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    FP8: tl.constexpr = k.ptr.dtype.element_ty == tl.uint8
    head_kv = tl.program_id(0) % heads_kv
    teams = tl.num_programs(0) // heads_kv
    sequence, ended, tile, n_tiles = find_share(rows, values, splits, tl.program_id(0) // heads_kv, teams, TILE_N)
    keys = keys_of(rows, values, splits, sequence, TILE_N)
    row = tl.arange(0, ROWS)
    row_q = row // GROUP
    used = row_q < rows.rows_q
    n_rows = rows.rows_q * GROUP
    pairs = tl.cast(rows.batch, tl.int64) * heads_kv
    column = tl.arange(0, D)
    q_rows = (row_q * q.stride_s + (row % GROUP) * q.stride_h)[:, None] + column[None, :]
    q_mask = used[:, None] & (column < DIM)[None, :]

    # What the loads are at, one stage or more ahead of the arithmetic.
    load_sequence, load_tile, load_keys = sequence, tile, keys
    if PAGE == 0:
        block = block_number(rows, sequence)
    else:
        first = (keys.begin + tile) * TILE_N
        block = page_numbers(rows, sequence, keys.pad, keys.length, first, PAGE, TILE_N)
    # Whether an earlier program has the sequence's first chunks, and so its place among the parts.
    inherited = tile > 0
    first_sequence, first_chunks = sequence, keys.chunks
    stored = 0
    # `ended`: chunks of the sequence that end before `tile`.
    chunk_end = part_begin(keys.tiles, ended + 1, keys.chunks)
    scale_k = descale_of(k, k_descale, tl.minimum(sequence, rows.batch - 1), head_kv)
    nothing = (
        tl.zeros([DV, ROWS], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )
    whole = nothing
    state = (nothing[0], nothing[1], tl.zeros([TILE_N, ROWS], tl.float32))
    for _ in range(n_tiles):
        first = (load_keys.begin + load_tile) * TILE_N
        valid = first + tl.arange(0, TILE_N) < load_keys.length
        # Read for each tile anew, out of L2, and so in flight with the keys when the sequence changes.
        base = q.ptr + load_sequence.to(tl.int64) * q.stride_b + head_kv.to(tl.int64) * (GROUP * q.stride_h)
        q_tile = tl.load(base + q_rows, mask=q_mask, other=0.0)
        k_rows = cache_rows(k, rows, block, load_keys.pad, first, PAGE, TILE_N)
        k_tile = load_cache(k, head_kv, k_rows, valid, q_tile.dtype, DIM, D)
        v_rows = cache_rows(v, rows, block, load_keys.pad, first, PAGE, TILE_N)
        v_tile = load_cache(v, head_kv, v_rows, valid, q_tile.dtype, DIM_V, DV)
        load_tile += 1
        over = load_tile == load_keys.tiles
        load_tile = tl.where(over, 0, load_tile)
        load_sequence += over.to(tl.int32)
        # Where an `if` gives nothing but numbers of blocks, Triton does not pipeline the loop (3.6 to 3.9, seen).
        if rows.used_k is not None or rows.leftpad is not None:  # known to the compiler  # noqa: SIM102
            if over:
                load_keys = keys_of(rows, values, splits, load_sequence, TILE_N)
        if PAGE == 0:
            # Past the last sequence nothing is loaded.
            next_block = block_number(rows, tl.where(over, load_sequence, rows.batch))
            block = tl.where(over, next_block, block)
        if PAGE != 0:
            first = (load_keys.begin + load_tile) * TILE_N
            block = page_numbers(rows, load_sequence, load_keys.pad, load_keys.length, first, PAGE, TILE_N)

        key = (keys.begin + tile) * TILE_N + tl.arange(0, TILE_N)
        state = attend_tile(q_tile, k_tile, v_tile, values, scale_k, row_q, key, rows.rows_q, keys.length, state, FP8)
        tile += 1
        if tile == chunk_end:
            part = (state[0], state[1], tl.sum(state[2], 0))
            if inherited:
                number = sequence.to(tl.int64) * heads_kv + head_kv
                store_part(splits, pairs, number, ended, row, n_rows, part, DIM_V, DV)
                stored += 1
            else:
                whole = fold_chunk(whole, part)
            state = (nothing[0], nothing[1], tl.zeros([TILE_N, ROWS], tl.float32))
            ended += 1
            chunk_end = part_begin(keys.tiles, ended + 1, keys.chunks)
            if tile == keys.tiles:
                if not inherited:
                    head = head_kv * GROUP + row % GROUP
                    scale_v = descale_of(v, v_descale, sequence, head_kv)
                    store_result(out, lse, sink, sequence, 0, head, row_q, used, scale_v, whole, DIM_V, DV)
                whole = nothing
                inherited = tile < 0
                tile = 0
                sequence += 1
                keys = keys_of(rows, values, splits, sequence, TILE_N)
                ended = tile
                chunk_end = keys.tiles // keys.chunks
                scale_k = descale_of(k, k_descale, tl.minimum(sequence, rows.batch - 1), head_kv)

    # Sequences that this program shares with others: the one it began within, and the one it ended within.
    began = stored > 0
    ends = (ended > 0) & (inherited == 0)
    if ends:
        number = sequence.to(tl.int64) * heads_kv + head_kv
        store_part(splits, pairs, number, 0, row, n_rows, whole, DIM_V, DV)
    if began | ends:
        which = tl.arange(0, 2)
        news = tl.where(which == 0, stored, ended * (HELD + 1))
        place = tl.where(which == 0, first_sequence, sequence).to(tl.int64) * heads_kv + head_kv
        tl.debug_barrier()  # every thread's part is written before one of them says so
        mask = tl.where(which == 0, began, ends)
        news += tl.atomic_add(splits.arrivals + place, news, mask=mask, sem="acq_rel", scope="gpu")
        for side in range(2):
            arrived = tl.sum(tl.where(which == side, news, 0), 0)
            batch = tl.where(side == 0, first_sequence, sequence)
            chunks = tl.where(side == 0, first_chunks, keys.chunks)
            if tl.where(side == 0, began, ends) & (arrived % HELD == chunks):
                number = batch.to(tl.int64) * heads_kv + head_kv
                tl.store(splits.arrivals + number, 0)
                scale_v = descale_of(v, v_descale, batch, head_kv)
                for begin in range(0, n_rows, MERGED):
                    part_row = begin + tl.arange(0, MERGED)
                    merged = merge_parts(splits, pairs, number, arrived // HELD, chunks, part_row, n_rows, DIM_V, DV)
                    head = head_kv * GROUP + part_row % GROUP
                    store_result(
                        out, lse, sink, batch, 0, head, part_row // GROUP, part_row < n_rows, scale_v, merged, DIM_V, DV
                    )
