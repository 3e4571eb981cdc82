"""What the SM90 forward serves, and its tiles, slots and budgets; imports no DSL, so that it can be asked anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fa4_core.problem import Kinds

WARPGROUP = 128
"""Threads of a warpgroup."""
WARPGROUP_ROWS = 64
"""Query rows of a consumer warpgroup, those of a wgmma."""
SHARED_LIMIT = 232448
"""Bytes of shared memory that a block may have on SM90."""
REGISTERS = 65536
"""Registers of an SM."""
TURN_BARRIER, EPILOGUE_BARRIER, RAGGED_BARRIER = 1, 5, 9
"""Named barriers: the first by which warpgroups take turns, each one's of its own at an item's end, and all consumers'
behind a sequence's last keys. Barrier 0 is the block's."""
LONG = 4096
"""Keys of a row from which on Q's load need not overlap the output's store, which costs more than it saves there."""
DTYPES = (torch.float16, torch.bfloat16)


def missing(kinds: Kinds) -> tuple[str, ...]:
    """What a problem needs and the SM90 forward lacks; empty where it serves."""
    lacks = []
    if kinds.dtype not in DTYPES:
        lacks.append(f"dtype {kinds.dtype}")
    if kinds.paged:
        lacks.append("paged KV (page_table)")
    return tuple(lacks)


@dataclass(frozen=True)
class Sm90Config:
    """Tiles, slots and budgets of one kernel; refuses what does not fit.

    head_dim, head_dim_v: what the tiles hold, the problem's dimensions rounded up; the rest is zeros by TMA.
    warpgroups: consumers, of 64 query rows each. q_slots: 2 overlaps work items. out_columns: with one Q slot, the
    output's columns that leave together through shared memory of their own, or 0 to pass through Q's. turns: whether
    warpgroups take turns in issuing wgmma. packed: query heads of one KV head whose rows lie side by side in a query
    tile, 1 for none.
    """

    head_dim: int
    head_dim_v: int
    tile_n: int
    warpgroups: int = 2
    q_slots: int = 2
    kv_slots: int = 2
    out_columns: int = 0
    turns: bool = True
    packed: int = 1

    def __post_init__(self) -> None:
        if self.shared_bytes > SHARED_LIMIT:
            raise ValueError(f"{self}: {self.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT}")
        producer, consumer = self.registers
        if producer + self.warpgroups * consumer > REGISTERS // self.threads // 8 * 8 * (self.warpgroups + 1):
            raise ValueError(f"{self}: {self.registers} registers a thread are more than the block is launched with")
        if self.own_columns and self.head_dim_v % self.own_columns:
            raise ValueError(f"{self}: out_columns have to divide head_dim_v")
        if not self.own_columns and self.head_dim_v > self.head_dim:
            raise ValueError(f"{self}: the output does not fit where Q was")
        if not self.own_columns and self.head_dim_v % 64:
            raise ValueError(f"{self}: where Q was, the output's rows have to end with a 128-byte swizzle, 64 columns")
        if self.tile_n % 16:
            raise ValueError(f"{self}: tile_n has to be a multiple of 16, the depth of a wgmma")
        if WARPGROUP_ROWS % self.packed:
            raise ValueError(f"{self}: packed heads have to divide a warpgroup's {WARPGROUP_ROWS} rows")

    @property
    def tile_m(self) -> int:
        """Query rows of a block."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def positions(self) -> int:
        """Query positions of a work item."""
        return self.tile_m // self.packed

    @property
    def group_positions(self) -> int:
        """Query positions of a consumer warpgroup."""
        return self.positions // self.warpgroups

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and the warpgroup of the load and scheduler warps."""
        return WARPGROUP * (self.warpgroups + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the load and scheduler warps, and of a consumer.

        They share what the block is launched with: an SM's registers over its threads, rounded down to a multiple of 8.
        """
        return {1: (56, 240), 2: (40, 232), 3: (32, 160)}[self.warpgroups]

    @property
    def own_columns(self) -> int:
        """Columns of the output that have shared memory of their own: all with two Q slots, 0 where they take Q's."""
        return self.head_dim_v if self.q_slots > 1 else self.out_columns

    @property
    def out_in_q(self) -> bool:
        """Whether the output passes through Q's shared memory."""
        return not self.own_columns

    @property
    def store_columns(self) -> int:
        """Columns of the output that leave together."""
        return self.own_columns or self.head_dim_v

    @property
    def shared_bytes(self) -> int:
        """Shared memory: Q, K, V, O where it has room of its own, and 2 KB for barriers, items and alignment."""
        q = self.q_slots * self.tile_m * self.head_dim
        out = self.tile_m * self.own_columns
        kv = self.kv_slots * self.tile_n * (self.head_dim + self.head_dim_v)
        return 2 * (q + out + kv) + 2048


def config_for(kinds: Kinds, long: bool = False) -> Sm90Config:
    """The frozen choice by head dimensions and group (docs/performance.md has the measurements).

    Packed are groups that divide a warpgroup's rows, so that these are whole positions. long: for rows that see LONG
    keys and more; with one Q slot the output then leaves through Q's. Results do not depend on it, to the bit.
    """
    tiles = _tiles_for(_padded(kinds.head_dim), _padded(kinds.head_dim_v), kinds)
    if long:
        tiles = replace(tiles, out_columns=0)
    return replace(tiles, packed=kinds.group if WARPGROUP_ROWS % kinds.group == 0 else 1)


def _tiles_for(head_dim: int, head_dim_v: int, kinds: Kinds) -> Sm90Config:
    """Bending a softcap's scores takes registers: where it would spill, tiles have fewer keys."""
    if head_dim <= 64 and head_dim_v <= 64:
        return Sm90Config(64, 64, tile_n=112 if kinds.softcap else 128, warpgroups=3, kv_slots=3)
    if head_dim <= 128 and head_dim_v <= 128:
        return Sm90Config(head_dim, head_dim_v, tile_n=128)
    if head_dim <= 192 and head_dim_v <= 128:
        return Sm90Config(192, 64 if head_dim_v == 64 else 128, tile_n=128, q_slots=1, out_columns=64)
    if head_dim <= 192 and head_dim_v <= 192:
        return Sm90Config(192, 192, tile_n=96 if kinds.softcap else 112, q_slots=1)
    return Sm90Config(256, 256, tile_n=64, q_slots=1, out_columns=128, turns=not kinds.uneven)


def _padded(head_dim: int) -> int:
    return next(size for size in (64, 96, 128, 192, 256) if head_dim <= size)
