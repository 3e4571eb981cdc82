"""The backward kernels: row slopes, then dK and dV by key tiles, then dQ by query tiles.

P is recomputed from the LSE. No kernel adds into another's result, so sums run in a fixed order and the gradients are
the same bits on every run: there is no separate deterministic mode to ask for. That costs 7 matrix products where a
kernel with atomic additions to dQ needs 5, and saves the float32 dQ and its conversion.
Source: Dao, "FlashAttention-2" (2023), algorithm 2.
"""

import triton
import triton.language as tl

from fa4_triton.steps import (
    LOG2_E,
    Sequences,
    Statistics,
    Strided,
    Values,
    base_of,
    block_of,
    find_sequence,
    key_tiles,
    load_rows,
    load_zeroed,
    query_tiles,
    score_slope,
    span_of,
    store_rows,
    visible,
)


@triton.jit
def row_slopes(
    dout: Strided,
    out: Strided,
    lse: Statistics,
    dlse: Statistics,
    slope: Statistics,
    sink,
    dsink,
    sequences: Sequences,
    heads_q,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Writes slope = rowsum(dO * O) - dLSE, and each tile's share of the sink's gradient into dsink (tiles, heads)."""
    DV: tl.constexpr = block_of(DIM_V)
    pid = tl.program_id(0)
    if sequences.cu_q is None:
        tiles = tl.cdiv(sequences.rows_q, TILE_M)
        sequence = pid // (tiles * heads_q)
        tile = pid % tiles
    else:
        tiles = sequences.rows_q // TILE_M + sequences.batch + 1
        sequence, tile = find_sequence(sequences.cu_q, sequences.rows_q, sequences.batch, pid % tiles, TILE_M)
    head = (pid // tiles) % heads_q
    span = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    within = row < span.length
    do_tile = load_rows(dout, span, head, first, True, TILE_M, DIM_V, DV)
    o_tile = load_rows(out, span, head, first, True, TILE_M, DIM_V, DV)
    delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if dlse.ptr is not None:
        delta -= tl.load(base_of(dlse, span, head) + row * dlse.stride_s, mask=within, other=0.0)
    row_lse = tl.load(base_of(lse, span, head) + row * lse.stride_s, mask=within, other=float("inf"))
    # A row without keys passes nothing on: an infinite dLSE there times P = 0 would spread NaN over its tile's keys.
    delta = tl.where(row_lse == float("-inf"), 0.0, delta)
    tl.store(base_of(slope, span, head) + row * slope.stride_s, delta, mask=within)
    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32)
        # An LSE of -inf is a row without keys under a sink of -inf: the sink takes no share there.
        share = tl.exp2((logit - tl.where(row_lse == float("-inf"), float("inf"), row_lse)) * LOG2_E)
        part = (pid // (tiles * heads_q)) * tiles + pid % tiles
        tl.store(dsink + part * heads_q + head, -tl.sum(tl.where(within, share * delta, 0.0), 0))


@triton.jit
def attention_backward_kv(
    q: Strided,
    k: Strided,
    v: Strided,
    dout: Strided,
    lse: Statistics,
    slope: Statistics,
    dk: Strided,
    dv: Strided,
    sequences: Sequences,
    values: Values,
    heads_kv,
    q_descriptor,
    do_descriptor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Writes dK and dV for TILE_N keys of one KV head, summing over its group of query heads in order."""
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    pid = tl.program_id(0)
    if sequences.cu_k is None:
        tiles = tl.cdiv(sequences.rows_k, TILE_N)
        sequence = pid // (tiles * heads_kv)
        tile = pid % tiles
    else:
        tiles = sequences.rows_k // TILE_N + sequences.batch + 1
        sequence, tile = find_sequence(sequences.cu_k, sequences.rows_k, sequences.batch, pid % tiles, TILE_N)
    head = (pid // tiles) % heads_kv
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    first = tile * TILE_N
    k_tile = load_zeroed(k, span_k, head, first, True, TILE_N, DIM, D)
    v_tile = load_zeroed(v, span_k, head, first, True, TILE_N, DIM_V, DV)
    dk_acc = tl.zeros([TILE_N, D], tl.float32)
    dv_acc = tl.zeros([TILE_N, DV], tl.float32)
    q = Strided(q.ptr, q.stride_b, q.stride_s, q.stride_h, q_descriptor)
    dout = Strided(dout.ptr, dout.stride_b, dout.stride_s, dout.stride_h, do_descriptor)
    begin, inner_begin, inner_end, end = query_tiles(
        values, first, tl.minimum(first + TILE_N, span_k.length) - 1, span_q.length, span_k.length, TILE_M
    )
    end = tl.where(first < span_k.length, end, begin)
    # A last, partial key tile needs the mask throughout.
    inner_end = tl.where(first + TILE_N <= span_k.length, tl.minimum(inner_end, end), begin)
    inner_begin = tl.minimum(inner_begin, inner_end)
    for member in range(GROUP):
        head_q = head * GROUP + member
        dk_acc, dv_acc = add_queries(
            k_tile, v_tile, q, dout, lse, slope, span_q, span_k, head_q, dk_acc, dv_acc, first, values, begin,
            inner_begin, True, DIM, DIM_V, TILE_M,
        )  # fmt: skip
        dk_acc, dv_acc = add_queries(
            k_tile, v_tile, q, dout, lse, slope, span_q, span_k, head_q, dk_acc, dv_acc, first, values, inner_begin,
            inner_end, False, DIM, DIM_V, TILE_M,
        )  # fmt: skip
        dk_acc, dv_acc = add_queries(
            k_tile, v_tile, q, dout, lse, slope, span_q, span_k, head_q, dk_acc, dv_acc, first, values, inner_end, end,
            True, DIM, DIM_V, TILE_M,
        )  # fmt: skip
    dk_acc *= values.scale
    store_rows(dk, span_k, head, first, dk_acc, TILE_N, DIM, D)
    store_rows(dv, span_k, head, first, dv_acc, TILE_N, DIM_V, DV)


@triton.jit
def add_queries(
    k_tile, v_tile, q, dout, lse, slope, span_q, span_k, head_q, dk_acc, dv_acc, first_k, values, begin, end,
    MASKED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Adds the query tiles begin to end of one head to (dk_acc, dv_acc); scores are transposed, keys by rows."""
    TILE_N: tl.constexpr = k_tile.shape[0]
    D: tl.constexpr = k_tile.shape[1]
    DV: tl.constexpr = v_tile.shape[1]
    lse_base = base_of(lse, span_q, head_q)
    slope_base = base_of(slope, span_q, head_q)
    for i in range(begin, end):
        first = i * TILE_M
        row = first + tl.arange(0, TILE_M)
        q_tile = load_zeroed(q, span_q, head_q, first, MASKED, TILE_M, DIM, D)
        row_lse = load_lse(lse_base + row * lse.stride_s, row < span_q.length, MASKED)
        scores, slope_factor = score_slope(values, tl.dot(k_tile, q_tile.T, input_precision="ieee"))
        p = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            key = first_k + tl.arange(0, TILE_N)
            seen = visible(values, row[None, :], key[:, None], span_q.length, span_k.length)
            # Rows past the end are zeros, and 0 times an infinite key is a score of NaN.
            p = tl.where(seen & (row < span_q.length)[None, :], p, 0.0)
        do_tile = load_zeroed(dout, span_q, head_q, first, MASKED, TILE_M, DIM_V, DV)
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
        row_slope = load_statistic(slope_base + row * slope.stride_s, row < span_q.length, 0.0, MASKED)
        ds = p * (tl.dot(v_tile, do_tile.T, input_precision="ieee") - row_slope[None, :])
        if values.softcap is not None:
            ds = ds * slope_factor
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit
def load_statistic(ptrs, within, other, MASKED: tl.constexpr):
    """One float32 a row; rows that are none read as `other`."""
    return tl.load(ptrs, mask=within, other=other) if MASKED else tl.load(ptrs)


@triton.jit
def load_lse(ptrs, within, MASKED: tl.constexpr):
    """LSE in log2 units; rows that saw no key, or are none, read as +inf, which makes their P zero."""
    row_lse = load_statistic(ptrs, within, float("inf"), MASKED)
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2_E


@triton.jit
def attention_backward_q(
    q: Strided,
    k: Strided,
    v: Strided,
    dout: Strided,
    lse: Statistics,
    slope: Statistics,
    dq: Strided,
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
):
    """Writes dQ for TILE_M rows of one query head."""
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    pid = tl.program_id(0)
    if sequences.cu_q is None:
        tiles = tl.cdiv(sequences.rows_q, TILE_M)
        sequence = pid // (tiles * heads_q)
    else:
        tiles = sequences.rows_q // TILE_M + sequences.batch + 1
    head = (pid // tiles) % heads_q
    tile = tiles - 1 - pid % tiles
    if sequences.cu_q is not None:
        sequence, tile = find_sequence(sequences.cu_q, sequences.rows_q, sequences.batch, tile, TILE_M)
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    within = row < span_q.length
    q_tile = load_zeroed(q, span_q, head, first, True, TILE_M, DIM, D)
    do_tile = load_zeroed(dout, span_q, head, first, True, TILE_M, DIM_V, DV)
    row_lse = load_lse(base_of(lse, span_q, head) + row * lse.stride_s, within, True)
    row_slope = tl.load(base_of(slope, span_q, head) + row * slope.stride_s, mask=within, other=0.0)
    dq_acc = tl.zeros([TILE_M, D], tl.float32)
    k = Strided(k.ptr, k.stride_b, k.stride_s, k.stride_h, k_descriptor)
    v = Strided(v.ptr, v.stride_b, v.stride_s, v.stride_h, v_descriptor)
    begin, inner_begin, inner_end, end = key_tiles(
        values, first, tl.minimum(first + TILE_M, span_q.length) - 1, span_q.length, span_k.length, TILE_N
    )
    end = tl.where(first < span_q.length, end, begin)
    inner_end = tl.minimum(inner_end, end)
    inner_begin = tl.minimum(inner_begin, inner_end)
    dq_acc = add_keys(
        q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
        inner_begin, inner_end, False, DIM, DIM_V, TILE_N,
    )  # fmt: skip
    dq_acc = add_keys(
        q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
        inner_end, end, True, DIM, DIM_V, TILE_N,
    )  # fmt: skip
    if values.left is not None:
        dq_acc = add_keys(
            q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
            begin, inner_begin, True, DIM, DIM_V, TILE_N,
        )  # fmt: skip
    dq_acc *= values.scale
    store_rows(dq, span_q, head, first, dq_acc, TILE_M, DIM, D)


@triton.jit
def add_keys(
    q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head_kv, dq_acc, row, values, begin, end,
    MASKED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles begin to end to dq_acc."""
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = do_tile.shape[1]
    for i in range(begin, end):
        first = i * TILE_N
        k_tile = load_zeroed(k, span_k, head_kv, first, MASKED, TILE_N, DIM, D)
        v_tile = load_rows(v, span_k, head_kv, first, MASKED, TILE_N, DIM_V, DV)
        scores, slope_factor = score_slope(values, tl.dot(q_tile, k_tile.T, input_precision="ieee"))
        p = tl.exp2(scores - row_lse[:, None])
        ds = p * (tl.dot(do_tile, v_tile.T, input_precision="ieee") - row_slope[:, None])
        if values.softcap is not None:
            ds = ds * slope_factor
        if MASKED:
            key = first + tl.arange(0, TILE_N)
            ds = tl.where(visible(values, row[:, None], key[None, :], span_q.length, span_k.length), ds, 0.0)
        dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision="ieee")
    return dq_acc
