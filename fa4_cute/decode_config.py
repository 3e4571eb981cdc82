"""What the decode kernel serves, and its tiles and slots; imports no DSL, so that it can be asked anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fa4_core.problem import Kinds
from fa4_cute.alignment import ALIGNMENT, has_aligned_rows
from fa4_cute.sm90_config import DTYPES, SHARED_LIMIT

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheProblem

WARP_ROWS = 16
"""Query rows of a tile: those of a warp's matrix product."""
WARPS = 4
"""Warps that compute, each on key tiles of its own."""
MAX_SLOTS = 12
ROOM = 1152
"""Bytes for barriers, words and alignment."""
BLOCK_COLUMNS = 64
"""What head dimensions have to be multiples of: the columns of the 128-byte swizzle."""
MOST_CHUNKS = 64
"""Chunks that a sequence has at most; `decode_shares.keys_of` makes them."""
MIN_BOX, MAX_BOX = 8, 16
"""Rows that TMA brings at a time: those after which the swizzle repeats, at least, and few enough at most, since a
sequence's last box brings some that are past its end."""
PART_EXTRA = 2 * WARP_ROWS
"""Numbers of a part beside O: two for each row that there may be, so that a part is whole lines of the L2 cache."""
COUNTED = 2**30
"""Key tiles, and rows of a sequence, that the kernel can number: sums of two stay within 32 bits."""
MOST_PARTS = 2**31
"""Numbers that the work space, whose size is one of 32 bits, may hold."""


class CacheKinds(NamedTuple):
    """The shape of a decode call: what kernels are compiled for.

    rows: query rows of a sequence and KV head, rounded up to 4, 8 or 16. page_size: rows of a page, 0 for a contiguous
    cache. lengths, indexed, padded, lse: whether there are cache_seqlens, cache_batch_idx and cache_leftpad tensors,
    and whether the LSE is wanted.
    """

    kinds: Kinds
    rows: int
    page_size: int
    lengths: bool
    indexed: bool
    padded: bool
    lse: bool


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles and slots of one kernel.

    rows: of O that are folded. box: rows that TMA brings at a time, of one page if there are pages.
    """

    head_dim: int
    head_dim_v: int
    rows: int
    tile_n: int
    box: int

    def __post_init__(self) -> None:
        if self.slots < WARPS:
            raise ValueError(f"{self}: {self.slots} slots fit, fewer than the {WARPS} warps whose tiles they hold")
        if self.columns % 4 or self.columns * self.row_threads != self.head_dim_v:
            raise ValueError(f"{self}: {self.row_threads} threads cannot share a row, 4 columns at a time")

    @property
    def threads(self) -> int:
        """Threads of a block: the load warp and those that compute."""
        return 32 * (WARPS + 1)

    @property
    def boxes(self) -> int:
        """Boxes of K, and of V, in a tile."""
        return self.tile_n // self.box

    @property
    def row_threads(self) -> int:
        """Threads that share a row of a folded result, 4 columns at a time."""
        return math.gcd(32 * WARPS // self.rows, self.head_dim_v // 4)

    @property
    def columns(self) -> int:
        """Columns of a folded result that a thread holds."""
        return self.head_dim_v // self.row_threads

    @property
    def part_stride(self) -> int:
        """Floats from row to row of a warp's O in shared memory: rows of a warp's store fall into different banks."""
        return self.head_dim_v + 4

    @property
    def slot_bytes(self) -> int:
        return 2 * self.tile_n * (self.head_dim + self.head_dim_v)

    @property
    def part_bytes(self) -> int:
        """O and the row statistics of all warps."""
        return 4 * WARPS * self.rows * (self.part_stride + 2)

    @property
    def slots(self) -> int:
        """Key tiles on their way or at work: as many as fit, so that memory is never idle."""
        return min(MAX_SLOTS, (SHARED_LIMIT - ROOM - self.part_bytes) // self.slot_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.slots * self.slot_bytes + self.part_bytes + ROOM


def config_for(kinds: CacheKinds) -> DecodeConfig:
    """The frozen choice by head dimensions and rows."""
    tile_n = _tile_n(kinds.kinds)
    box = math.gcd(kinds.page_size, MAX_BOX)
    return DecodeConfig(kinds.kinds.head_dim, kinds.kinds.head_dim_v, kinds.rows, tile_n, box)


def _tile_n(kinds: Kinds) -> int:
    return 64 if kinds.head_dim + kinds.head_dim_v <= 256 else 32


def rounded(rows: int) -> int:
    """Query rows of a sequence and KV head as kernels are compiled for them."""
    return max(4, 1 << (rows - 1).bit_length())


def missing(problem: CacheProblem) -> tuple[str, ...]:
    """What a KV-cache call needs and the decode kernel lacks; empty where it serves."""
    attend, kinds = problem.attend, problem.attend.kinds
    rows = attend.seqlen_q * kinds.group
    lacks = []
    if kinds.dtype not in DTYPES:
        lacks.append(f"dtype {kinds.dtype}")
    elif problem.cache_dtype != kinds.dtype:
        lacks.append(f"a cache of {problem.cache_dtype}")
    if kinds.head_dim % BLOCK_COLUMNS or kinds.head_dim_v % BLOCK_COLUMNS:
        lacks.append(f"head_dim={kinds.head_dim} and head_dim_v={kinds.head_dim_v} (only multiples of {BLOCK_COLUMNS})")
    if rows > WARP_ROWS:
        lacks.append(f"{rows} query rows for each KV head (up to {WARP_ROWS})")
    if kinds.paged and problem.page_size % MIN_BOX:
        lacks.append(f"pages of {problem.page_size} rows (only multiples of {MIN_BOX})")
    if kinds.paged and problem.meta("cache_leftpad") is not None:
        lacks.append("cache_leftpad with a page_table")
    metas = [problem.meta(name) for name in ("q", "k_cache", "v_cache", "out")]
    strides = (meta.stride for meta in metas if meta is not None)
    if not problem.aligned or not all(has_aligned_rows(stride, kinds.dtype.itemsize) for stride in strides):
        lacks.append(f"addresses or strides that are no multiples of {ALIGNMENT} bytes")
    most = max(attend.batch * _most_tiles(problem), problem.capacity + attend.seqlen_q)
    if most >= COUNTED or parts_of(problem) >= MOST_PARTS:
        lacks.append(f"{attend.batch} caches of {problem.capacity} rows")
    return tuple(lacks)


def slots_of(problem: CacheProblem) -> int:
    """Chunks that a sequence of the call may have: of WARPS tiles at least, unless a number was asked for."""
    tiles = _most_tiles(problem)
    return min(problem.num_splits, tiles) if problem.num_splits else min(MOST_CHUNKS, -(-tiles // WARPS))


def _most_tiles(problem: CacheProblem) -> int:
    """Upper bound of the tiles that a sequence's rows see."""
    attend, keys = problem.attend, problem.capacity
    if attend.kinds.window_left:
        right = attend.window_right if attend.kinds.window_right else keys
        keys = min(keys, attend.window_left + attend.seqlen_q + right)
    return min(keys, problem.capacity) // _tile_n(attend.kinds) + 2


def parts_of(problem: CacheProblem) -> int:
    """float32 numbers that the parts of a call take; see `decode.Splits`."""
    attend, kinds = problem.attend, problem.attend.kinds
    part = attend.seqlen_q * kinds.group * kinds.head_dim_v + PART_EXTRA
    return attend.batch * attend.heads_kv * slots_of(problem) * part
