"""The KV-cache kernel: few query rows on long caches, contiguous or paged, split over the keys.

A fixed number of programs shares the work, which they lay out themselves from the lengths on the device: a grid made
for the capacity would spend its time on empty blocks. One item of work is one chunk of one sequence's keys, for one KV
head and one block of its packed query rows. Where chunks begin depends on nothing but the sequence's own lengths, and a
row's chunks are merged in their order, by whichever program ends last: so results depend neither on the batch nor on
who computed what.

The products are transposed, S^T = K Q^T and O^T = V^T P^T: keys and value columns, of which there are many, lie along
the tensor cores' long side, and the few query rows along the short one, so that no warp repeats another's work.
Sources: Dao et al., "Flash-Decoding for long-context inference" (2023) for the split; Kwon et al., "PagedAttention"
(2023) for the page table; Shah et al., "FlashAttention-3" (2024) for packing the query heads of a KV head.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fa4_triton.steps import (
    LN_2,
    LOG2_E,
    Statistics,
    Strided,
    Values,
    block_of,
    key_tiles,
    log2_scores,
    visible,
)

MAX_SPLITS = tl.constexpr(64)
MERGE_STEP = tl.constexpr(8)


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
    page_size: tl.tensor
    batch: tl.tensor
    rows_q: tl.tensor
    rows_k: tl.tensor
    n_blocks: tl.tensor
    length_k: tl.tensor
    added: tl.tensor


class Splits(NamedTuple):
    """Work space of the split: float32 O and LSE (log2 units) of each chunk, int32 arrivals (zero between launches).

    `wanted` chunks a sequence, 0 for the default; `slots` is how many the work space holds. Without a split: None.
    """

    out: tl.tensor
    lse: tl.tensor
    arrivals: tl.tensor
    wanted: tl.tensor
    slots: tl.tensor


class Descale(NamedTuple):
    """float32 factor of an fp8 cache by (batch, KV head): pointer (or None) and strides in elements."""

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor


class Layout(NamedTuple):
    """One sequence's part of the work; also for a vector of sequences. Tiles are TILE_N keys."""

    start_q: tl.tensor
    len_q: tl.tensor
    pad: tl.tensor
    len_k: tl.tensor
    begin: tl.tensor
    chunk: tl.tensor
    chunks: tl.tensor
    blocks: tl.tensor
    unit: tl.tensor


