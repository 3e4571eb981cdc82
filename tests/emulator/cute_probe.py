"""Kernels around functions of kernels, which are tested as what they compile to."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa4_cute.decode_shares import Calls, find_drawn, find_share, first_tile, keys_of, start_draws
from fa4_cute.exp2 import exp2_pair
from fa4_cute.params import fake_numbers
from fa4_cute.ranges import Window
from fa4_cute.softcap import all_near, bend, bend_near, cap_of

THREADS = 256


class _Probe:
    def fake_arguments(self):
        vector = [make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=16) for _ in range(2)]
        return [*vector, make_fake_stream()]

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, y).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


class Exp2Probe(_Probe):
    """y = 2^x for a float32 vector of a multiple of 512 elements, by one block."""

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        steps = cute.size(x) // (2 * THREADS)
        for i in cutlass.range(steps, unroll=1):
            at = (Int32(i) * THREADS + thread) * 2
            y[at], y[at + 1] = exp2_pair(x[at], x[at + 1])


class SoftcapProbe(_Probe):
    """y = tanh(scale x) for a float32 vector of a multiple of 4,096 elements, 16 side by side a thread, by one block.

    hidden: as `softcap.bend` has it; -inf then means a hidden key.
    """

    def __init__(self, hidden: bool, scale: float) -> None:
        self.hidden = hidden
        self.scale = scale

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cap = cap_of(Float32(self.scale), Float32(1.0))
        for i in cutlass.range(cute.size(x) // (16 * THREADS), unroll=1):
            at = (Int32(i) * THREADS + thread) * 16
            scores = [x[at + n] * cap.unit for n in range(16)]
            if all_near(scores, cap):
                bent = bend_near(scores, cap, Float32(0.0))
                for n in cutlass.range_constexpr(16):
                    y[at + n] = bent[n]
            else:
                bent = bend(scores, cap, Float32(0.0), self.hidden)
                for n in cutlass.range_constexpr(16):
                    y[at + n] = bent[n]


class SharesProbe:
    """Shares of teams and chunks of sequences of `lengths` keys, in tiles of `tile_n`.

    shares (teams, 5): sequence, chunk, tile, tiles, and the most tiles of a sequence that is drawn. chunks (batch, 2 +
    most chunks): tiles, their number, where they begin. order (n,): the sequences as they are drawn, then the batch.
    """

    def __init__(self, tile_n: int) -> None:
        self.tile_n = tile_n

    def fake_arguments(self):
        tensors = [fake_numbers(Int32, 1), fake_numbers(Int32, 2), fake_numbers(Int32, 2), fake_numbers(Int32, 1)]
        return [*tensors, Int32(1), Int32(1), Int32(1), make_fake_stream()]

    @cute.jit
    def __call__(
        self,
        lengths: cute.Tensor,
        shares: cute.Tensor,
        chunks: cute.Tensor,
        order: cute.Tensor,
        capacity: Int32,
        wanted: Int32,
        teams: Int32,
        stream,
    ):
        self.kernel(lengths, shares, chunks, order, capacity, wanted).launch(
            grid=[1, teams, 1], block=[32, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        lengths: cute.Tensor,
        shares: cute.Tensor,
        chunks: cute.Tensor,
        order: cute.Tensor,
        capacity: Int32,
        wanted: Int32,
    ):
        _, team, _ = cute.arch.block_idx()
        _, teams, _ = cute.arch.grid_dim()
        calls = Calls(lengths, None, lengths.shape[0], Int32(1), capacity, capacity, Int32(0), wanted)
        window = Window(None, None)
        deal = find_share(team, teams, calls, window, self.tile_n)
        draws = start_draws(deal)
        for number in cutlass.range(team, order.shape[0], teams, unroll=1):
            drawn, draws = find_drawn(Int32(number), draws, calls, window, self.tile_n)
            if cute.arch.lane_idx() == 0:
                order[number] = drawn
        if cute.arch.lane_idx() == 0:
            for n in cutlass.range_constexpr(4):
                shares[team, n] = deal.share[n]
            shares[team, 4] = deal.longest
            if team == 0:
                for sequence in cutlass.range(0, calls.batch, unroll=1):
                    keys = keys_of(Int32(sequence), calls, window, self.tile_n)
                    chunks[sequence, 0] = keys.tiles
                    chunks[sequence, 1] = keys.chunks
                    for chunk in cutlass.range(0, keys.chunks, unroll=1):
                        chunks[sequence, 2 + chunk] = first_tile(Int32(chunk), keys, calls)
