"""The append kernel: new rows of K and V into the cache in place, with rotary embedding of K and Q, or as fp8.

Source: Su et al., "RoFormer" (2021) for the rotary embedding; the OCP 8-bit floating point specification for e4m3.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fa4_triton.decode import Descale, Rows
from fa4_triton.steps import Strided, block_of


class Rotary(NamedTuple):
    """cos and sin of (positions, half the rotary dimension), row stride in elements; None without rotary embedding.

    A row's position is its place in the cache, padding counted, as in flash-attn. `step` is 1 where query rows stand at
    consecutive positions, 0 where all stand at the first new one.
    """

    cos: tl.tensor
    sin: tl.tensor
    stride_cos: tl.tensor
    stride_sin: tl.tensor
    positions: tl.tensor
    step: tl.tensor


@triton.jit
def append_rows(
    q: Strided,
    turned: Strided,
    k: Strided,
    v: Strided,
    k_cache: Strided,
    v_cache: Strided,
    rows: Rows,
    rotary: Rotary,
    heads_q,
    heads_kv,
    k_descale: Descale,
    v_descale: Descale,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Writes the new rows behind each sequence, and q rotated into `turned` where there is a rotary embedding.

    A program takes BLOCK (row, head) pairs of one sequence. A sequence whose rows do not fit, and a row whose page does
    not exist, leave the cache as it is. PAGE: rows of a page, 0 for a contiguous cache.
    """
    n_new = tl.cdiv(rows.added * heads_kv, BLOCK)
    per_sequence = n_new
    if ROTARY:
        per_sequence += tl.cdiv(rows.rows_q * heads_q, BLOCK)
    sequence = (tl.program_id(0) // per_sequence).to(tl.int64)
    part = tl.program_id(0) % per_sequence
    filled = rows.length_k
    if rows.used_k is not None:
        filled = tl.load(rows.used_k + sequence)
    if part < n_new:
        index = part * BLOCK + tl.arange(0, BLOCK)
        new = index // heads_kv
        head = (index % heads_kv).to(tl.int64)
        # Compared without a sum, which could wrap around.
        fits = (new < rows.added) & (filled >= 0) & (filled <= rows.rows_k - rows.added)
        position = filled + new
        if rows.pages is not None:
            place = rows.pages + sequence * rows.stride_pages + position // PAGE
            block = tl.load(place, mask=fits, other=-1)
            inside = position % PAGE
        else:
            number = sequence.to(tl.int32)
            if rows.cache is not None:
                number = tl.load(rows.cache + sequence)
            block = tl.zeros_like(index) + number
            inside = position
        fits = fits & (block >= 0) & (block < rows.n_blocks)
        block = block.to(tl.int64)
        tile = rotated(k, sequence, new, head, position, new < rows.added, rotary, DIM, ROTARY, INTERLEAVED)
        store_cache(k_cache, k_descale, sequence, block, inside, head, fits, tile, DIM)
        # V is copied as a row without a rotary part.
        tile = rotated(v, sequence, new, head, filled, new < rows.added, rotary, DIM_V, 0, INTERLEAVED)
        store_cache(v_cache, v_descale, sequence, block, inside, head, fits, tile, DIM_V)
    elif ROTARY:
        D: tl.constexpr = block_of(DIM)
        column = tl.arange(0, D)
        index = (part - n_new) * BLOCK + tl.arange(0, BLOCK)
        row = index // heads_q
        head = (index % heads_q).to(tl.int64)
        there = row < rows.rows_q
        tile = rotated(q, sequence, row, head, filled + row * rotary.step, there, rotary, DIM, ROTARY, INTERLEAVED)
        at = turned.ptr + sequence * turned.stride_b + row * turned.stride_s + head * turned.stride_h
        tl.store(at[:, None] + column[None, :], tile, mask=there[:, None] & (column < DIM)[None, :])


@triton.jit
def rotated(tensor, sequence, row, head, position, there, rotary, DIM: tl.constexpr, ROTARY: tl.constexpr,
            INTERLEAVED: tl.constexpr):  # fmt: skip
    """(BLOCK, D) rows of a (batch, rows, heads, DIM) tensor in its dtype, the first ROTARY columns rotated."""
    D: tl.constexpr = block_of(DIM)
    column = tl.arange(0, D)
    at = tensor.ptr + sequence * tensor.stride_b + row * tensor.stride_s + head * tensor.stride_h
    tile = tl.load(at[:, None] + column[None, :], mask=there[:, None] & (column < DIM)[None, :], other=0.0)
    if ROTARY:
        HALF: tl.constexpr = ROTARY // 2
        turns = column < ROTARY
        if INTERLEAVED:
            first = column % 2 == 0
            partner = column + tl.where(first, 1, -1)
            angle = column // 2
        else:
            first = column < HALF
            partner = column + tl.where(first, HALF, -HALF)
            angle = tl.where(first, column, column - HALF)
        mask = there[:, None] & turns[None, :]
        other = tl.load(at[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        position = tl.minimum(tl.maximum(position, 0), rotary.positions - 1).to(tl.int64)
        cos = tl.load(rotary.cos + (position * rotary.stride_cos)[:, None] + angle[None, :], mask=mask, other=1.0)
        sin = tl.load(rotary.sin + (position * rotary.stride_sin)[:, None] + angle[None, :], mask=mask, other=0.0)
        sin = tl.where(first[None, :], -sin.to(tl.float32), sin.to(tl.float32))
        turned = tile.to(tl.float32) * cos.to(tl.float32) + other * sin
        tile = tl.where(turns[None, :], turned.to(tile.dtype), tile)
    return tile


@triton.jit
def store_cache(cache, descale, sequence, block, inside, head, fits, tile, DIM: tl.constexpr):
    """Stores rows into the cache, as fp8 e4m3 bytes of 1/descale times their value where the cache is one of bytes."""
    column = tl.arange(0, tile.shape[1])
    at = cache.ptr + block * cache.stride_b + inside.to(tl.int64) * cache.stride_s + head * cache.stride_h
    mask = fits[:, None] & (column < DIM)[None, :]
    if cache.ptr.dtype.element_ty == tl.uint8:
        x = tile.to(tl.float32)
        if descale.ptr is not None:
            factor = tl.load(descale.ptr + sequence * descale.stride_b + head * descale.stride_h, mask=fits, other=1.0)
            x = tl.div_rn(x, tl.broadcast_to(factor[:, None], x.shape))  # the plain quotient is off by two roundings
        tile = e4m3_bytes(x)
    tl.store(at[:, None] + column[None, :], tile, mask=mask)


@triton.jit
def e4m3_bytes(x):
    """float32 to the bytes of fp8 e4m3: to the nearest, ties to even, the largest finite value beyond it, NaN kept.

    In integers, since no GPU before compute capability 8.9 has the conversion, nor Triton's interpreter a right one.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 448 is 0x43E00000; NaN lies above infinity, 0x7F800000.
    nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the code counts steps of 2^-9; adding 2^14 leaves the rounded count in the float's last bits.
    count = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = count.to(tl.int32, bitcast=True) & 0x1F
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (tl.where(nan, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)
