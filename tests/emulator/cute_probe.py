"""A kernel around `fa4_cute.exp2.exp2_pair`, so that its accuracy is that of the instructions it compiles to."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa4_cute.exp2 import exp2_pair

THREADS = 256


class Exp2Probe:
    """y = 2^x for a float32 vector of a multiple of 512 elements, by one block."""

    def fake_arguments(self):
        vector = [make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=16) for _ in range(2)]
        return [*vector, make_fake_stream()]

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, y).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        steps = cute.size(x) // (2 * THREADS)
        for i in cutlass.range(steps, unroll=1):
            at = (Int32(i) * THREADS + thread) * 2
            y[at], y[at + 1] = exp2_pair(x[at], x[at + 1])
