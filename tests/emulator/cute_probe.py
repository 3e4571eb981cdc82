"""Kernels around `fa4_cute.exp2.exp2_pair` and `fa4_cute.softcap`: their accuracy is that of what they compile to."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa4_cute.exp2 import exp2_pair
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
