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
    Pairs,
    Sequences,
    Statistics,
    Strided,
    Values,
    base_of,
    block_of,
    in_window,
    key_phases,
    load_numbers,
    load_rows,
    load_zeroed,
    locate,
    pairs_offset,
    pairs_span,
    query_phases,
    score_slope,
    span_of,
    store_rows,
)


@triton.jit
def row_slopes(
    dout: Strided,
    out: Strided,
    lse: Statistics,
    dlse: Statistics,
    pairs: Pairs,
    sink,
    dsink,
    sequences: Sequences,
    heads_q,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Writes two numbers a row: its LSE in log2 units, and its slope = rowsum(dO * O) - dLSE.

    A row that saw no key gets an LSE of +inf, which makes its P zero. Where there is a sink, each program's share of
    its gradient goes to dsink.
    """
    DV: tl.constexpr = block_of(DIM_V)
    sequence, head, tile = locate(sequences.cu_q, sequences.rows_q, sequences.batch, heads_q, TILE_M, False)
    span = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    within = row < span.length
    do_tile = load_rows(dout, span, head, first, True, TILE_M, DIM_V, DV)
    o_tile = load_rows(out, span, head, first, True, TILE_M, DIM_V, DV)
    delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if dlse.ptr is not None:
        delta -= tl.load(base_of(dlse, span, head) + row * dlse.stride_s, mask=within, other=0.0)
    row_lse = tl.load(base_of(lse, span, head) + row * lse.stride_s, mask=within, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    # A row without keys passes nothing on: an infinite dLSE there times P = 0 would spread NaN over its tile's keys.
    delta = tl.where(row_lse == float("inf"), 0.0, delta)
    at = pairs.ptr + pairs_offset(pairs, pairs_span(sequences, span, sequence), head) + row
    tl.store(at, row_lse * LOG2_E, mask=within)
    tl.store(at + pairs.room, delta, mask=within)
    if sink is not None:
        # An LSE of -inf is a row without keys under a sink of -inf: the sink takes no share there.
        share = tl.exp2((tl.load(sink + head).to(tl.float32) - row_lse) * LOG2_E)
        tl.store(dsink + tl.program_id(0), -tl.sum(tl.where(within, share * delta, 0.0), 0))


@triton.jit
def attention_backward_kv(
    q: Strided,
    k: Strided,
    v: Strided,
    dout: Strided,
    pairs: Pairs,
    dk: Strided,
    dv: Strided,
    sequences: Sequences,
    values: Values,
    heads_kv,
    q_descriptor,
    do_descriptor,
    pairs_descriptor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Writes dK and dV for TILE_N keys of one KV head, summing over its group of query heads in order."""
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    sequence, head, tile = locate(sequences.cu_k, sequences.rows_k, sequences.batch, heads_kv, TILE_N, False)
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    first = tile * TILE_N
    k_tile = load_zeroed(k, span_k, head, first, True, TILE_N, DIM, D)
    v_tile = load_zeroed(v, span_k, head, first, True, TILE_N, DIM_V, DV)
    grads = (tl.zeros([TILE_N, D], tl.float32), tl.zeros([TILE_N, DV], tl.float32))
    q = Strided(q.ptr, q.stride_b, q.stride_s, q.stride_h, q_descriptor)
    dout = Strided(dout.ptr, dout.stride_b, dout.stride_s, dout.stride_h, do_descriptor)
    pairs = Pairs(pairs.ptr, pairs.stride_b, pairs.stride_h, pairs.room, pairs_descriptor)
    span_pairs = pairs_span(sequences, span_q, sequence)
    begin, inner_begin, inner_end, whole_end, end = query_phases(values, first, span_q, span_k, TILE_M, TILE_N)
    for member in range(GROUP):
        head_q = head * GROUP + member
        if values.right is not None:
            grads = add_queries(
                k_tile, v_tile, q, dout, pairs, span_pairs, span_q, span_k, head_q, grads, first, values,
                begin, inner_begin, True, False, DIM, DIM_V, TILE_M,
            )  # fmt: skip
        grads = add_queries(
            k_tile, v_tile, q, dout, pairs, span_pairs, span_q, span_k, head_q, grads, first, values,
            inner_begin, inner_end, False, False, DIM, DIM_V, TILE_M,
        )  # fmt: skip
        if values.left is not None:
            grads = add_queries(
                k_tile, v_tile, q, dout, pairs, span_pairs, span_q, span_k, head_q, grads, first, values,
                inner_end, whole_end, True, False, DIM, DIM_V, TILE_M,
            )  # fmt: skip
        grads = add_queries(
            k_tile, v_tile, q, dout, pairs, span_pairs, span_q, span_k, head_q, grads, first, values,
            whole_end, end, True, True, DIM, DIM_V, TILE_M,
        )  # fmt: skip
    # Keys past the end saw scores, too: each key sums for itself alone, so theirs are dropped here.
    within = (first + tl.arange(0, TILE_N) < span_k.length)[:, None]
    dk_acc = tl.where(within, grads[0] * values.scale, 0.0)
    dv_acc = tl.where(within, grads[1], 0.0)
    store_rows(dk, span_k, head, first, dk_acc, TILE_N, DIM, D)
    store_rows(dv, span_k, head, first, dv_acc, TILE_N, DIM_V, DV)


@triton.jit
def add_queries(
    k_tile, v_tile, q, dout, pairs, span_pairs, span_q, span_k, head_q, grads, first_k, values, begin, end,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Adds the query tiles begin to end of one head to grads = (dK, dV); scores are transposed, keys by rows.

    MASKED: a window hides some. PARTIAL: some rows lie past the sequence's end.
    """
    TILE_N: tl.constexpr = k_tile.shape[0]
    D: tl.constexpr = k_tile.shape[1]
    DV: tl.constexpr = v_tile.shape[1]
    # At most one tile is partial: nothing to pipeline.
    STAGES: tl.constexpr = 1 if PARTIAL else None
    for i in tl.range(begin, end, num_stages=STAGES):
        first = i * TILE_M
        row = first + tl.arange(0, TILE_M)
        q_tile = load_zeroed(q, span_q, head_q, first, PARTIAL, TILE_M, DIM, D)
        row_lse = load_numbers(pairs, span_pairs, head_q, first, 0, PARTIAL, TILE_M)
        scores, slope_factor = score_slope(values, tl.dot(k_tile, q_tile.T, input_precision=values.precision))
        p = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            key = first_k + tl.arange(0, TILE_N)
            seen = in_window(values, row[None, :], key[:, None], span_k.length - span_q.length)
            if seen is not None:
                p = tl.where(seen, p, 0.0)
        if PARTIAL:
            # Rows past the end are zeros, and 0 times an infinite key is a score of NaN.
            p = tl.where((row < span_q.length)[None, :], p, 0.0)
        do_tile = load_zeroed(dout, span_q, head_q, first, PARTIAL, TILE_M, DIM_V, DV)
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, grads[1], input_precision=values.precision)
        row_slope = load_numbers(pairs, span_pairs, head_q, first, 1, PARTIAL, TILE_M)
        if PARTIAL:
            row_slope = tl.where(row < span_q.length, row_slope, 0.0)
        ds = p * (tl.dot(v_tile, do_tile.T, input_precision=values.precision) - row_slope[None, :])
        if values.softcap is not None:
            ds = ds * slope_factor
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, grads[0], input_precision=values.precision)
        grads = (dk_acc, dv_acc)
    return grads


@triton.jit
def attention_backward_q(
    q: Strided,
    k: Strided,
    v: Strided,
    dout: Strided,
    pairs: Pairs,
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
    sequence, head, tile = locate(sequences.cu_q, sequences.rows_q, sequences.batch, heads_q, TILE_M, True)
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    within = row < span_q.length
    q_tile = load_zeroed(q, span_q, head, first, True, TILE_M, DIM, D)
    do_tile = load_zeroed(dout, span_q, head, first, True, TILE_M, DIM_V, DV)
    at = pairs.ptr + pairs_offset(pairs, pairs_span(sequences, span_q, sequence), head) + row
    row_lse = tl.load(at, mask=within, other=float("inf"))
    row_slope = tl.load(at + pairs.room, mask=within, other=0.0)
    dq_acc = tl.zeros([TILE_M, D], tl.float32)
    k = Strided(k.ptr, k.stride_b, k.stride_s, k.stride_h, k_descriptor)
    v = Strided(v.ptr, v.stride_b, v.stride_s, v.stride_h, v_descriptor)
    begin, inner_begin, inner_end, whole_end, end = key_phases(values, first, span_q, span_k, TILE_M, TILE_N)
    dq_acc = add_keys(
        q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
        inner_begin, inner_end, False, False, DIM, DIM_V, TILE_N,
    )  # fmt: skip
    if values.right is not None:
        dq_acc = add_keys(
            q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
            inner_end, whole_end, True, False, DIM, DIM_V, TILE_N,
        )  # fmt: skip
    dq_acc = add_keys(
        q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
        whole_end, end, True, True, DIM, DIM_V, TILE_N,
    )  # fmt: skip
    if values.left is not None:
        dq_acc = add_keys(
            q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head // GROUP, dq_acc, row, values,
            begin, inner_begin, True, False, DIM, DIM_V, TILE_N,
        )  # fmt: skip
    dq_acc *= values.scale
    store_rows(dq, span_q, head, first, dq_acc, TILE_M, DIM, D)


@triton.jit
def add_keys(
    q_tile, do_tile, row_lse, row_slope, k, v, span_q, span_k, head_kv, dq_acc, row, values, begin, end,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles begin to end to dq_acc; MASKED and PARTIAL as in `add_queries`, of keys."""
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = do_tile.shape[1]
    # At most one tile is partial: nothing to pipeline.
    STAGES: tl.constexpr = 1 if PARTIAL else None
    for i in tl.range(begin, end, num_stages=STAGES):
        first = i * TILE_N
        key = first + tl.arange(0, TILE_N)
        k_tile = load_zeroed(k, span_k, head_kv, first, PARTIAL, TILE_N, DIM, D)
        v_tile = load_rows(v, span_k, head_kv, first, PARTIAL, TILE_N, DIM_V, DV)
        scores, slope_factor = score_slope(values, tl.dot(q_tile, k_tile.T, input_precision=values.precision))
        p = tl.exp2(scores - row_lse[:, None])
        ds = p * (tl.dot(do_tile, v_tile.T, input_precision=values.precision) - row_slope[:, None])
        if values.softcap is not None:
            ds = ds * slope_factor
        if MASKED:
            seen = in_window(values, row[:, None], key[None, :], span_k.length - span_q.length)
            if seen is not None:
                ds = tl.where(seen, ds, 0.0)
        if PARTIAL:
            ds = tl.where((key < span_k.length)[None, :], ds, 0.0)
        dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision=values.precision)
    return dq_acc
