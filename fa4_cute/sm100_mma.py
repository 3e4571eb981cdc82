"""The MMA warp of the SM100 forward: S = Q K^T and O += P V, into tensor memory.

The head of `sm100_forward` has the rings, the timeline, and what pairs of blocks and head_dim 256 do otherwise.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import tcgen05

from fa4_core.problem import Kinds
from fa4_cute.params import DTYPES
from fa4_cute.sm100_config import Sm100Config
from fa4_cute.sm100_parts import Operands
from fa4_cute.sm100_rings import lap_of, slot_of
from fa4_cute.sm100_scheduler import read_item
from fa4_cute.sm100_tiles import at_place, rank_in_pair, tiled_mmas


class Multiplier:
    """The role, for the kinds and the config of one compiled kernel."""

    def __init__(self, kinds: Kinds, config: Sm100Config) -> None:
        self.kinds = kinds
        self.config = config
        self.dtype = DTYPES[kinds.dtype]

    @cute.jit
    def run(self, mma_s, mma_o, shared, rings, tmem):
        """The MMA warp. tmem: where tensor memory starts."""
        operands = self._operands(mma_s, mma_o, shared, tmem)
        if const_expr(self.config.q_tiles == 1):
            self.multiply_one(operands, shared, rings)
        else:
            self.multiply(operands, shared, rings)

    @cute.jit
    def multiply(self, operands, shared, rings):
        """The MMA warp. Waits for Q, K and V, and for P with O rescaled; commits complete `s`, `o` and the empty slots.

        In turns over the Q tiles, O += P V of key tile n, then S of key tile n - 1, which may overwrite that P: MMAs of
        one thread run in order. At an item's end S of the next item takes the place of S of tile n - 1.
        """
        config, kv = self.config, rings.kv
        k_parts, v_parts = config.k_parts, config.v_parts
        rank = rank_in_pair(config)
        # Edges of a window shift from one Q tile to the next: the upper one begins later, the lower one ends earlier.
        left, right = self.kinds.window_left, self.kinds.window_right
        at, kv_at, q_laps, s_laps = rings.items.start(), rings.kv.start(), Int32(0), Int32(0)
        item = read_item(shared, rings, at)
        at = rings.items.next(at)
        while rank > 0 and item.valid:  # block 0 of a pair multiplies for both
            item = read_item(shared, rings, at)
            at = rings.items.next(at)
        if item.valid:
            kv.wait_parts(kv_at, k_parts)
            for i in cutlass.range_constexpr(config.q_tiles):
                q_laps = self._scores(operands, rings, i, item.span(i), item.end - 1, kv_at, q_laps, True)
            kv_at = kv.release_parts(kv_at, k_parts)
        while item.valid:
            for n in cutlass.range(item.end - item.begin - 1, unroll=1):
                tile = item.end - 1 - n
                k_at = kv.wait_parts(kv_at, v_parts)
                for i in cutlass.range_constexpr(config.q_tiles):
                    s_laps = self._values(operands, rings, i, item.span(i), tile, kv_at, s_laps, left and i == 1)
                    if const_expr(i == 0):
                        kv.wait_parts(k_at, k_parts)
                    else:
                        kv.release_parts(kv_at, v_parts)
                    q_laps = self._scores(operands, rings, i, item.span(i), tile - 1, k_at, q_laps, right and i == 0)
                kv_at = kv.release_parts(k_at, k_parts)
            done = item
            if const_expr(not config.o_replaces_q):
                for i in cutlass.range_constexpr(config.q_tiles):
                    if done.span(i).begin < done.span(i).end:
                        rings.q.release_by_mma(i)
            item = read_item(shared, rings, at)
            at = rings.items.next(at)
            k_at = kv.wait_parts(kv_at, v_parts)
            for i in cutlass.range_constexpr(config.q_tiles):
                s_laps = self._values(operands, rings, i, done.span(i), done.begin, kv_at, s_laps, True)
                if const_expr(not config.o_replaces_q):
                    if item.valid:
                        if const_expr(i == 0):
                            kv.wait_parts(k_at, k_parts)
                        q_laps = self._scores(operands, rings, i, item.span(i), item.end - 1, k_at, q_laps, True)
            kv_at = kv.release_parts(kv_at, v_parts)
            if item.valid:
                if const_expr(config.o_replaces_q):  # Q is not there before both Os have left its place
                    kv.wait_parts(k_at, k_parts)
                    for i in cutlass.range_constexpr(config.q_tiles):
                        q_laps = self._scores(operands, rings, i, item.span(i), item.end - 1, k_at, q_laps, True)
                kv_at = kv.release_parts(k_at, k_parts)

    @cute.jit
    def multiply_one(self, operands, shared, rings):
        """As `multiply`, for a single Q tile: S of key tile n - 1, into its other place, then O += P V of tile n.

        So the tensor cores work on the next S while softmax works on this one. K and V are let go of part by part.
        """
        at, kv_at, s_at, q_laps = rings.items.start(), rings.kv.start(), rings.s.start(), Int32(0)
        item = read_item(shared, rings, at)
        while item.valid:
            at = rings.items.next(at)
            rings.q.wait(slot_of(0, q_laps))
            q_laps = lap_of(0, q_laps)
            kv_at = self._issue_s(operands, rings, 0, s_at.index, kv_at)
            for n in cutlass.range(item.end - item.begin - 1, unroll=1):
                following = rings.s.next(s_at)
                kv_at = self._issue_s(operands, rings, 0, following.index, kv_at)
                kv_at = self._issue_o(operands, rings, 0, s_at, kv_at, n > 0)
                rings.o.publish_by_mma(s_at.index)
                s_at = following
            kv_at = self._issue_o(operands, rings, 0, s_at, kv_at, item.end - item.begin > 1)
            rings.o.publish_by_mma(s_at.index)
            s_at = rings.s.next(s_at)
            item = read_item(shared, rings, at)

    def _operands(self, mma_s, mma_o, shared, tmem):
        """Descriptors of shared memory and addresses of tensor memory, as the MMAs take them.

        tmem: where tensor memory starts. It is column 0, but as a constant it would take two instructions an operand.
        """
        config = self.config
        tile_s, tile_o = config.mma_tiles
        s = mma_s.make_fragment_C(mma_s.partition_shape_C(tile_s[:2]))
        o = mma_o.make_fragment_C(mma_o.partition_shape_C(tile_o[:2]))
        layout_p = blackwell.make_smem_layout_a(mma_o, tile_o, self.dtype, 1)
        p = mma_o.make_fragment_A(cute.make_tensor(s.iterator, layout_p.outer))[None, None, None, 0]
        return Operands(
            mma_s.make_fragment_A(shared.q),
            mma_s.make_fragment_B(shared.k),
            mma_o.make_fragment_B(shared.v),
            [cute.make_tensor(tmem + column, s.layout) for column in config.s_columns],
            [
                cute.make_tensor(cute.recast_ptr(tmem + column + config.p_offset, dtype=self.dtype), p.layout)
                for column in config.s_columns
            ],
            [cute.make_tensor(tmem + column, o.layout) for column in config.o_columns],
        )

    @cute.jit
    def _scores(
        self, operands, rings, i: cutlass.Constexpr[int], span, tile, k_at, q_laps, first: cutlass.Constexpr[bool]
    ):
        """S of Q tile i and a key tile, if the Q tile visits it; returns `q`'s laps.

        first: whether it may be the first that the Q tile visits.
        """
        if tile >= span.begin and tile < span.end:
            if const_expr(first):
                if tile == span.end - 1:
                    rings.q.wait(slot_of(i, q_laps))
                    q_laps = lap_of(i, q_laps)
            self._issue_s(operands, rings, i, i, k_at)
        return q_laps

    @cute.jit
    def _values(
        self, operands, rings, i: cutlass.Constexpr[int], span, tile, v_at, s_laps, last: cutlass.Constexpr[bool]
    ):
        """O += P V of Q tile i and a key tile, if the Q tile visits it; returns `s`'s laps.

        Starts when the first columns of P are there and O is rescaled, and waits once more for the rest of P. last:
        whether it may be the last tile that the Q tile visits.
        """
        if tile >= span.begin and tile < span.end:
            self._issue_o(operands, rings, i, slot_of(i, s_laps), v_at, tile < span.end - 1)
            if const_expr(last):
                if tile == span.begin:
                    rings.o.publish_by_mma(i)
            s_laps = lap_of(i, s_laps)
        return s_laps

    @cute.jit
    def _issue_s(self, operands, rings, i: cutlass.Constexpr[int], place, k_at):
        """S of Q tile i and a key tile, into one of the two places of `s`; returns where K ends in its ring.

        The single Q tile waits for K and lets go of it here, part by part.
        """
        config, mma_s = self.config, tiled_mmas(self.dtype, self.config)[0]
        slot = i
        if const_expr(config.head_dim > 128):
            # Plus zero, which ptxas cannot know: it would keep Q's descriptors of two words a step, and spill.
            slot = i + (k_at.index >> 5)
        s = operands.s[place] if const_expr(config.q_tiles == 2) else at_place(config, operands.s[0], place)
        steps = cute.size(operands.k, mode=[2])
        for k in cutlass.range_constexpr(config.k_parts * steps):
            if const_expr(config.q_tiles == 1 and k % steps == 0):
                rings.kv.wait(k_at)
            mma_s.set(tcgen05.Field.ACCUMULATE, k > 0)
            a, b = operands.q[None, None, k, slot], operands.k[None, None, k % steps, k_at.index]
            cute.gemm(mma_s, s, a, b, s)
            if const_expr((k + 1) % steps == 0):
                if const_expr(config.q_tiles == 1):
                    rings.kv.release_by_mma(k_at.index)
                k_at = rings.kv.next(k_at)
        rings.s.publish_by_mma(place)
        return k_at

    @cute.jit
    def _issue_o(self, operands, rings, i: cutlass.Constexpr[int], s_at, v_at, accumulate):
        """O (+)= P V of Q tile i and a key tile, whose P is where `s_at` is; returns where V ends in its ring.

        Starts when the first columns of P are there and O is rescaled, and waits once more for the rest of P. The
        single Q tile waits for V and lets go of it here, part by part.
        """
        config, mma_o = self.config, tiled_mmas(self.dtype, self.config)[1]
        rings.s.wait_released(s_at)
        mma_o.set(tcgen05.Field.ACCUMULATE, accumulate)
        p = operands.p[i] if const_expr(config.q_tiles == 2) else at_place(config, operands.p[0], s_at.index)
        steps = cute.size(operands.v, mode=[2])
        for k in cutlass.range_constexpr(config.v_parts * steps):
            if const_expr(config.q_tiles == 1 and k % steps == 0):
                rings.kv.wait(v_at)
            if const_expr(k * config.tile_n // (config.v_parts * steps) == config.p_first):
                rings.p_rest.wait(s_at)
            a, b = p[None, None, k], operands.v[None, None, k % steps, v_at.index]
            cute.gemm(mma_o, operands.o[i], a, b, operands.o[i])
            mma_o.set(tcgen05.Field.ACCUMULATE, True)
            if const_expr((k + 1) % steps == 0):
                if const_expr(config.q_tiles == 1):
                    rings.kv.release_by_mma(v_at.index)
                v_at = rings.kv.next(v_at)
        return v_at
