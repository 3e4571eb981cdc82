"""The forward kernel: one program computes one tile of query rows of one head.

It walks the visible key tiles from right to left: masked ones at the right edge, then inner ones without any mask
arithmetic, then masked ones at the left edge. Source: Dao, "FlashAttention-2" (2023), algorithm 1, with the skipped
rescaling of Zadouri et al., "FlashAttention-4" (2026), section 3.
"""

import triton
import triton.language as tl

from fa4_triton.steps import (
    LN_2,
    LOG2_E,
    Sequences,
    Strided,
    Values,
    base_of,
    find_sequence,
    follow_max,
    key_tiles,
    load_rows,
    log2_scores,
    span_of,
    store_rows,
    visible,
)


@triton.jit
def attention_forward(
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    lse: Strided,
    sink,
    sequences: Sequences,
    values: Values,
    heads_q,
    k_descriptor,
    v_descriptor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes out and lse for TILE_M rows; the grid is one-dimensional, tiles fastest, then heads, then batch."""
    D: tl.constexpr = triton.next_power_of_2(DIM)
    DV: tl.constexpr = triton.next_power_of_2(DIM_V)
    pid = tl.program_id(0)
    if sequences.cu_q is None:
        tiles = tl.cdiv(sequences.rows_q, TILE_M)
        sequence = pid // (tiles * heads_q)
    else:
        tiles = sequences.rows_q // TILE_M + sequences.batch + 1
    head = (pid // tiles) % heads_q
    tile = pid % tiles
    # Later rows see more keys under a causal mask: longest first, so that short programs fill the end.
    tile = tiles - 1 - tile
    if sequences.cu_q is not None:
        sequence, tile = find_sequence(sequences.cu_q, sequences.rows_q, sequences.batch, tile, TILE_M)
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    k = Strided(k.ptr, k.stride_b, k.stride_s, k.stride_h, k_descriptor)
    v = Strided(v.ptr, v.stride_b, v.stride_s, v.stride_h, v_descriptor)
    q_tile = load_rows(q, span_q, head, first, span_q.length, False, TILE_M, DIM, D)

    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, DV], tl.float32)
    begin, inner_begin, inner_end, end = key_tiles(
        values, first, tl.minimum(first + TILE_M, span_q.length) - 1, span_q.length, span_k.length, TILE_N
    )
    end = tl.where(first < span_q.length, end, begin)
    inner_end = tl.minimum(inner_end, end)
    acc, row_sum, row_max = visit(
        q_tile, k, v, span_q, span_k, head // GROUP, acc, row_sum, row_max, row, values, inner_end, end, True, DIM, DIM_V, TILE_N, PRECISION,
    )  # fmt: skip
    acc, row_sum, row_max = visit(
        q_tile, k, v, span_q, span_k, head // GROUP, acc, row_sum, row_max, row, values, inner_begin, inner_end, False, DIM, DIM_V, TILE_N, PRECISION,
    )  # fmt: skip
    if values.left is not None:
        acc, row_sum, row_max = visit(
            q_tile, k, v, span_q, span_k, head // GROUP, acc, row_sum, row_max, row, values, begin, tl.minimum(inner_begin, inner_end), True, DIM, DIM_V, TILE_N, PRECISION,
        )  # fmt: skip

    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32) * LOG2_E
        new_max = tl.maximum(row_max, logit)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        factor = tl.exp2(row_max - pivot)
        row_sum = row_sum * factor + tl.exp2(logit - pivot)
        acc = acc * factor[:, None]
        row_max = new_max
    # A row without keys or sink has a sum of 0: it gives O = 0 and, from row_max = -inf, LSE = -inf.
    some = row_sum != 0.0
    acc = acc * (1.0 / tl.where(some, row_sum, 1.0))[:, None]
    row_lse = tl.where(some, (row_max + tl.log2(tl.where(some, row_sum, 1.0))) * LN_2, float("-inf"))
    within = row < span_q.length
    acc = tl.where(within[:, None], acc, 0.0)
    row_lse = tl.where(within, row_lse, float("-inf"))
    store_rows(out, span_q, head, first, acc, TILE_M, DIM_V, DV)
    tl.store(base_of(lse, span_q, head) + row * lse.stride_s, row_lse, mask=row < span_q.room)


@triton.jit
def visit(
    q_tile, k, v, span_q, span_k, head_kv, acc, row_sum, row_max, row, values, begin, end,
    MASKED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles begin to end, the last one first, into (acc, row_sum, row_max)."""
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = acc.shape[1]
    for i in range(begin, end):
        first = (end - 1 - (i - begin)) * TILE_N
        k_tile = load_rows(k, span_k, head_kv, first, span_k.length, not MASKED, TILE_N, DIM, D)
        products = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        scores, factor = log2_scores(values, products)
        if MASKED:
            key = first + tl.arange(0, TILE_N)
            seen = visible(values, row[:, None], key[None, :], span_q.length, span_k.length)
            scores = tl.where(seen, scores, float("-inf"))
        row_max, pivot, rescale = follow_max(row_max, tl.max(scores, 1) * factor, values.threshold)
        p = tl.exp2(scores * factor - pivot[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v_tile = load_rows(v, span_k, head_kv, first, span_k.length, not MASKED, TILE_N, DIM_V, DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, row_sum, row_max
