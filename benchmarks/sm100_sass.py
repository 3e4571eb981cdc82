"""The SASS of the SM100 forward and of the published flash-attn-4's: inner loops, units, and an in-order issue model.

Needs nvidia-cutlass-dsl, flash-attn-4 (for its side) and nvdisasm (Triton's package brings it).
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.sm100_rates import (
    HANDOVER,
    LATENCY,
    MMA_FLOP,
    RATES,
    SHARED_BYTES,
    TMEM_BYTES,
    VOTE,
    WARPS_A_SCHEDULER,
    Cost,
)

ROOT = Path(__file__).parents[1]

FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2", "FFMA2", "FMUL2", "FADD2")
TENSOR = ("UTCHMMA", "UTCBAR", "UTMALDG", "UTMASTG")
SHARED = ("LDS", "STS", "SYNCS", "BAR", "ATOMS")
TMEM = ("LDTM", "STTM")
CONTROL = ("BRA", "NOP", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "FENCE", "DEPBAR", "NANOSLEEP", "CALL", "RET", "YIELD")


class Instruction(NamedTuple):
    """One line of SASS without its guard. guard: the predicate that it is under, or "". target: of a branch, the number
    of instructions from here to there."""

    text: str
    op: str
    guard: str
    target: int = 0

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def pipe(self) -> str:
        """The unit that executes it."""
        name = self.name
        for pipe, names in (("FMA", FMA), ("tensor", TENSOR), ("shared", SHARED), ("TMEM", TMEM), ("other", CONTROL)):
            if name in names:
                return pipe
        if name == "MUFU":
            return "MUFU"
        return "uniform" if name[0] == "U" or name in ("R2UR", "ELECT", "VOTEU") else "ALU"

    @property
    def lanes(self) -> int:
        """Operations a lane: packed f32x2 instructions do two."""
        return 2 if self.name in ("FFMA2", "FMUL2", "FADD2") else 1


@dataclass
class Compiled:
    """One kernel's SASS and artifacts."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]]
    ptx: str
    ir: str
    cubin: bytes

    def body(self, loop: tuple[int, int]) -> list[Instruction]:
        return self.instructions[loop[0] : loop[1] + 1]

    def innermost(self, needed: str, count: int) -> list[Instruction]:
        """The shortest loop with so many of an instruction, without a mask (whose bits R2P turns into predicates)."""
        bodies = [self.body(loop) for loop in self.loops]
        found = [body for body in bodies if sum(i.name == needed for i in body) >= count]
        return min(found, key=lambda body: (any(i.name == "R2P" for i in body), len(body)))


def nvdisasm() -> str:
    """Triton ships one."""
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / "nvdisasm")


def read(ptx: str, ir: str, cubin: bytes) -> Compiled:
    """Disassembles a cubin: instructions in order, and loops as (first, last) by their backward branches."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)(.*?);", line):
            instructions.append(Instruction((code[2] + code[3]).strip(), code[2], code[1] or ""))
    loops = []
    for at, instruction in enumerate(instructions):
        target = re.search(r"`\((\.L_\w+)\)", instruction.text) if instruction.name == "BRA" else None
        if not target or target[1] not in labels:
            continue
        there = labels[target[1]]
        instructions[at] = instruction._replace(target=there - at)
        if there <= at and not any(i.name == "NANOSLEEP" for i in instructions[there : at + 1]):
            loops.append((there, at))
    return Compiled(instructions, loops, ptx, ir, cubin)


def ours(head_dim: int, causal: bool, config: Any = None) -> Compiled:
    """The project's kernel, bfloat16, dense."""
    import torch

    from fa4_core.problem import Inputs, make_problem
    from tests.emulator.cute_backend import request_of
    from tests.emulator.cute_compile import compile_kernel

    q = torch.empty(1, 256, 1, head_dim, dtype=torch.bfloat16)
    problem = make_problem(Inputs(q, q, q), window_right=0 if causal else -1)
    return read(*compile_kernel(request_of(problem, Inputs(q, q, q), "sm_100a", config)))


def published(head_dim: int, causal: bool, pair: bool = False) -> Compiled:
    """The published flash-attn-4's kernel of the same problem: two Q tiles a CTA, its own settings. pair: two CTAs
    share their MMAs."""
    folder = Path(tempfile.gettempdir()) / "sm100-static" / f"{head_dim}-{causal}{'-pair' * pair}"
    if not list(folder.glob("*.cubin")):
        script = (
            f"import os; os.makedirs({str(folder)!r}, exist_ok=True); os.environ.update(CUTE_DSL_ARCH='sm_100a',"
            f"FLASH_ATTENTION_ARCH='sm_100a',CUTE_DSL_KEEP='ptx,ir,cubin',CUTE_DSL_DUMP_DIR={str(folder)!r})\n"
            "from tests.emulator.upstream import forward_sm100; "
            f"forward_sm100({head_dim}, causal={causal}, pair={pair})"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True, capture_output=True)
    ptx, ir, cubin = (next(folder.glob(f"*.{ending}")) for ending in ("ptx", "mlir", "cubin"))
    return read(ptx.read_text(), ir.read_text(), cubin.read_bytes())


