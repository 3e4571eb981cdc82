"""The constants of the model that stands in for a B200: rates a clock of one SM, and latencies in clocks.

Published rates carry their source; everything else is assumed, the same for every kernel that is compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MMA_FLOP = 8192
"""Dense bf16 FLOP a clock and SM: 2.25 PFLOP/s (NVIDIA's B200 data sheet) / (148 SMs x 1.85 GHz)."""
RATES = {"MUFU": 4, "FMA": 32, "ALU": 16}
"""Lanes a clock of one of an SM's four parts. MUFU 16 and FMA 128 a clock and SM, ALU 64: CUDA C++ Programming Guide,
arithmetic throughput, compute capability 10.0. A packed f32x2 instruction is two FMAs a lane."""
SCHEDULERS = 4
"""Of an SM, each with its own pipes; warp w is on scheduler w % 4."""
WARPS_A_SCHEDULER = 2
"""Softmax warps that share one of the four schedulers: one of each Q tile."""
SHARED_BYTES = 128
"""Bytes a clock and SM, of MMA operands, TMA writes and loads and stores alike: 32 banks of 4 bytes."""
TMEM_BYTES = 512
"""Bytes a clock and SM, each way: 128 lanes of 4 bytes, as `tcgen05.ld` 32x32b moves a column (assumed)."""
LATENCY = {"MUFU": 20, "FMA": 4, "ALU": 5, "TMEM": 30, "shared": 25, "uniform": 10, "other": 5, "tensor": 10}
"""Clocks until a result can be read (assumed)."""
HANDOVER = 60
"""Clocks from the completion of a barrier's phase to the instruction behind the wait (assumed)."""
VOTE = 60
"""Clocks in which a correction warp reads a tile's factors, votes and arrives (assumed; the SASS model's only)."""
REMOTE = 150
"""Further clocks of an arrival on a barrier of another CTA of the cluster (assumed)."""
BRANCH = 5
"""Clocks from a branch that is taken to the next instruction (assumed)."""
L2_LATENCY = 700
"""Clocks of a load from the L2 cache, by TMA or not (assumed)."""
L2_BYTES = 64
"""Bytes a clock and SM between the L2 cache and shared memory (assumed)."""


class Cost(NamedTuple):
    """Of one instruction of one warp. pipe: its unit, "" if it takes no issue slot. busy: clocks that it keeps its
    pipe; latency: clocks behind these until its results can be read. reads, writes: registers, by any names."""

    pipe: str
    busy: int
    latency: int
    reads: tuple[Any, ...]
    writes: tuple[Any, ...]
    op: str