@triton.jit
def layout_of(rows, values, splits, i, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE_N: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """Layout of sequence i (a number or a vector). `unit` is the cost of one block of rows: tiles, and one a chunk."""
    within = i < rows.batch
    if rows.cu_q is None:
        start_q = i * 0
        len_q = i * 0 + rows.rows_q
    else:
        start_q = tl.minimum(tl.maximum(tl.load(rows.cu_q + i, mask=within, other=0), 0), rows.rows_q)
        end_q = tl.minimum(tl.load(rows.cu_q + i + 1, mask=within, other=0), rows.rows_q)
        len_q = tl.maximum(end_q - start_q, 0)
    if rows.used_q is not None:
        len_q = tl.minimum(tl.maximum(tl.load(rows.used_q + i, mask=within, other=0), 0), len_q)
    filled = i * 0 + rows.length_k
    if rows.used_k is not None:
        filled = tl.load(rows.used_k + i, mask=within, other=0)
    # Clamped before and after the sum: a wild length must not wrap around.
    filled = tl.minimum(tl.minimum(tl.maximum(filled, 0), rows.rows_k) + rows.added, rows.rows_k)
    pad = i * 0
    if rows.leftpad is not None:
        pad = tl.minimum(tl.maximum(tl.load(rows.leftpad + i, mask=within, other=0), 0), filled)
    len_k = filled - pad
    begin, _, _, end = key_tiles(values, 0, len_q - 1, len_q, len_k, TILE_N)
    tiles = tl.where(len_q > 0, end - begin, 0)
    blocks = tl.maximum((len_q * GROUP + ROWS - 1) // ROWS, 1)
    if splits.out is None:
        chunk = tiles
    else:
        default = CHUNK * tl.maximum((tiles + CHUNK * MAX_SPLITS - 1) // (CHUNK * MAX_SPLITS), 1)
        chunk = tl.where(splits.wanted > 0, (tiles + splits.wanted - 1) // tl.maximum(splits.wanted, 1), default)
    chunk = tl.maximum(chunk, 1)
    chunks = tl.maximum((tiles + chunk - 1) // chunk, 1)
    return Layout(start_q, len_q, pad, len_k, begin, chunk, chunks, blocks, tiles + chunks)


@triton.jit
def find_work(rows, values, splits, heads_kv, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE_N: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """This program's share, as costs from `first` to `last`, and where it begins: (first, last, sequence, before).

    `before` is the cost of the sequences before `sequence`.
    """
    STEP: tl.constexpr = 128
    total = tl.zeros([], tl.int64)
    for at in range(0, rows.batch, STEP):
        i = at + tl.arange(0, STEP)
        layout = layout_of(rows, values, splits, i, GROUP, ROWS, TILE_N, CHUNK)
        cost = (layout.unit * layout.blocks).to(tl.int64) * heads_kv
        total += tl.sum(tl.where(i < rows.batch, cost, 0), 0)
    first = total * tl.program_id(0) // tl.num_programs(0)
    last = total * (tl.program_id(0) + 1) // tl.num_programs(0)
    sequence = 0
    before = tl.zeros([], tl.int64)
    counted = tl.zeros([], tl.int64)
    for at in range(0, rows.batch, STEP):
        i = at + tl.arange(0, STEP)
        layout = layout_of(rows, values, splits, i, GROUP, ROWS, TILE_N, CHUNK)
        cost = tl.where(i < rows.batch, (layout.unit * layout.blocks).to(tl.int64) * heads_kv, 0)
        ends = counted + tl.cumsum(cost, 0)
        passed = (ends <= first) & (i < rows.batch)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        counted += tl.sum(cost, 0)
    return first, last, sequence, before


@triton.jit
def pages_of(rows, sequence, pad, len_k, key):
    """Cache rows' blocks for keys of a sequence: numbers of pages, or of the sequence's one batch element."""
    position = pad + tl.minimum(key, tl.maximum(len_k - 1, 0))
    page = tl.load(rows.pages + sequence.to(tl.int64) * rows.stride_pages + position // rows.page_size)
    return tl.minimum(tl.maximum(page, 0), rows.n_blocks - 1)


@triton.jit
def cache_rows(cache, rows, block, pad, first, key):
    """Offsets in elements of the keys' rows in the cache, whose numbers start at `first`; head not included."""
    if rows.pages is None:
        base = block.to(tl.int64) * cache.stride_b + (pad + first).to(tl.int64) * cache.stride_s
        return base + (key - first) * cache.stride_s
    else:
        return block.to(tl.int64) * cache.stride_b + ((pad + key) % rows.page_size) * cache.stride_s


@triton.jit
def load_cache(cache, offsets, seen, like, DIM: tl.constexpr, D: tl.constexpr):
    """(keys, D) tile in `like`'s dtype, zero where not seen; fp8 e4m3 comes as bytes and is 2^-8 times its value."""
    column = tl.arange(0, D)
    ptrs = cache.ptr + offsets[:, None] + column[None, :]
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
def attend_chunk(
    q_tile, k, v, rows, values, scale_k, sequence, block, head_kv, row_q, layout, begin, end,
    DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """O^T (DV, rows), normalised, and LSE (log2 units) of the key tiles begin to end."""
    ROWS: tl.constexpr = q_tile.shape[0]
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = block_of(DIM_V)
    k = Strided(k.ptr + head_kv.to(tl.int64) * k.stride_h, k.stride_b, k.stride_s, 0, None)
    v = Strided(v.ptr + head_kv.to(tl.int64) * v.stride_h, v.stride_b, v.stride_s, 0, None)
    values = Values(values.scale * scale_k, values.softcap, values.left, values.right, None)
    acc = tl.zeros([DV, ROWS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    # Sums stay apart by key until the end: one reduction across warps instead of one a tile.
    sums = tl.zeros([TILE_N, ROWS], tl.float32)
    if rows.pages is not None:
        # Page numbers are read one tile ahead, so that no load of keys waits for them.
        block = pages_of(rows, sequence, layout.pad, layout.len_k, begin * TILE_N + tl.arange(0, TILE_N))
    for tile in range(begin, end):
        first = tile * TILE_N
        key = first + tl.arange(0, TILE_N)
        valid = key < layout.len_k
        k_tile = load_cache(k, cache_rows(k, rows, block, layout.pad, first, key), valid, q_tile.dtype, DIM, D)
        v_tile = load_cache(v, cache_rows(v, rows, block, layout.pad, first, key), valid, q_tile.dtype, DIM_V, DV)
        if rows.pages is not None:
            block = pages_of(rows, sequence, layout.pad, layout.len_k, key + TILE_N)
        scores, factor = log2_scores(values, tl.dot(k_tile, q_tile.T, input_precision="ieee"))
        seen = visible(values, row_q[None, :], key[:, None], layout.len_q, layout.len_k)
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0) * factor)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - pivot)
        p = tl.exp2(scores * factor - pivot[None, :])
        sums = sums * rescale[None, :] + p
        acc = tl.dot(v_tile.T, p.to(q_tile.dtype), acc * rescale[None, :], input_precision="ieee")
        row_max = new_max
    row_sum = tl.sum(sums, 0)
    some = row_sum != 0.0
    row_sum = tl.where(some, row_sum, 1.0)
    return acc * (1.0 / row_sum)[None, :], tl.where(some, row_max + tl.log2(row_sum), float("-inf"))


@triton.jit
def merge_chunks(splits, slot, chunks, row, used, DIM_V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr):
    """O (rows, DV) and LSE (log2 units) over a slot's chunks, added in their order."""
    column = tl.arange(0, DV)
    lses = splits.lse + slot * splits.slots * ROWS
    outs = splits.out + slot * splits.slots * ROWS * DIM_V
    i = tl.arange(0, MAX_SPLITS)
    parts = tl.load(
        lses + i[:, None] * ROWS + row[None, :], mask=(i < chunks)[:, None], other=float("-inf"), cache_modifier=".cg"
    )
    # NaN must reach the weights: a maximum may drop it, the sum of the exponentials does not.
    top = tl.max(parts, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(parts - pivot[None, :]), 0)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    acc = tl.zeros([ROWS, DV], tl.float32)
    for at in range(0, chunks, MERGE_STEP):
        for j in tl.static_range(MERGE_STEP):
            there = at + j < chunks
            part = tl.load(lses + (at + j) * ROWS + row, mask=there & used, other=float("-inf"), cache_modifier=".cg")
            tile = tl.load(
                outs + ((at + j) * ROWS + row)[:, None] * DIM_V + column[None, :],
                mask=(there & used)[:, None] & (column < DIM_V)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            acc += (tl.exp2(part - pivot) / total)[:, None] * tile
    return acc, tl.where(some, top + tl.log2(total), float("-inf"))


@triton.jit
def store_result(out, lse, sequence, layout, head, row_q, used, o, row_lse, DIM_V: tl.constexpr, DV: tl.constexpr,
                 VARLEN: tl.constexpr):  # fmt: skip
    """Stores O (rows, DV) and LSE (log2 units) of packed rows."""
    column = tl.arange(0, DV)
    batch = 0 if VARLEN else sequence.to(tl.int64)
    position = (layout.start_q + row_q).to(tl.int64)
    at = out.ptr + batch * out.stride_b + position * out.stride_s + head * out.stride_h
    mask = used[:, None]
    if DIM_V != DV:
        mask = mask & (column < DIM_V)[None, :]
    tl.store(at[:, None] + column[None, :], o.to(out.ptr.dtype.element_ty), mask=mask)
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
    CHUNK: tl.constexpr,
):
    """Writes out and lse of the rows that take part; any number of programs may share the work.

    ROWS: query rows of a tile; row r of a KV head's block is query r // GROUP of its query head r % GROUP. CHUNK: tiles
    of the smallest chunk.
    """
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    VARLEN: tl.constexpr = rows.cu_q is not None
    FP8: tl.constexpr = k.ptr.dtype.element_ty == tl.uint8
    at, last, sequence, before = find_work(rows, values, splits, heads_kv, GROUP, ROWS, TILE_N, CHUNK)
    layout = layout_of(rows, values, splits, sequence, GROUP, ROWS, TILE_N, CHUNK)
    # An item belongs to the program in whose share it begins: the first that begins at `at` or later.
    pair = ((at - before) // layout.unit).to(tl.int32)
    inside = (at - before - pair.to(tl.int64) * layout.unit).to(tl.int32)
    item = (inside + layout.chunk) // (layout.chunk + 1)
    if item >= layout.chunks:
        pair += 1
        item = 0
        if pair == heads_kv * layout.blocks:
            before += pair.to(tl.int64) * layout.unit
            pair = 0
            sequence += 1
            layout = layout_of(rows, values, splits, sequence, GROUP, ROWS, TILE_N, CHUNK)
    while (before + pair.to(tl.int64) * layout.unit + item * (layout.chunk + 1)) < last:
        head_kv = pair // layout.blocks
        first_row = (pair % layout.blocks) * ROWS
        row = tl.arange(0, ROWS)
        row_q = (first_row + row) // GROUP
        head = head_kv * GROUP + (first_row + row) % GROUP
        used = row_q < layout.len_q
        column = tl.arange(0, D)
        base = q.ptr + (layout.start_q.to(tl.int64) * q.stride_s if VARLEN else sequence.to(tl.int64) * q.stride_b)
        q_tile = tl.load(
            base + (row_q * q.stride_s + head * q.stride_h)[:, None] + column[None, :],
            mask=used[:, None] & (column < DIM)[None, :], other=0.0,
        )  # fmt: skip
        begin, _, _, end = key_tiles(
            values, first_row // GROUP, tl.minimum((first_row + ROWS - 1) // GROUP, layout.len_q - 1), layout.len_q,
            layout.len_k, TILE_N,
        )  # fmt: skip
        chunk_begin = layout.begin + item * layout.chunk
        begin = tl.maximum(begin, chunk_begin)
        end = tl.where(layout.len_q > 0, tl.minimum(end, chunk_begin + layout.chunk), begin)
        block = sequence
        if rows.cache is not None:
            block = tl.minimum(tl.maximum(tl.load(rows.cache + sequence), 0), rows.n_blocks - 1)
        scale_k = 1.0
        if FP8:
            scale_k = 256.0
            if k_descale.ptr is not None:
                scale_k *= tl.load(k_descale.ptr + sequence * k_descale.stride_b + head_kv * k_descale.stride_h)
        acc, row_lse = attend_chunk(
            q_tile, k, v, rows, values, scale_k, sequence, block, head_kv, row_q, layout, begin, end, DIM, DIM_V, TILE_N
        )
        if FP8:
            scale_v = 256.0
            if v_descale.ptr is not None:
                scale_v *= tl.load(v_descale.ptr + sequence * v_descale.stride_b + head_kv * v_descale.stride_h)
            acc *= scale_v
        o = tl.trans(acc)
        complete = True
        if splits.out is not None:  # noqa: SIM102 (this one is decided while compiling)
            if layout.chunks > 1:
                slot = (sequence.to(tl.int64) * heads_kv + head_kv) * layout.blocks + pair % layout.blocks
                part = (slot * splits.slots + item) * ROWS + row
                column_v = tl.arange(0, DV)
                tl.store(splits.lse + part, row_lse)
                tl.store(
                    splits.out + part[:, None] * DIM_V + column_v[None, :], o,
                    mask=used[:, None] & (column_v < DIM_V)[None, :],
                )  # fmt: skip
                tl.debug_barrier()  # every thread's part is written before one of them says so
                complete = tl.atomic_add(splits.arrivals + slot, 1, sem="acq_rel", scope="gpu") == layout.chunks - 1
                if complete:
                    tl.store(splits.arrivals + slot, 0)
                    o, row_lse = merge_chunks(splits, slot, layout.chunks, row, used, DIM_V, DV, ROWS)
        if complete:
            if sink is not None:
                logit = tl.load(sink + head, mask=used, other=0.0).to(tl.float32)
                row_lse, factor = with_sink(row_lse, logit)
                o *= factor[:, None]
            store_result(out, lse, sequence, layout, head, row_q, used, o, row_lse, DIM_V, DV, VARLEN)
        item += 1
        if item == layout.chunks:
            item = 0
            pair += 1
            if pair == heads_kv * layout.blocks:
                before += pair.to(tl.int64) * layout.unit
                pair = 0
                sequence += 1
                layout = layout_of(rows, values, splits, sequence, GROUP, ROWS, TILE_N, CHUNK)
