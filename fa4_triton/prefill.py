"""The cache prefill kernel: many query rows, dense or packed, on contiguous or paged KV caches, without a split.

One program takes one block of the query rows that share a KV head and walks its visible keys from left to right. The
leaves and the orientation of the products are the decode kernel's (fa4_triton/decode.py).
"""

import triton
import triton.language as tl

from fa4_triton.decode import (
    Descale,
    Rows,
    attend_tile,
    block_number,
    cache_rows,
    descale_of,
    load_cache,
    page_numbers,
    store_result,
    valid_keys,
)
from fa4_triton.steps import Statistics, Strided, Values, block_of, key_tiles


@triton.jit
def queries_of(rows, i):
    """(first row, rows that take part) of sequence i, a number or a vector; clamped, whatever the device says."""
    within = i < rows.batch
    if rows.cu_q is None:
        start = i * 0
        length = tl.where(within, rows.rows_q, 0)
    else:
        # Both clamped before the difference, which could wrap around.
        start = tl.minimum(tl.maximum(tl.load(rows.cu_q + i, mask=within, other=0), 0), rows.rows_q)
        end = tl.minimum(tl.maximum(tl.load(rows.cu_q + i + 1, mask=within, other=0), 0), rows.rows_q)
        length = tl.maximum(end - start, 0)
    if rows.used_q is not None:
        length = tl.minimum(tl.maximum(tl.load(rows.used_q + i, mask=within, other=0), 0), length)
    return start, length


@triton.jit
def find_block(rows, number, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(sequence, block in it) of block `number` among those of one KV head; past the last one, sequence `batch`."""
    STEP: tl.constexpr = 128
    sequence = 0
    before = 0
    counted = 0
    for first in range(0, rows.batch, STEP):
        i = first + tl.arange(0, STEP)
        _, length = queries_of(rows, i)
        blocks = (length * GROUP + ROWS - 1) // ROWS
        ends = counted + tl.cumsum(blocks, 0)
        passed = (ends <= number) & (i < rows.batch)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        counted += tl.sum(blocks, 0)
    return sequence, number - before


@triton.jit
def attention_prefill(
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    lse: Statistics,
    sink,
    rows: Rows,
    values: Values,
    blocks,
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
    """Writes out and lse of the rows that take part; the grid is one-dimensional: `blocks` of a KV head, then heads.

    ROWS: packed query rows of a block, of which row r is query r // GROUP of the KV head's query head r % GROUP.
    """
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    FP8: tl.constexpr = k.ptr.dtype.element_ty == tl.uint8
    # Later rows see more keys under a causal mask: longest first, so that short programs fill the end.
    sequence, number = find_block(rows, blocks - 1 - tl.program_id(0) % blocks, GROUP, ROWS)
    if sequence < rows.batch:
        head_kv = tl.program_id(0) // blocks
        start_q, len_q = queries_of(rows, sequence)
        pad, len_k = valid_keys(rows, sequence, True)
        packed = number * ROWS + tl.arange(0, ROWS)
        row_q = packed // GROUP
        head = head_kv * GROUP + packed % GROUP
        used = row_q < len_q
        batch = sequence if rows.cu_q is None else 0
        column = tl.arange(0, D)
        base = q.ptr + batch.to(tl.int64) * q.stride_b + start_q.to(tl.int64) * q.stride_s
        at = base + (row_q * q.stride_s + head * q.stride_h)[:, None] + column[None, :]
        q_tile = tl.load(at, mask=used[:, None] & (column < DIM)[None, :], other=0.0)
        begin, _, _, end = key_tiles(
            values, number * ROWS // GROUP, tl.minimum((number * ROWS + ROWS - 1) // GROUP, len_q - 1), len_q, len_k,
            TILE_N,
        )  # fmt: skip
        if PAGE == 0:
            block = block_number(rows, sequence)
        else:
            block = page_numbers(rows, sequence, pad, len_k, begin * TILE_N, PAGE, TILE_N)
        scale_k = descale_of(k, k_descale, sequence, head_kv)
        state = (
            tl.zeros([DV, ROWS], tl.float32),
            tl.full([ROWS], float("-inf"), tl.float32),
            tl.zeros([TILE_N, ROWS], tl.float32),
        )
        for tile in range(begin, end):
            first = tile * TILE_N
            key = first + tl.arange(0, TILE_N)
            k_tile = load_cache(
                k, head_kv, cache_rows(k, rows, block, pad, first, PAGE, TILE_N), key < len_k, q_tile.dtype, DIM, D
            )
            v_tile = load_cache(
                v, head_kv, cache_rows(v, rows, block, pad, first, PAGE, TILE_N), key < len_k, q_tile.dtype, DIM_V, DV
            )
            if PAGE != 0:
                # Read one tile ahead, so that no load of keys waits for them.
                block = page_numbers(rows, sequence, pad, len_k, first + TILE_N, PAGE, TILE_N)
            state = attend_tile(q_tile, k_tile, v_tile, values, scale_k, row_q, key, len_q, len_k, state, FP8)
        state = (state[0], state[1], tl.sum(state[2], 0))
        scale_v = descale_of(v, v_descale, sequence, head_kv)
        store_result(out, lse, sink, batch, start_q, head, row_q, used, scale_v, state, DIM_V, DV)
