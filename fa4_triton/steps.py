"""The steps the kernels share: where a program's tile lies, which keys it visits, scores, and the online softmax.

Legend: scores and row_max are in log2 units once scaled by scale_log2 = softmax_scale * log2 e; lse is natural log.
Optional pointers and values are None where the problem has none, which Triton resolves while compiling: the kinds of
the problem are the kernel's specialisation, and no flag stands for them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A (batch, rows, heads, head_dim) tensor of contiguous head_dim, behind a pointer or a TMA descriptor.

    Behind a pointer, strides are in elements. Behind a descriptor, which sees a matrix of (rows, columns), ptr is None,
    stride_b and stride_h are in the matrix's rows, and stride_s is the columns from head to head.
    """

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_s: tl.tensor
    stride_h: tl.tensor
    descriptor: tl.tensor


class Statistics(NamedTuple):
    """A float32 (batch, heads, rows) tensor, one number a row: pointer (or None) and strides in elements."""

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_s: tl.tensor
    stride_h: tl.tensor


class Pairs(NamedTuple):
    """A float32 (batch, heads, 2, room) tensor, two numbers a query row: pointer, strides, TMA descriptor or None.

    The descriptor sees the whole tensor as one vector. Seen on an H100: a box that begins at no multiple of 16 bytes is
    an illegal instruction. So packed sequences are set apart, see `pairs_span`.
    """

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_h: tl.tensor
    room: tl.tensor
    descriptor: tl.tensor


class Sequences(NamedTuple):
    """Where sequences lie. cu_* and used_* are int32 pointers or None; rows_*: a tensor's rows (total in varlen)."""

    cu_q: tl.tensor
    cu_k: tl.tensor
    used_q: tl.tensor
    used_k: tl.tensor
    batch: tl.tensor
    rows_q: tl.tensor
    rows_k: tl.tensor


class Values(NamedTuple):
    """Run-time values. softcap, left and right are None where the problem has none of the kind.

    precision, known to the compiler: how products of float32 are made, as `tl.dot` calls it.
    """

    scale: tl.tensor
    softcap: tl.tensor
    left: tl.tensor
    right: tl.tensor
    threshold: tl.tensor
    precision: str = "ieee"


class Span(NamedTuple):
    """One side of one sequence: its batch index, first row in it, rows the tensor holds, and rows that take part."""

    batch: tl.tensor
    start: tl.tensor
    room: tl.tensor
    length: tl.tensor


