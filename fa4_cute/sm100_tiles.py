"""Tiles of the SM100 forward: the MMAs, how their operands lie, and which of them a block of a pair has."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from fa4_cute.sm100_config import Sm100Config
from fa4_cute.views import slots_apart


def cta_group(config: Sm100Config) -> tcgen05.CtaGroup:
    """Whether MMAs belong to a block or to a pair."""
    return tcgen05.CtaGroup.TWO if config.ctas == 2 else tcgen05.CtaGroup.ONE


def rank_in_pair(config: Sm100Config) -> Int32:
    """The block's place in its pair; block 0 issues the MMAs of both."""
    return cute.arch.block_idx_in_cluster() if config.ctas > 1 else Int32(0)


def tiled_mmas(dtype: Any, config: Sm100Config) -> tuple[cute.TiledMma, cute.TiledMma]:
    """S = Q K^T from shared memory, and O = P V with P from tensor memory."""
    k_major, mn_major, group = OperandMajorMode.K, OperandMajorMode.MN, cta_group(config)
    make, kind = blackwell.make_trivial_tiled_mma, (dtype, dtype)
    tile_s, tile_o = config.mma_tiles
    mma_s = make(*kind, k_major, k_major, Float32, group, tile_s[:2])
    mma_o = make(*kind, k_major, mn_major, Float32, group, tile_o[:2], tcgen05.OperandSource.TMEM)
    return mma_s, mma_o


def shared_layouts(dtype: Any, config: Sm100Config, mma_s: cute.TiledMma, mma_o: cute.TiledMma):
    """Swizzled tiles of Q and O, parts of K and V; slots in the last mode, those of K and V equally far apart."""
    (tile_s, _), (part_s, part_o) = config.mma_tiles, config.mma_parts
    apart = config.slot_bytes // 2
    layout_q = blackwell.make_smem_layout_a(mma_s, tile_s, dtype, config.q_tiles)
    layout_k = blackwell.make_smem_layout_b(mma_s, part_s, dtype, config.kv_slots)
    layout_v = blackwell.make_smem_layout_b(mma_o, part_o, dtype, config.kv_slots)
    row_major = cutlass.utils.LayoutEnum.ROW_MAJOR
    layout_o = blackwell.make_smem_layout_epi(dtype, row_major, config.store_tile, config.q_tiles)
    if config.o_replaces_q:
        layout_o = slots_apart(layout_o, config.q_tiles, config.q_bytes // 2)
    slots = config.kv_slots
    return layout_q, slots_apart(layout_k, slots, apart), slots_apart(layout_v, slots, apart), layout_o


def at_place(config: Sm100Config, tensor: cute.Tensor, place: Int32) -> cute.Tensor:
    """S or P of the single Q tile in one of its two places, which are `tile_n` columns apart."""
    words = Float32.width // tensor.element_type.width
    return cute.make_tensor(tensor.iterator + place * (config.tile_n * words), tensor.layout)