def pipes(body: list[Instruction]) -> dict[str, int]:
    return dict(collections.Counter(i.pipe for i in body))


def _registers(text: str, width: int = 1) -> list[str]:
    """The registers that an operand names; of the first vector register, also the `width - 1` that follow it."""
    found = re.findall(r"\bU?R\d+\b|\bU?P\d\b", text)
    wide = [f"R{int(r[1:]) + n}" for r in found if r[0] == "R" for n in range(1, width)]
    return found + wide


def cost(i: Instruction) -> Cost:
    """What an instruction of one warp keeps busy, reads and writes. Registers are names."""
    operands = i.text.split(None, 1)[1] if " " in i.text else ""
    first, _, rest = operands.partition(",")
    columns = int(wide[1]) if (wide := re.search(r"\.x(\d+)", i.op)) else 1
    reads = _registers(rest, columns if i.name == "STTM" else 1) + re.findall(r"\[(U?R\d+)", first)
    reads += [f"R{int(n) + 1}" for n in re.findall(r"\bR(\d+)(?:\.reuse)?\.(?:F32x2|64)", rest)]
    if i.guard:
        reads.append(i.guard.strip("!"))
    writes = _registers(first, columns if i.name == "LDTM" else 2 if "64" in i.op else i.lanes)
    if i.name in ("STTM", "STS", "STG"):
        reads, writes = reads + writes, []
    busy = 1
    if i.pipe in RATES:
        busy = 32 * i.lanes // RATES[i.pipe]
    elif i.pipe == "TMEM":
        busy = columns * 128 // (TMEM_BYTES // 4)
    return Cost(i.pipe, busy, LATENCY[i.pipe], tuple(reads), tuple(writes), i.op)


def issue_times(body: list[Instruction]) -> list[int]:
    """When one warp issues each instruction of a straight line, in order, one a clock, each pipe busy for 32 lanes."""
    ready: dict[Any, int] = {}
    free: dict[str, int] = collections.defaultdict(int)
    times, clock = [], 0
    for each in map(cost, body):
        start = max([clock, free[each.pipe], *(ready.get(r, 0) for r in each.reads)])
        times.append(start)
        clock, free[each.pipe] = start + 1, start + each.busy
        for register in each.writes:
            ready[register] = start + each.busy - 1 + each.latency
    return times


def chain(body: list[Instruction], head_dim: int, part: float) -> dict[str, float]:
    """Clocks from S ready to O ready of one tile, alone on its SM: softmax to the first and to the last part of P, and
    the MMAs of P V, of which `part` runs on the first."""
    start = next(n for n, i in enumerate(body) if i.op.startswith("SYNCS.PHASECHK"))
    line = body[start:]
    times = issue_times(line)
    arrivals = [time for time, i in zip(times, line) if i.op.startswith("SYNCS.ARRIVE")]
    named = [time for time, i in zip(times, line) if i.op.startswith("BAR.ARV")]
    factor, first, last = (named or arrivals)[0], *arrivals[-2:]
    values = 2 * 128 * 128 * head_dim / MMA_FLOP
    begin = max(first, factor + HANDOVER + VOTE) + HANDOVER
    done = max(begin + part * values, last + HANDOVER) + (1 - part) * values + HANDOVER
    return {"S to factors": factor, "S to first P": first, "S to last P": last, "S to O": done}


def cycles(softmax, correction, mma, head_dim: int, ctas: int = 1) -> dict[str, float]:
    """Clocks of each unit for one key tile of both Q tiles of a CTA, with no row rescaled. The arguments are SASS.
    ctas: that share their MMAs; each then holds half of K and V."""
    load = collections.Counter()
    for i in softmax:
        load[i.pipe] += i.lanes
    found = {pipe: WARPS_A_SCHEDULER * load[pipe] * 32 / rate for pipe, rate in RATES.items()}
    skipped = [i for i in correction if i.name not in ("LDTM", "STTM", "FMUL2")]
    found["issue"] = WARPS_A_SCHEDULER * len(softmax) + len(skipped) + len(mma) / 4
    found["MMA"] = 2 * 2 * (2 * 128 * 128 * head_dim) / MMA_FLOP
    found["TMEM"] = 2 * sum(tmem_bytes(i) for i in softmax) * 4 / TMEM_BYTES
    operands = head_dim // 16 * (128 + 128 // ctas) * 16 * 2 + 8 * (16 * head_dim * 2) // ctas
    stores = sum(128 * 4 for i in softmax if i.name == "STS") + sum(128 * 4 for i in correction if i.name == "LDS") / 2
    found["shared"] = (2 * operands + 2 * 128 * head_dim * 2 // ctas + 2 * stores) / SHARED_BYTES
    return found


def tmem_bytes(i: Instruction) -> int:
    """Bytes that a warp's instruction moves to or from tensor memory."""
    width = re.search(r"\.x(\d+)", i.op)
    return 32 * 4 * int(width[1]) if i.pipe == "TMEM" and width else 0
