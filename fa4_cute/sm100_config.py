"""The one table of the SM100 forward: tiles, tensor memory, shared memory, registers, and the choices among them.

Imports no CUTLASS, so that a dispatcher may ask what the kernel serves. Source: PTX ISA 8.8, 9.7.16 (tensor memory: 512
columns of 128 lanes, 4 bytes each) and 9.7.19.5 (setmaxnreg); CUDA C++ Programming Guide, compute capability 10.0 (227
KiB of shared memory a block, 65,536 registers an SM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_core.problem import Kinds

TMEM_COLUMNS = 512
SHARED_BYTES = 227 * 1024
REGISTERS = 65536
WARP = 32
TILE_M = 128
"""Rows of a Q tile in one CTA: lanes of tensor memory."""
SMALL_BYTES = 3072
"""Shared memory before the tiles: barriers, the work item, factors and scales. One KiB more would cost head_dim 128 its
third slot for K and V, and with two the tensor cores wait for V."""
ITEM_WORDS = 20
"""Words of a published work item, the last two for reads of four; all are negative where there are no more items."""
FRAGMENT = 32
"""Columns of a row that are exponentiated, converted and stored to P at a time."""

SOFTMAX_WARPS = 4
"""Warps of one softmax warpgroup: warps 0 to 3 work on Q tile 0, 4 to 7 on Q tile 1."""
CORRECTION_WARPS = 4
FIRST_CORRECTION_WARP = 8
MMA_WARP = 12
STORE_WARP = 13
LOAD_WARP = 14
WARPS = 16
"""The last one is the scheduler's."""

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
"""(head_dim, head_dim_v) that kernels are made for; others are padded with zeros to the first pair that holds them."""
DTYPES = (torch.float16, torch.bfloat16)


