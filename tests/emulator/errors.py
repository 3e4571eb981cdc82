"""What the emulator raises. Every message names the PTX line, so that a failure can be read beside the PTX text."""


class EmulatorError(Exception):
    """A kernel did something that PTX does not define, or that would fault or hang on a GPU."""


class PtxSyntaxError(EmulatorError):
    """The text is not PTX that the parser knows (the emulator reads what Triton and the CuTe DSL emit)."""


class Unsupported(EmulatorError):
    """An instruction, or a modifier of one, that the emulator does not model. Never a silent no-op."""


class OutOfBounds(EmulatorError):
    """An access outside every allocation, or a misaligned one."""


class BarrierMisuse(EmulatorError):
    """An mbarrier or named barrier used against its contract (uninitialised, over-arrived, live re-initialisation)."""


class TensorMemoryError(EmulatorError):
    """TMEM touched outside its allocation, allocated twice, leaked, or freed by someone who does not own it."""


class Deadlock(EmulatorError):
    """No warp can run and no asynchronous operation is in flight. The message lists who waits where."""


class Livelock(EmulatorError):
    """The step budget ran out: some warps spin on a condition that nobody makes true."""


class RaceError(EmulatorError):
    """The race check found accesses that no chain of synchronisation orders."""
