"""Tiles of the SM90 forward: how they lie in shared memory, and the wgmmas that read them."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from fa4_cute.sm90_config import WARPGROUP_ROWS, Sm90Config


def shared_layout(dtype: Any, tile: tuple[int, int], slots: int | None = None) -> cute.ComposedLayout:
    """Row-major tiles in the widest swizzle whose period divides a row."""
    kinds = warpgroup.SmemLayoutAtomKind
    width = tile[1] * dtype.width
    kind = next(
        kind for bits, kind in ((1024, kinds.K_SW128), (512, kinds.K_SW64), (256, kinds.K_SW32)) if width % bits == 0
    )
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    if slots is None:
        return cute.tile_to_shape(atom, tile, order=(0, 1))
    return cute.tile_to_shape(atom, (*tile, slots), order=(0, 1, 2))


def output_layout(dtype: Any, config: Sm90Config) -> cute.ComposedLayout:
    """A warpgroup's 64 rows of O in shared memory, the columns that leave together: their own, or where Q was."""
    if not config.out_in_q:
        return shared_layout(dtype, (WARPGROUP_ROWS, config.store_columns))
    q = shared_layout(dtype, (config.tile_m, config.head_dim))
    rows = cute.make_layout((WARPGROUP_ROWS, config.head_dim_v), stride=(1, config.tile_m))
    return cute.composition(q, rows)


def tiled_mma(dtype: Any, warpgroups: int, columns: int, rows_from_registers: bool) -> cute.TiledMma:
    """wgmma tiles of 64 rows a warpgroup: S = Q K^T from shared memory, O = P V with P from registers."""
    op = warpgroup.MmaF16BF16Op(
        dtype,
        Float32,
        (WARPGROUP_ROWS, columns, 16),
        warpgroup.OperandSource.RMEM if rows_from_registers else warpgroup.OperandSource.SMEM,
        OperandMajorMode.K,
        OperandMajorMode.MN if rows_from_registers else OperandMajorMode.K,
    )
    return cute.make_tiled_mma(op, cute.make_layout((warpgroups, 1, 1)))
