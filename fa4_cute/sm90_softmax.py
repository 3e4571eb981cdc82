"""Softmax of a score tile of the SM90 forward and of decoding, in registers: S to P, statistics, O rescaled.

Of each tile in turn: `cap`, `hide` where rows see different keys, `weigh`, `round`, and for tiles after an item's first
`rescale`. All work on `State`, in which element `c + 2 r + 4 j` of a thread's accumulators is row `8 r` and column
`8 j + c` after its own first one; four lanes share a row.
"""

from __future__ import annotations

import operator

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_core.problem import Kinds
from fa4_cute.params import DTYPES
from fa4_cute.ranges import Window, visible_keys
from fa4_cute.sm90_config import Sm90Config
from fa4_cute.sm90_places import place
from fa4_cute.softcap import all_near, bend, bend_near
from fa4_cute.softmax import fold, follow_max, pack, rescale_factor, subtrahend


class Softmax:
    """For the kinds and the config of one compiled kernel. counted: `State.skips` counts the rescales skipped."""

    def __init__(self, kinds: Kinds, config: Sm90Config, counted: bool) -> None:
        self.kinds = kinds
        self.config = config
        self.counted = counted
        self.dtype = DTYPES[kinds.dtype]

    @cute.jit
    def cap(self, state, masked: cutlass.Constexpr[bool]):
        """Softcap: whether it is known that all scores of the warp are near; before any is hidden.

        masked: -inf is to mean a hidden key, so scores of -inf become finite, and `bend` takes the tile by parts.
        """
        near = Boolean(False)
        if const_expr(self.kinds.softcap):
            if state.cap.unit != 1.0:
                for at in cutlass.range_constexpr(self.config.tile_n // 2):
                    state.acc_s[at] = state.acc_s[at] * state.cap.unit
            if const_expr(masked):
                for at in cutlass.range_constexpr(self.config.tile_n // 2):
                    state.acc_s[at] = cute.arch.fmax(state.acc_s[at], state.cap.lowest, nan=True)
            else:
                near = all_near([state.acc_s[at] for at in range(self.config.tile_n // 2)], state.cap)
        return near

    @cute.jit
    def hide(self, state, item, tile):
        """Turns the scores of keys that their row does not see into -inf."""
        column = tile * self.config.tile_n + cute.arch.lane_idx() % 4 * 2
        window = Window(state.values.window_left, state.values.window_right)
        for r in cutlass.range_constexpr(2):
            position, _ = place(self.config, state.group, item.work, r)
            first, end = visible_keys(position, item.sequence.seqlen_q, item.sequence.seqlen_k, window)
            first, end = first - column, end - column
            for j in cutlass.range_constexpr(self.config.tile_n // 8):
                for c in cutlass.range_constexpr(2):
                    at = 4 * j + 2 * r + c
                    visible = 8 * j + c < end
                    if const_expr(self.kinds.window_left):
                        visible = visible and 8 * j + c >= first
                    state.acc_s[at] = state.acc_s[at] if visible else -Float32.inf

    @cute.jit
    def weigh(self, state, near, masked: cutlass.Constexpr[bool]):
        """Turns scores into weights against each row's pivot, in place, and follows the row sums.

        near, masked: what `cap` returned and was told. Returns for the thread's two rows whether the pivot moved, and
        the factor that O has to be multiplied by.
        """
        highest = []
        for r in cutlass.range_constexpr(2):
            of_row = fold(self._row(state, r), cute.arch.fmax)
            of_row = cute.arch.fmax(of_row, cute.arch.shuffle_sync_bfly(of_row, 1))
            highest.append(cute.arch.fmax(of_row, cute.arch.shuffle_sync_bfly(of_row, 2)))
        moved, factor = (Boolean(False), Boolean(False)), (Float32(1.0), Float32(1.0))
        if const_expr(self.kinds.softcap and masked):
            moved, factor = self._exponentiate(state, highest, lambda s, shift: bend(s, state.cap, shift, True))
        elif const_expr(self.kinds.softcap):
            if near:
                moved, factor = self._exponentiate(state, highest, lambda s, shift: bend_near(s, state.cap, shift))
            else:
                moved, factor = self._exponentiate(state, highest, lambda s, shift: bend(s, state.cap, shift, False))
        else:
            scale = state.values.scale_log2
            moved, factor = self._exponentiate(
                state, highest, lambda scores, shift: [s * scale + shift for s in scores]
            )
        return moved, factor

    @cute.jit
    def _exponentiate(self, state, highest, exponents: cutlass.Constexpr):
        """`weigh` from the rows' highest scores on; exponents(scores, shift) are in log2 units, shift added."""
        highest = exponents(highest, Float32(0.0))
        moved, factor = [False, False], [Float32(1.0), Float32(1.0)]
        for r in cutlass.range_constexpr(2):
            before = state.pivot[r]
            pivot, moved[r] = follow_max(before, highest[r], state.values.threshold)
            state.pivot[r] = pivot
            factor[r] = rescale_factor(before, pivot) if moved[r] else Float32(1.0)
            if const_expr(self.counted):
                kept = before > -Float32.inf and not moved[r]
                state.skips[r] = state.skips[r] + Int32(kept)
            scores = exponents(self._row(state, r), -subtrahend(pivot))
            weights = [cute.math.exp2(score, fastmath=True) for score in scores]
            for at in cutlass.range_constexpr(len(weights)):
                state.acc_s[at // 2 * 4 + 2 * r + at % 2] = weights[at]
            state.row_sum[r] = state.row_sum[r] * factor[r] + fold(weights, operator.add)
        return (moved[0], moved[1]), (factor[0], factor[1])

    def _row(self, state, r: int) -> list:
        """The thread's scores of its row r."""
        return [state.acc_s[at // 2 * 4 + 2 * r + at % 2] for at in range(self.config.tile_n // 4)]

    @cute.jit
    def round(self, state):
        """P in 16 bits, where wgmma reads it; its elements lie as those of S."""
        pairs = cute.recast_tensor(state.p, Int32)
        for at in cutlass.range_constexpr(self.config.tile_n // 4):
            pairs[at] = pack(state.acc_s[2 * at], state.acc_s[2 * at + 1], self.dtype)

    @cute.jit
    def rescale(self, state, moved, factor):
        """Multiplies O by the rows' factors, if any row of the warp moved its pivot."""
        if cute.arch.vote_any_sync(moved[0] or moved[1]):
            for at in cutlass.range_constexpr(cute.size(state.acc_o)):
                state.acc_o[at] = state.acc_o[at] * factor[at // 2 % 2]
