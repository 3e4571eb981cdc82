"""A functional emulator of the PTX that this project's kernels compile to. See docs/emulator.md.

It exists to test kernels meant for NVIDIA GPUs on machines without one. It lives with the tests, is not installed, and
reads documented artifacts only: the PTX (and for the CuTe DSL the IR) that the compilers keep.
"""

from .errors import (
    BarrierMisuse,
    Deadlock,
    EmulatorError,
    Livelock,
    OutOfBounds,
    PtxSyntaxError,
    RaceError,
    TensorMemoryError,  # fmt: skip
    Unsupported,
)
from .launcher import Launch, launch, launch_triton
from .machine import Result, Schedule
from .program import Program
from .ptx import parse
from .tensor_map import TensorMap

__all__ = [
    "BarrierMisuse",
    "Deadlock",
    "EmulatorError",
    "Launch",
    "Livelock",
    "OutOfBounds",
    "Program",
    "PtxSyntaxError",
    "RaceError",
    "Result",
    "Schedule",
    "TensorMap",
    "TensorMemoryError",
    "Unsupported",
    "launch",
    "launch_triton",
    "parse",
]
