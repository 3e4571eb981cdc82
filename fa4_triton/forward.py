"""The forward kernel: one program computes one tile of query rows of one head.

It walks the visible key tiles from right to left: masked ones at the right edge, then inner ones without any mask
arithmetic, then masked ones at the left edge; `fa4_triton.specialised` holds another form of the walk. Source: Dao,
"FlashAttention-2" (2023), algorithm 1, with the skipped rescaling of Zadouri et al., "FlashAttention-4" (2026),
section 3. The pivot is kept or followed row by row; O is multiplied by the factor in any case, since a branch around
the multiplication was measured not to pay on Hopper (docs/performance.md).
"""

import triton
import triton.language as tl

from fa4_triton.specialised import visit_specialised
from fa4_triton.steps import (
    LN_2,
    LOG2_E,
    Sequences,
    Statistics,
    Strided,
    Values,
    base_of,
    block_of,
    fold,
    in_window,
    key_phases,
    load_rows,
    load_zeroed,
    locate,
    log2_scores,
    span_of,
    store_rows,
)


@triton.jit
def attention_forward(
    q: Strided,
    k: Strided,
    v: Strided,
    out: Strided,
    lse: Statistics,
    sink,
    sequences: Sequences,
    values: Values,
    heads_q,
    k_descriptor,
    v_descriptor,
    counts: Statistics,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Writes out and lse for TILE_M rows; the grid is one-dimensional, tiles fastest, then heads, then batch.

    LOOP: how, see `Tile`; "specialised" only where both k_descriptor and v_descriptor are there, else in phases.
    counts, without a pointer but in tests: int32, for each row the tiles visited and, next to it, the rescales skipped.
    """
    D: tl.constexpr = block_of(DIM)
    DV: tl.constexpr = block_of(DIM_V)
    sequence, head, tile = locate(sequences.cu_q, sequences.rows_q, sequences.batch, heads_q, TILE_M, True)
    span_q = span_of(sequences.cu_q, sequences.used_q, sequence, sequences.rows_q, sequences.batch)
    span_k = span_of(sequences.cu_k, sequences.used_k, sequence, sequences.rows_k, sequences.batch)
    k = Strided(k.ptr, k.stride_b, k.stride_s, k.stride_h, k_descriptor)
    v = Strided(v.ptr, v.stride_b, v.stride_s, v.stride_h, v_descriptor)
    head_kv = head // GROUP
    first = tile * TILE_M
    row = first + tl.arange(0, TILE_M)
    q_tile = load_rows(q, span_q, head, first, True, TILE_M, DIM, D)

    state = (
        tl.zeros([TILE_M, DV], tl.float32),
        tl.full([TILE_M], float("-inf"), tl.float32),
        tl.zeros([TILE_M], tl.float32),
        tl.zeros([TILE_M], tl.int32),
    )
    begin, inner_begin, inner_end, whole_end, end = key_phases(values, first, span_q, span_k, TILE_M, TILE_N)
    if LOOP == "specialised" and k_descriptor is not None and v_descriptor is not None:
        state = visit_specialised(
            q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, inner_begin, inner_end, end, TILE_N
        )
    else:
        state = visit_phases(
            q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, inner_begin, inner_end, whole_end, end,
            DIM, DIM_V, TILE_N, LOOP == "overlapped",
        )  # fmt: skip
    acc, row_max, row_sum, skips = state

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
    if counts.ptr is not None:
        at = base_of(counts, span_q, head) + row * counts.stride_s
        tl.store(at, tl.zeros_like(skips) + (end - begin), mask=within)
        tl.store(at + 1, skips, mask=within)


@triton.jit
def visit_phases(
    q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, inner_begin, inner_end, whole_end, end,
    DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles begin to end into the state, the last one first, in a loop for each of `key_phases`."""
    state = visit(
        q_tile, k, v, span_q, span_k, head_kv, state, row, values, whole_end, end, True, True, DIM, DIM_V, TILE_N
    )
    if values.right is not None:
        state = visit(
            q_tile, k, v, span_q, span_k, head_kv, state, row, values, inner_end, whole_end, True, False, DIM, DIM_V,
            TILE_N,
        )  # fmt: skip
    if OVERLAP:
        state = visit_overlapped(
            q_tile, k, v, span_k, head_kv, state, values, inner_begin, inner_end, DIM, DIM_V, TILE_N
        )
    else:
        state = visit(
            q_tile, k, v, span_q, span_k, head_kv, state, row, values, inner_begin, inner_end, False, False, DIM, DIM_V,
            TILE_N,
        )  # fmt: skip
    if values.left is not None:
        state = visit(
            q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, inner_begin, True, False, DIM, DIM_V,
            TILE_N,
        )  # fmt: skip
    return state


@triton.jit
def visit(
    q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, end,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles begin to end, the last one first, into the state (acc, row_max, row_sum, skips).

    MASKED: a window hides some keys. PARTIAL: some lie past the sequence's end.
    """
    for i in range(begin, end):
        first = (end - 1 - (i - begin)) * TILE_N
        k_tile = load_rows(k, span_k, head_kv, first, PARTIAL, TILE_N, DIM, q_tile.shape[1])
        scores, factor = log2_scores(values, tl.dot(q_tile, k_tile.T, input_precision=values.precision))
        if MASKED:
            key = first + tl.arange(0, TILE_N)
            seen = in_window(values, row[:, None], key[None, :], span_k.length - span_q.length)
            if seen is not None:
                scores = tl.where(seen, scores, float("-inf"))
            if PARTIAL:
                scores = tl.where((key < span_k.length)[None, :], scores, float("-inf"))
        p, state = fold(scores, factor, state, values.threshold)
        v_tile = load_zeroed(v, span_k, head_kv, first, PARTIAL, TILE_N, DIM_V, state[0].shape[1])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, state[0], input_precision=values.precision)
        state = (acc, state[1], state[2], state[3])
    return state


@triton.jit
def visit_overlapped(
    q_tile, k, v, span_k, head_kv, state, values, begin, end,
    DIM: tl.constexpr, DIM_V: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """`visit` without a mask, on Hopper, with q k^T of the next tile in flight during the softmax of this one.

    Three things keep the wgmma in flight. P V comes first in the loop: its result is rescaled in the same iteration, so
    Triton waits there, and lets q k^T run on to the next iteration's wait. The products are moved to other registers
    before the next ones are issued into theirs: left to itself the compiler moves them afterwards, and ptxas then
    serialises every wgmma (its note C7514). P is carried as integers: a float that is a loop's argument would reach the
    tensor cores through shared memory instead of registers. The first key tile is read twice, as "next" of the last.
    """
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = state[0].shape[1]
    if begin < end:
        last = (end - 1) * TILE_N
        k_tile = load_rows(k, span_k, head_kv, last, False, TILE_N, DIM, D)
        scores, factor = log2_scores(values, tl.dot(q_tile, k_tile.T, input_precision=values.precision))
        k_tile = load_rows(k, span_k, head_kv, tl.maximum(last - TILE_N, 0), False, TILE_N, DIM, D)
        products = tl.dot(q_tile, k_tile.T, input_precision=values.precision)
        p, state = fold(scores, factor, state, values.threshold)
        bits = p.to(q_tile.dtype).to(tl.int16, bitcast=True)
        for i in range(1, end - begin):
            first = last - i * TILE_N
            v_tile = load_rows(v, span_k, head_kv, first + TILE_N, False, TILE_N, DIM_V, DV)
            acc = tl.dot(bits.to(q_tile.dtype, bitcast=True), v_tile, state[0], input_precision=values.precision)
            products = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [products], tl.float32, False, 1)
            scores, factor = log2_scores(values, products)
            k_tile = load_rows(k, span_k, head_kv, tl.maximum(first - TILE_N, 0), False, TILE_N, DIM, D)
            products = tl.dot(q_tile, k_tile.T, input_precision=values.precision)
            p, state = fold(scores, factor, (acc, state[1], state[2], state[3]), values.threshold)
            bits = p.to(q_tile.dtype).to(tl.int16, bitcast=True)
        v_tile = load_rows(v, span_k, head_kv, begin * TILE_N, False, TILE_N, DIM_V, DV)
        acc = tl.dot(bits.to(q_tile.dtype, bitcast=True), v_tile, state[0], input_precision=values.precision)
        state = (acc, state[1], state[2], state[3])
    return state