def padded(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The pair of `HEAD_DIMS` that holds (head_dim, head_dim_v), each up to 256."""
    return next(pair for pair in HEAD_DIMS if head_dim <= pair[0] and head_dim_v <= pair[1])


def missing(kinds: Kinds) -> tuple[str, ...]:
    """What a problem needs and the SM100 forward lacks; empty where it serves."""
    lacks = []
    if kinds.dtype not in DTYPES:
        lacks.append(f"dtype {kinds.dtype}")
    if kinds.paged:
        lacks.append("paged KV (page_table)")
    return tuple(lacks)


@dataclass(frozen=True)
class Exp2Share:
    """Which of a row's exponentials the FMA units compute, by column within a fragment of 32 columns.

    Of each `period` columns the last `emulated` are, in the fragments `first` to `last` (exclusive); period 0: none.
    """

    period: int = 0
    emulated: int = 4
    first: int = 0
    last: int = 4

    def holds(self, fragment: int, column: int) -> bool:
        """Whether the pair of columns `column` and `column + 1` of a fragment is emulated."""
        if self.period == 0 or not self.first <= fragment < self.last:
            return False
        return column % self.period >= self.period - self.emulated

    def fraction(self, columns: int) -> float:
        """The part of a row of so many columns that is emulated."""
        pairs = [(f, c) for f in range(columns // FRAGMENT) for c in range(0, FRAGMENT, 2)]
        return sum(self.holds(*pair) for pair in pairs) / len(pairs)


@dataclass(frozen=True)
class Sm100Config:
    """What one compiled kernel is laid out for; refuses what does not fit.

    head_dim, head_dim_v: padded. share: the part of the exponentials that FMA units compute. p_first: columns of P that
    are handed to the tensor cores before the rest is computed. registers_*: of a thread, by role. tile_m: rows of a Q
    tile in one CTA. packed: query heads of one KV head whose rows lie side by side in a Q tile, 1 for none. ctas: 2 if
    the CTAs of a cluster share their MMAs, each with rows of Q and half of every K and V tile. launch_control: whether
    blocks take over the work of blocks that have not started, instead of drawing it or taking equal shares.
    """

    head_dim: int
    head_dim_v: int
    share: Exp2Share = Exp2Share()
    packed: int = 1
    ctas: int = 1
    launch_control: bool = False
    p_first: int = 96
    registers_softmax: int = 192
    registers_correction: int = 80
    registers_other: int = 48
    tile_m: int = TILE_M
    tile_n: int = 128

    def __post_init__(self) -> None:
        if (self.head_dim, self.head_dim_v) not in HEAD_DIMS:
            raise ValueError(f"head dims {self.head_dim}, {self.head_dim_v}: accepted are {HEAD_DIMS}")
        if self.o_columns[-1] + self.head_dim_v > TMEM_COLUMNS:
            raise ValueError(f"tensor memory: {self.o_columns[-1] + self.head_dim_v} of {TMEM_COLUMNS} columns")
        if self.tile_m % self.packed:
            raise ValueError(f"packed: got {self.packed} heads, a Q tile has {self.tile_m} rows")
        if self.ctas not in (1, 2) or (self.ctas == 2 and (self.o_replaces_q or self.launch_control)):
            raise ValueError(f"ctas: got {self.ctas}; a pair needs head_dim up to 128, and no launch_control")
        if self.p_first % FRAGMENT or not 0 < self.p_first < self.tile_n:
            raise ValueError(f"p_first: got {self.p_first}, accepted are 32, 64 and 96")
        needed = self.k_parts + self.v_parts
        if self.kv_slots < needed:
            raise ValueError(f"shared memory: {self.kv_slots} slots for K and V, at least {needed} are needed")
        if 8 * self.barriers + self.items_bytes + self.row_bytes > SMALL_BYTES:
            raise ValueError(f"shared memory: barriers, items and rows exceed {SMALL_BYTES} bytes")
        registers = (self.registers_softmax, self.registers_correction, self.registers_other)
        used = WARP * (2 * SOFTMAX_WARPS * registers[0] + CORRECTION_WARPS * registers[1] + 4 * registers[2])
        if used > REGISTERS:
            raise ValueError(f"registers: {used} of {REGISTERS}")
        if any(count % 8 for count in registers):
            raise ValueError(f"registers: got {registers}, setmaxnreg takes multiples of 8")

    @property
    def tile_positions(self) -> int:
        """Query positions of a Q tile, over both CTAs of a pair."""
        return self.ctas * self.tile_m // self.packed

    @property
    def positions(self) -> int:
        """Query positions of a work item."""
        return self.q_tiles * self.tile_positions

    @property
    def q_tiles(self) -> int:
        """Q tiles in flight: two in turns, or one, whose O leaves no room for another and whose S has two places."""
        return 1 if self.head_dim_v > 128 else 2

    @property
    def mma_tiles(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(rows, columns, inner) of S = Q K^T and of O = P V, over both CTAs of a pair."""
        rows = self.ctas * self.tile_m
        return (rows, self.tile_n, self.head_dim), (rows, self.head_dim_v, self.tile_n)

    @property
    def mma_parts(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """`mma_tiles` of one part of K and of V, which a slot holds."""
        tile_s, tile_o = self.mma_tiles
        return (*tile_s[:2], tile_s[2] // self.k_parts), (*tile_o[:2], tile_o[2] // self.v_parts)

    @property
    def store_tile(self) -> tuple[int, int]:
        """Rows and columns of an O tile as one CTA stores it."""
        return self.tile_m, self.head_dim_v

    # Tensor memory, in columns of 32 bits. P lies in the second half of S: it is written when S has been read.
    @property
    def s_columns(self) -> tuple[int, ...]:
        """First column of S, one for each Q tile, or for every other key tile of the one."""
        return (0, self.tile_n)

    @property
    def p_offset(self) -> int:
        """Columns from S to P of the same Q tile."""
        return self.tile_n // 2

    @property
    def o_columns(self) -> tuple[int, ...]:
        """First column of O, one for each Q tile."""
        return tuple(2 * self.tile_n + self.head_dim_v * i for i in range(self.q_tiles))

    # Shared memory, in bytes. K and V share one ring's slots. Where Q leaves too little room, O is staged in its place,
    # and K and V come in parts, so that what an MMA has read makes room before the rest of its tile does.
    @property
    def q_bytes(self) -> int:
        """One Q tile."""
        return self.tile_m * self.head_dim * 2

    @property
    def o_bytes(self) -> int:
        """One O tile."""
        return self.tile_m * self.head_dim_v * 2

    @property
    def k_bytes(self) -> int:
        """One CTA's part of a K tile."""
        return self.tile_n * self.head_dim * 2 // self.ctas

    @property
    def v_bytes(self) -> int:
        """One CTA's part of a V tile."""
        return self.tile_n * self.head_dim_v * 2 // self.ctas

    @property
    def o_replaces_q(self) -> bool:
        """Whether O is staged where Q was. A work item's Q then waits until the previous one's O is stored."""
        return self.head_dim > 128

    @property
    def barriers(self) -> int:
        """Barriers of 8 bytes: items 2, q 4, s 4, p_rest 2, o 2, scales 4, out 4, factor 8, control 2; kv 2 a slot."""
        return 32 + 2 * self.kv_slots

    @property
    def items_bytes(self) -> int:
        """The published work item, launch control's answer, and the address of tensor memory."""
        return 4 * ITEM_WORDS + 16 + 16

    @property
    def row_bytes(self) -> int:
        """A row's factor and its final scale."""
        return 2 * 4 * 2 * self.tile_m

    @property
    def k_parts(self) -> int:
        """Parts of a K tile, of so many columns each: 1, or such as to hold 64 columns."""
        return self.head_dim // 64 if self.o_replaces_q else 1

    @property
    def v_parts(self) -> int:
        """Parts of a V tile, of so many keys each: 1, or such as to take what a part of K does."""
        return self.v_bytes * self.k_parts // self.k_bytes if self.o_replaces_q else 1

    @property
    def slot_bytes(self) -> int:
        """A slot of the ring of K and V."""
        return max(self.k_bytes // self.k_parts, self.v_bytes // self.v_parts)

    @property
    def tile_bytes(self) -> int:
        """Q and O tiles."""
        return self.q_tiles * (self.q_bytes if self.o_replaces_q else self.q_bytes + self.o_bytes)

    @property
    def kv_slots(self) -> int:
        """Slots of the ring of K and V: as many as fit."""
        return min((SHARED_BYTES - SMALL_BYTES - self.tile_bytes) // self.slot_bytes, 12)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return SMALL_BYTES + self.tile_bytes + self.kv_slots * self.slot_bytes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPS * WARP

    # Arrivals that complete a barrier's phase.
    @property
    def softmax_threads(self) -> int:
        """Threads of one softmax warpgroup."""
        return SOFTMAX_WARPS * WARP

    @property
    def correction_threads(self) -> int:
        """Threads of the correction warpgroup."""
        return CORRECTION_WARPS * WARP

    @property
    def softmax_arrivals(self) -> int:
        """Arrivals of one Q tile's softmax that the MMA warp waits for: threads, or a pair's warps."""
        return self.softmax_threads if self.ctas == 1 else 2 * SOFTMAX_WARPS

    @property
    def correction_arrivals(self) -> int:
        """Arrivals of the correction that the MMA warp waits for: threads, or a pair's warps."""
        return self.correction_threads if self.ctas == 1 else 2 * CORRECTION_WARPS


def config_for(kinds: Kinds, capability: tuple[int, int]) -> Sm100Config:
    """The choice for a problem that `missing` has no objection to (docs/blackwell.md has the table behind it).

    capability: the device's; 10.3 has twice the special-function rate, so no exponential is emulated there.
    """
    pair = padded(kinds.head_dim, kinds.head_dim_v)
    share = Exp2Share() if capability >= (10, 3) else Exp2Share(period=16)
    packed = kinds.group if TILE_M % kinds.group == 0 else 1
    ctas = 2 if pair == (128, 128) and not kinds.uneven else 1
    if pair[0] > 128:  # the MMA warp holds more descriptors
        return Sm100Config(*pair, share, packed, ctas, registers_softmax=184, registers_other=64)
    return Sm100Config(*pair, share, packed, ctas)
