"""What the decode kernel serves, and its tiles and slots; imports no DSL, so that it can be asked anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fa4_core.problem import Kinds

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheProblem

WARP_ROWS = 16
"""Query rows of a tile: those of a warp's matrix product."""
WARPS = 4
"""Warps that compute, each on key tiles of its own."""
MAX_SLOTS = 12
SHARED_LIMIT = 232448
"""Bytes of shared memory that a block may have on SM90 and SM100."""
ROOM = 1152
"""Bytes for barriers, a word and alignment."""
BLOCK_COLUMNS = 64
"""What tiles' columns are rounded up to."""
DTYPES = (torch.float16, torch.bfloat16)
MOST_CHUNKS = 64
"""Chunks that a sequence has at most."""
MIN_BOX = 8
"""Rows after which the swizzle repeats, and so the fewest that TMA brings at a time."""
ALIGNMENT = 16
"""Bytes that TMA asks caches to be aligned to, in their base and in every stride; the query and the output are, too."""
COUNTED = 2**30
"""Key tiles that the kernel can number."""
_LEFTPAD, _ROWS = 8, (0, 1, 2, 14)
"""Places in `CacheProblem.signature`: of cache_leftpad; of q, the caches and out."""


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

    head_dim, head_dim_v: what the tiles hold, the problem's dimensions rounded up; the rest is zeros. rows: of O that
    are folded.
    """

    head_dim: int
    head_dim_v: int
    rows: int
    tile_n: int
    box: int

    def __post_init__(self) -> None:
        if self.slots < WARPS:
            raise ValueError(f"{self}: {self.slots} slots fit, fewer than the {WARPS} warps whose tiles they hold")

    @property
    def threads(self) -> int:
        """Threads of a block: the load warp and those that compute."""
        return 32 * (WARPS + 1)

    @property
    def row_threads(self) -> int:
        """Threads that share a row of a folded result, 4 columns at a time."""
        return min(32 * WARPS // self.rows, self.head_dim_v // 4)

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
    dims = (kinds.kinds.head_dim, kinds.kinds.head_dim_v)
    head_dim, head_dim_v = (-(-dim // BLOCK_COLUMNS) * BLOCK_COLUMNS for dim in dims)
    tile_n = 64 if head_dim + head_dim_v <= 256 else 32
    return DecodeConfig(head_dim, head_dim_v, kinds.rows, tile_n, math.gcd(kinds.page_size, tile_n) or tile_n)


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
    if kinds.paged and problem.signature[_LEFTPAD] is not None:
        lacks.append("cache_leftpad with a page_table")
    if not problem.aligned or not all(_has_aligned_rows(problem.signature[at]) for at in _ROWS):
        lacks.append(f"addresses or strides that are no multiples of {ALIGNMENT} bytes")
    if attend.batch * (problem.capacity // 32 + 1) >= COUNTED or parts_of(problem) >= 2 * COUNTED:
        lacks.append("a call of so many keys or heads")
    return tuple(lacks)


def slots_of(problem: CacheProblem) -> int:
    """Chunks that a sequence of the call may have; `decode_shares.keys_of` makes them."""
    return problem.num_splits or min(MOST_CHUNKS, -(-(problem.capacity // 32 + 1) // WARPS))


def parts_of(problem: CacheProblem) -> int:
    """float32 numbers that the parts of a call take; see `decode.Splits`."""
    attend, kinds = problem.attend, problem.attend.kinds
    rows = attend.batch * attend.heads_kv * attend.seqlen_q * kinds.group
    return rows * slots_of(problem) * (kinds.head_dim_v + 2)


def _has_aligned_rows(meta: tuple | None) -> bool:
    """Whether every row of a tensor of 16-bit elements begins at a multiple of `ALIGNMENT`, if its first does."""
    return meta is None or all(stride > 0 and 2 * stride % ALIGNMENT == 0 for stride in meta[1][:-1])
