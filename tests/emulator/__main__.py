"""`python -m tests.emulator FILE.ptx`: what a kernel consists of, and what the emulator does not know of it.

Exits 1 if anything is unsupported. `--replay FILE [--seed N]` runs a launch that a failed test saved.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from .errors import EmulatorError
from .launcher import Recording
from .program import Program
from .ptx import BANKS, parse

_BARRIERS = ("mbarrier", "bar", "barrier", "tcgen05.commit", "cp.async.mbarrier", "fence")
_MEMORY = ("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp", "tcgen05.ld", "tcgen05.st", "tcgen05.cp")
_MATRIX = ("mma", "wgmma.mma_async", "tcgen05.mma")


def _family(op: str) -> str:
    for name, prefixes in (("matrix", _MATRIX), ("barrier", _BARRIERS), ("memory", _MEMORY)):
        if any(op == p or op.startswith(p + ".") for p in prefixes):
            return name
    return "other"


def report(path: Path) -> int:
    """Prints one section per kernel of a PTX file; returns the number of unsupported instructions."""
    missing = 0
    for kernel in parse(path.read_text()).values():
        program = Program(kernel)
        code = kernel.instructions
        groups = sum(len(n.run.groups) for n in program.nodes if n is not None and n.run is not None)
        print(f"{kernel.name}")
        print(
            f"  instructions {len(code)}; "
            f"runs vectorised into {groups} calls and {_handled(program)} handled instructions"
        )
        names = {"pred": "predicates"}
        banks = [f"{names.get(b, f'{b}-bit')} {kernel.register_counts[b]}" for b in BANKS if kernel.register_counts[b]]
        print(f"  virtual registers: {', '.join(banks)}")
        limits = sorted({i.operands[0].value for i in code if i.op.startswith("setmaxnreg")})
        print(
            f"  threads {kernel.required_threads or 'any'}, setmaxnreg {limits or 'none'}, "
            f"registers a thread at launch {kernel.launch_registers or 'unknown'}"
        )
        print(
            f"  parameters {len(kernel.params)}, {kernel.param_bytes} bytes; "
            f"static shared {kernel.static_shared} bytes; "
            f"local {kernel.local_bytes} bytes"
        )
        for family in ("barrier", "memory", "matrix"):
            counts = Counter(i.op for i in code if _family(i.op) == family)
            print(f"  {family}: {sum(counts.values())}")
            for op, count in counts.most_common():
                print(f"    {count:5} {op}")
        problems = program.unsupported
        print(f"  unsupported: {len(problems)}")
        for problem in problems:
            print(f"    {problem}")
        missing += len(problems)
    return missing


def _handled(program: Program) -> int:
    return sum(n is not None and n.run is None for n in program.nodes)


def replay(path: Path, seed: int | None) -> int:
    """Runs a saved launch; returns 1 if it fails or races."""
    recording = Recording.load(path)
    seed = recording.seed if seed is None else seed
    print(f"{recording.kernel}: grid {recording.grid}, block {recording.block}, seed {seed}")
    try:
        result = recording.run(seed)
    except EmulatorError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    for title, lines in (("races", result.races), ("notes", result.notes), ("never executed", result.not_executed())):
        print(f"{title}: {len(lines)}")
        for line in lines:
            print(f"  {line}")
    return int(bool(result.races))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("ptx", nargs="?", type=Path, help="PTX file to report on")
    parser.add_argument("--replay", type=Path, help="launch saved by a failed test")
    parser.add_argument("--seed", type=int, help="schedule for --replay instead of the saved one")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return replay(options.replay, options.seed)
    if options.ptx is None:
        parser.error("name a PTX file or a launch to replay")
    try:
        return int(report(options.ptx) > 0)
    except EmulatorError as error:
        print(f"{options.ptx}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
