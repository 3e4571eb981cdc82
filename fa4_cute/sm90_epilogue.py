"""The end of a work item in the SM90 forward: a consumer warpgroup normalises its O and writes it and the LSE.

`write` takes a consumer's `State`; its elements lie as `sm90_softmax` says.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from fa4_core.problem import Kinds
from fa4_cute.params import DTYPES
from fa4_cute.parts import count_row
from fa4_cute.sm90_config import EPILOGUE_BARRIER, WARPGROUP, WARPGROUP_ROWS, Sm90Config
from fa4_cute.sm90_places import first_position, place
from fa4_cute.sm90_tiles import tiled_mma
from fa4_cute.softmax import LOG2_E, finish, pack
from fa4_cute.views import boxes, from_position


class Epilogue:
    """For the kinds and the config of one compiled kernel. counted: also writes each row's counts."""

    def __init__(self, kinds: Kinds, config: Sm90Config, counted: bool) -> None:
        self.kinds = kinds
        self.config = config
        self.counted = counted
        self.dtype = DTYPES[kinds.dtype]

    @cute.jit
    def write(self, state, maps, outputs, sink, shared, item, span):
        """Writes O, normalised, and the LSE; O by TMA where the warpgroup's 64 rows are the sequence's own."""
        sequence, work = item.sequence, item.work
        batch = Int32(0) if const_expr(self.kinds.varlen) else work.batch
        sinks_log2 = [None, None]
        if const_expr(sink is not None):
            sinks_log2 = [Float32(sink[place(self.config, state.group, work, r)[1]]) * LOG2_E for r in range(2)]
        for r in cutlass.range_constexpr(2):
            position, head = place(self.config, state.group, work, r)
            total = state.row_sum[r]
            total = total + cute.arch.shuffle_sync_bfly(total, 1)
            total = total + cute.arch.shuffle_sync_bfly(total, 2)
            scale, lse = finish(state.pivot[r], total, sinks_log2[r])
            takes_part = True
            if const_expr(self.kinds.seqused_q):
                takes_part = position < sequence.seqlen_q
                lse = lse if takes_part else -Float32.inf
            for at in cutlass.range_constexpr(cute.size(state.acc_o) // 2):
                of_row = at // 2 * 4 + 2 * r + at % 2
                scaled = state.acc_o[of_row] * scale
                if const_expr(self.kinds.seqused_q):  # rows that take no part may hold NaN
                    scaled = scaled if takes_part else Float32(0.0)
                state.acc_o[of_row] = scaled
            if cute.arch.lane_idx() % 4 == 0 and position < sequence.rows_q:
                row = sequence.offset_q + position
                outputs.lse[row, head, batch] = lse
                if const_expr(self.counted):
                    count_row(outputs.counts, self.kinds.varlen, row, head, batch, span, state.skips[r])

        r_o = cute.make_rmem_tensor(state.acc_o.layout, self.dtype)
        pairs = cute.recast_tensor(r_o, Int32)
        for at in cutlass.range_constexpr(cute.size(state.acc_o) // 2):
            pairs[at] = pack(state.acc_o[2 * at], state.acc_o[2 * at + 1], self.dtype)
        whole = True
        if const_expr(self.kinds.varlen or self.kinds.seqused_q):
            end = first_position(self.config, state.group, work) + self.config.group_positions
            whole = end <= sequence.rows_q
        if whole:
            self._store_tile(state, maps, shared, r_o, sequence, work, batch)
        else:
            self._store_rows(state, outputs.out, r_o, item, batch)

    @cute.jit
    def _store_tile(self, state, maps, shared, r_o, sequence, work, batch):
        """64 rows of O through shared memory and TMA; rows past a dense tensor's end are cut by TMA."""
        config, group, columns = self.config, state.group, self.config.store_columns
        thread, _, _ = cute.arch.thread_idx()
        leader = cute.arch.make_warp_uniform(thread // 32) % 4 == 0
        sync = EPILOGUE_BARRIER + group
        s_o = shared.out[None, None, group]
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        mma = tiled_mma(self.dtype, config.warpgroups, columns, rows_from_registers=True)
        copy = cute.make_tiled_copy_C(atom, cute.make_tiled_mma(mma.op)).get_slice(thread % WARPGROUP)
        fragment = cute.make_layout(mma.get_slice(0).partition_shape_C((config.tile_m, columns)))
        m_o = from_position(maps.m_out[None, None, work.head, batch], sequence.offset_q, config.packed)
        for part in cutlass.range_constexpr(-(-self.kinds.head_dim_v // columns)):
            if leader:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.barrier(barrier_id=sync, number_of_threads=WARPGROUP)
            r_part = cute.make_tensor(r_o.iterator + part * cute.size(fragment), fragment)
            cute.copy(atom, copy.retile(r_part), copy.partition_D(s_o))
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=sync, number_of_threads=WARPGROUP)
            if leader:
                g_o = cute.local_tile(m_o, (WARPGROUP_ROWS, columns), (work.tile * config.warpgroups + group, part))
                t_so, t_go = boxes(maps.out, s_o, g_o, 2)
                cute.copy(maps.out, t_so, t_go)
                cute.arch.cp_async_bulk_commit_group()
                if const_expr(config.out_in_q):
                    cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _store_rows(self, state, m_out, r_o, item, batch):
        """The last rows of a packed sequence, straight from registers: the next rows are another sequence's."""
        pairs = cute.recast_tensor(r_o, Int32)
        column = cute.arch.lane_idx() % 4 * 2
        for r in cutlass.range_constexpr(2):
            position, head = place(self.config, state.group, item.work, r)
            if position < item.sequence.rows_q:
                line = m_out[item.sequence.offset_q + position, None, head, batch]
                line = cute.recast_tensor(line, Int32)
                for j in cutlass.range_constexpr(self.config.head_dim_v // 8):
                    if 8 * j + column < self.kinds.head_dim_v:
                        line[4 * j + column // 2] = pairs[2 * j + r]
