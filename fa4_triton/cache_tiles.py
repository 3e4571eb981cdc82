"""Tiles of the kernels for KV caches, by element sizes, head dimension and shared memory.

Measured on an H100 (docs/performance.md): two stages of 64 keys, 64 KiB, in each of two programs on a multiprocessor
keep enough bytes on their way. Elsewhere the tile is what fits into the shared memory in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.backends.compiler import GPUTarget

from fa4_triton.tiles import SHARED_MEMORY, family_of

MAX_ROWS = 64
"""Query rows that one decode tile holds at most; more of them are the prefill kernel's."""
RESERVED = 1024
"""Bytes of shared memory that a multiprocessor keeps for each program."""


class CacheTile(NamedTuple):
    """Query rows and keys of a tile, warps and stages of a program.

    programs: that share a multiprocessor in the decode kernel.
    """

    rows: int
    n: int
    warps: int
    stages: int
    programs: int = 0


def _stages(stage: int, rest: int, kib: float, free: int = 0) -> int:
    """Stages, 4 at most, of which all but `free` take `stage` bytes of `kib` of shared memory beside `rest` bytes."""
    return min(4, (int(kib * 1024) - rest) // stage + free)


def _padded(dim: int) -> int:
    return max(64, 1 << (dim - 1).bit_length())


def decode_tile(itemsize: int, cache_itemsize: int, dim: int, rows: int, target: GPUTarget | None) -> CacheTile:
    """The tile of the decode kernel.

    itemsize, cache_itemsize: bytes of an element of q and of the cache. dim: the larger head dimension. rows: query
    rows of a sequence times the heads that share a KV head. A target of None is Triton's interpreter.
    """
    packed, dim = max(16, 1 << (rows - 1).bit_length()), _padded(dim)
    if target is None:
        return CacheTile(packed, 16, 4, 1, 1)
    n = 64 if itemsize == 2 else 32
    warps = 8 if packed * dim >= 64 * 128 else 4  # two sums of O^T must fit into the registers
    # A stage holds keys, values and the query; P needs its place, too, and O^T where a part is stored.
    stage = 2 * n * dim * cache_itemsize + packed * dim * itemsize
    rest = RESERVED + packed * (n * itemsize + 2 * dim)
    family = family_of(target)
    # Where products take their operands from registers, Triton loads a tile into the place of the one just multiplied.
    free = 1 if family in ("ampere", "small") else 0
    kib = SHARED_MEMORY[family]
    programs = 2 if _stages(stage, rest, kib / 2, free) > 1 else 1
    return CacheTile(packed, n, warps, max(1, _stages(stage, rest, kib / programs, free)), programs)


def prefill_tile(itemsize: int, cache_itemsize: int, dim: int, target: GPUTarget | None) -> CacheTile:
    """The tile of the prefill kernel; arguments as for `decode_tile`."""
    if target is None:
        return CacheTile(32, 16, 4, 1)
    dim = _padded(dim)
    rows, n = (64, 64) if itemsize == 2 and dim <= 128 else (32, 32)
    stage, rest = 2 * n * dim * cache_itemsize, RESERVED + rows * (dim + n) * itemsize
    return CacheTile(rows, n, 4, max(1, _stages(stage, rest, SHARED_MEMORY[family_of(target)] / 2)))