@triton.constexpr_function
def block_of(dim):
    """Columns of a tile that holds `dim` columns: a power of two, and 16 at least for the tensor cores."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def find_sequence(cu, rows, batch, tile, TILE: tl.constexpr):
    """The sequence that holds tile number `tile`, and the tile's number within it.

    Sequence `batch` stands for the rows past the last sequence; beyond those lies sequence `batch + 1`, which is empty.
    """
    CHUNK: tl.constexpr = 128
    sequence = 0
    before = 0
    counted = 0
    for first in range(0, batch + 1, CHUNK):
        i = first + tl.arange(0, CHUNK)
        start = tl.load(cu + i, mask=i <= batch, other=0)
        end = tl.where(i < batch, tl.load(cu + i + 1, mask=i < batch, other=0), rows)
        tiles = tl.where(i <= batch, tl.maximum(end - start + TILE - 1, 0) // TILE, 0)
        ends = counted + tl.cumsum(tiles, 0)
        passed = (ends <= tile) & (i <= batch)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        counted += tl.sum(tiles, 0)
    return sequence, tile - before


@triton.jit
def locate(cu, rows, batch, heads, TILE: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's (sequence, head, tile): of a one-dimensional grid, tiles fastest, then heads, then batch.

    LAST_FIRST: later rows see more keys under a causal mask, so that short programs fill the end.
    """
    pid = tl.program_id(0)
    if cu is None:
        tiles = tl.cdiv(rows, TILE)
        sequence = pid // (tiles * heads)
    else:
        tiles = rows // TILE + batch + 1
    head = (pid // tiles) % heads
    tile = pid % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    if cu is not None:
        sequence, tile = find_sequence(cu, rows, batch, tile, TILE)
    return sequence, head, tile


@triton.jit
def span_of(cu, used, sequence, rows, batch):
    """The span of one sequence; lengths and starts read from the device are clamped into the tensor."""
    if cu is None:
        index = sequence
        start = 0
        room = rows
    else:
        index = 0
        start = tl.load(cu + sequence, mask=sequence <= batch, other=rows)
        start = tl.minimum(tl.maximum(start, 0), rows)
        end = tl.load(cu + sequence + 1, mask=sequence < batch, other=rows)
        # Clamped before the difference, which could wrap around.
        room = tl.minimum(tl.maximum(end, start), rows) - start
    if used is None:
        length = room
    else:
        length = tl.minimum(tl.maximum(tl.load(used + sequence, mask=sequence < batch, other=0), 0), room)
    if cu is not None:
        length = tl.where(sequence < batch, length, 0)
    return Span(index, start, room, length)


@triton.jit
def base_of(tensor, span, head):
    """Pointer to the first row of a sequence's head; 64-bit, as a tensor may hold more than 2^31 elements."""
    return (
        tensor.ptr
        + tl.cast(span.batch, tl.int64) * tensor.stride_b
        + tl.cast(span.start, tl.int64) * tensor.stride_s
        + tl.cast(head, tl.int64) * tensor.stride_h
    )


@triton.jit
def pairs_span(sequences, span, sequence):
    """The span of a sequence's rows in `Pairs`, where packed sequences begin at multiples of 4.

    They do not overlap there, and all fit into a room of 4 * (rows // 4 + batch + 2).
    """
    start = span.start
    if sequences.cu_q is not None:
        start = (start // 4 + sequence) * 4
    return Span(span.batch, start, span.room, span.length)


@triton.jit
def pairs_offset(pairs, span, head):
    """Offset of the first number of a sequence's first row; 64-bit."""
    return tl.cast(span.batch, tl.int64) * pairs.stride_b + tl.cast(head, tl.int64) * pairs.stride_h + span.start


@triton.jit
def load_numbers(pairs, span, head, first, which, PARTIAL: tl.constexpr, ROWS: tl.constexpr):
    """The numbers of ROWS rows from row `first` of a `pairs_span` on: the first of each (which = 0) or the second (1).

    Those of rows past the span's length, in a PARTIAL tile, are any.
    """
    at = pairs_offset(pairs, span, head) + which * pairs.room + first
    if pairs.descriptor is not None:
        numbers = pairs.descriptor.load([at.to(tl.int32)])
    else:
        row = tl.arange(0, ROWS)
        ptrs = pairs.ptr + at + row
        numbers = tl.load(ptrs, mask=first + row < span.length, other=0.0) if PARTIAL else tl.load(ptrs)
    return numbers


@triton.jit
def load_rows(tensor, span, head, first, PARTIAL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """(ROWS, D) tile of a head from row `first` of the span on; columns past DIM read as zero.

    Rows past the span's length, which only a PARTIAL tile may have, read as zero behind a pointer, and as whatever lies
    there behind a descriptor: see `load_zeroed`.
    """
    row = tl.arange(0, ROWS)
    if tensor.descriptor is not None:
        at = span.batch * tensor.stride_b + head * tensor.stride_h + span.start + first
        tile = tensor.descriptor.load([at.to(tl.int32), (head * tensor.stride_s).to(tl.int32)])
    else:
        column = tl.arange(0, D)
        base = base_of(tensor, span, head) + tl.cast(first, tl.int64) * tensor.stride_s
        ptrs = base + (row[:, None] * tensor.stride_s + column[None, :])
        if PARTIAL and DIM == D:
            tile = tl.load(ptrs, mask=(first + row < span.length)[:, None], other=0.0)
        elif PARTIAL:
            tile = tl.load(ptrs, mask=(first + row < span.length)[:, None] & (column < DIM)[None, :], other=0.0)
        elif DIM == D:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=(column < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_zeroed(
    tensor, span, head, first, PARTIAL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr
):
    """`load_rows` with every row past the span's length zero: for operands whose NaN there would show."""
    tile = load_rows(tensor, span, head, first, PARTIAL, ROWS, DIM, D)
    if PARTIAL and tensor.descriptor is not None:
        tile = tl.where((first + tl.arange(0, ROWS) < span.length)[:, None], tile, 0.0)
    return tile


@triton.jit
def store_rows(tensor, span, head, first, tile, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """Stores a (ROWS, D) tile of a head from row `first` on, without columns past DIM and rows past the span's room."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    base = base_of(tensor, span, head) + tl.cast(first, tl.int64) * tensor.stride_s
    mask = (first + row < span.room)[:, None]
    if DIM != D:
        mask = mask & (column < DIM)[None, :]
    tl.store(base + (row[:, None] * tensor.stride_s + column[None, :]), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def key_tiles(values, first_q, last_q, len_q, len_k, TILE_N: tl.constexpr):
    """Tiles of keys that the query rows first_q to last_q (inclusive) see: (begin, inner_begin, inner_end, end).

    Every row sees every key of the tiles inner_begin to inner_end; the tiles around them need a mask. Tiles outside
    begin to end are hidden from all rows.
    """
    shift = len_k - len_q
    last_key = len_k
    inner_last = len_k
    if values.right is not None:
        last_key = tl.maximum(tl.minimum(len_k, last_q + shift + values.right + 1), 0)
        inner_last = tl.maximum(tl.minimum(len_k, first_q + shift + values.right + 1), 0)
    first_key = 0
    inner_first = 0
    if values.left is not None:
        first_key = tl.maximum(first_q + shift - values.left, 0)
        inner_first = tl.maximum(last_q + shift - values.left, 0)
    begin = first_key // TILE_N
    end = tl.maximum((last_key + TILE_N - 1) // TILE_N, begin)
    inner_begin = tl.maximum(tl.minimum((inner_first + TILE_N - 1) // TILE_N, end), begin)
    inner_end = tl.minimum(tl.maximum(inner_last // TILE_N, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def query_tiles(values, first_k, last_k, len_q, len_k, TILE_M: tl.constexpr):
    """Tiles of query rows that see the keys first_k to last_k (inclusive): as `key_tiles`, with the sides exchanged."""
    shift = len_k - len_q
    first_row = 0
    inner_first = 0
    if values.right is not None:
        first_row = tl.maximum(first_k - shift - values.right, 0)
        inner_first = tl.maximum(last_k - shift - values.right, 0)
    last_row = len_q
    inner_last = len_q
    if values.left is not None:
        last_row = tl.maximum(tl.minimum(len_q, last_k - shift + values.left + 1), 0)
        inner_last = tl.maximum(tl.minimum(len_q, first_k - shift + values.left + 1), 0)
    begin = first_row // TILE_M
    end = tl.maximum((last_row + TILE_M - 1) // TILE_M, begin)
    inner_begin = tl.maximum(tl.minimum((inner_first + TILE_M - 1) // TILE_M, end), begin)
    inner_end = tl.minimum(tl.maximum(inner_last // TILE_M, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def key_phases(values, first_q, span_q, span_k, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Tiles of keys that the TILE_M query rows from first_q on see: (begin, inner_begin, inner_end, whole_end, end).

    As `key_tiles`, and empty past the last query row. The tiles whole_end to end, one at most, run past the last key;
    none of the others does.
    """
    last_q = tl.minimum(first_q + TILE_M, span_q.length) - 1
    begin, inner_begin, inner_end, end = key_tiles(values, first_q, last_q, span_q.length, span_k.length, TILE_N)
    end = tl.where(first_q < span_q.length, end, begin)
    return _phases(begin, inner_begin, inner_end, end, span_k.length // TILE_N)


@triton.jit
def query_phases(values, first_k, span_q, span_k, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Tiles of query rows that see the TILE_N keys from first_k on: as `key_phases`, with the sides exchanged."""
    last_k = tl.minimum(first_k + TILE_N, span_k.length) - 1
    begin, inner_begin, inner_end, end = query_tiles(values, first_k, last_k, span_q.length, span_k.length, TILE_M)
    end = tl.where(first_k < span_k.length, end, begin)
    return _phases(begin, inner_begin, inner_end, end, span_q.length // TILE_M)


@triton.jit
def _phases(begin, inner_begin, inner_end, end, whole):
    """Keeps the ranges of `key_tiles` within begin to end, and all but the last within the first `whole` tiles."""
    whole_end = tl.maximum(tl.minimum(end, whole), begin)
    inner_begin = tl.minimum(inner_begin, whole_end)
    inner_end = tl.maximum(tl.minimum(inner_end, whole_end), inner_begin)
    return begin, inner_begin, inner_end, whole_end, end


@triton.jit
def in_window(values, row, key, shift):
    """Whether the window shows `key` to `row`, broadcast against each other; None where neither side is bounded.

    shift = len_k - len_q: windows align bottom-right.
    """
    mask = None
    if values.right is not None:
        mask = key <= row + (shift + values.right)
    if values.left is not None:
        after = key >= row + (shift - values.left)
        mask = after if mask is None else mask & after
    return mask


@triton.jit
def visible(values, row, key, len_q, len_k):
    """Whether `key` is visible to `row` (broadcast against each other); windows align bottom-right."""
    mask = key < len_k
    if values.right is not None:
        mask = mask & (key <= row + (len_k - len_q + values.right))
    if values.left is not None:
        mask = mask & (key >= row + (len_k - len_q - values.left))
    return mask


@triton.jit
def tanh(x):
    """tanh from exp2; near zero, where 1 - 2 / (e^2x + 1) cancels, its series. Relative error below 2e-6."""
    bent = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 - square * 0.05396825)))
    return tl.where(tl.abs(x) < 0.05, series, bent)


@triton.jit
def log2_scores(values, products):
    """Products q k^T to what the softmax takes: (scores, factor), with scores * factor in log2 units.

    Without a softcap the factor is left to the exponent's fused multiply-add.
    """
    if values.softcap is None:
        scores = products
        factor = values.scale * LOG2_E
    else:
        scores = tanh(products * (values.scale / values.softcap)) * (values.softcap * LOG2_E)
        factor = 1.0
    return scores, factor


@triton.jit
def follow_max(row_max, tile_max, threshold):
    """The pivot rule: the running maximum is followed where it grew by more than `threshold`, else kept.

    Returns (row_max, pivot, factor). A kept maximum gives a factor of exactly 1. From -inf any growth is infinite; the
    pivot of a row that saw nothing is 0, so that no exponent is inf - inf. Source: FlashAttention-4, section 3.
    """
    new_max = tl.maximum(row_max, tile_max)
    follow = new_max - row_max > threshold
    new_max = tl.where(follow, new_max, row_max)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    factor = tl.where(follow, tl.exp2(row_max - pivot), 1.0)
    return new_max, pivot, factor


@triton.jit
def fold(scores, factor, state, threshold):
    """One tile's step of the online softmax: P, and the state with O rescaled but P V not yet added."""
    acc, row_max, row_sum, skips = state
    new_max, pivot, rescale = follow_max(row_max, tl.max(scores, 1) * factor, threshold)
    skips += ((row_max != float("-inf")) & (new_max == row_max)).to(tl.int32)
    p = tl.exp2(scores * factor - pivot[:, None])
    return p, (acc * rescale[:, None], new_max, row_sum * rescale + tl.sum(p, 1), skips)


@triton.jit
def score_slope(values, products):
    """Products q k^T to (scores in log2 units, derivative of the capped score by the scaled one; 1 without a cap)."""
    if values.softcap is None:
        scores = products * (values.scale * LOG2_E)
        slope = 1.0
    else:
        bent = tanh(products * (values.scale / values.softcap))
        scores = bent * (values.softcap * LOG2_E)
        slope = 1.0 - bent * bent
    return scores, slope
