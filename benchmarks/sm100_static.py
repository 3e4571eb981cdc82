"""The SM100 forward beside the published flash-attn-4's, without a Blackwell GPU: `python -m benchmarks.sm100_static`.

Both kernels are compiled for the same problems here and now. From their SASS: instructions by pipe of the inner loops,
cycles of each unit a key tile, and the length of the chain S -> P -> P V -> O in an in-order issue model. From the
emulator, on the same inputs: instructions executed, waits, tensor-memory and shared-memory bytes by role.

Needs nvidia-cutlass-dsl, flash-attn-4 (for its side) and nvdisasm (Triton's package brings it). The numbers are a
model's, not a measurement; the constants below say where they come from.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from fa4_cute.sm100_config import Exp2Share, Sm100Config

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "sm100_static.json"

PUBLISHED_SHARE = Exp2Share(period=16, emulated=4, first=1, last=3)
"""What flash-attn-4 4.0.0b36 emulates of the exponentials with one CTA; it hands over P after 96 columns, too."""
WARPS_A_SCHEDULER = 2
"""Softmax warps that share one of the four schedulers: one of each Q tile."""
RATES = {"MUFU": 4, "FMA": 32, "ALU": 16}
"""Lanes a clock of one of an SM's four parts. MUFU 16 and FMA 128 a clock and SM, ALU 64: CUDA C++ Programming Guide,
arithmetic throughput, compute capability 10.0. A packed f32x2 instruction is two FMAs a lane."""
MMA_FLOP = 8192
"""Dense bf16 FLOP a clock and SM: 2.25 PFLOP/s (NVIDIA's B200 data sheet) / (148 SMs x 1.85 GHz)."""
SHARED_BYTES = 128
"""Bytes a clock and SM, of MMA operands, TMA writes and loads and stores alike: 32 banks of 4 bytes."""
TMEM_BYTES = 512
"""Bytes a clock and SM, each way: 128 lanes of 4 bytes, as `tcgen05.ld` 32x32b moves a column (assumed)."""
LATENCY = {"MUFU": 20, "FMA": 4, "ALU": 5, "TMEM": 30, "shared": 25, "uniform": 10, "other": 5, "tensor": 10}
"""Clocks until a result can be read: assumed, the same for both kernels."""
HANDOVER = 60
"""Clocks from an arrival or a commit to the instruction behind the wait, and to an MMA's start (assumed)."""

VOTE = 60
"""Clocks in which a correction warp reads a tile's factors, votes and arrives (assumed)."""

FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2", "FFMA2", "FMUL2", "FADD2")
TENSOR = ("UTCHMMA", "UTCBAR", "UTMALDG", "UTMASTG")
SHARED = ("LDS", "STS", "SYNCS", "BAR", "ATOMS")
TMEM = ("LDTM", "STTM")
CONTROL = ("BRA", "NOP", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "FENCE", "DEPBAR", "NANOSLEEP", "CALL", "RET", "YIELD")


class Instruction(NamedTuple):
    """One line of SASS without its guard. guard: the predicate that it is under, or ""."""

    text: str
    op: str
    guard: str

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
        if target and labels.get(target[1], at + 1) <= at:
            loop = (labels[target[1]], at)
            if not any(i.name == "NANOSLEEP" for i in instructions[loop[0] : loop[1] + 1]):
                loops.append(loop)
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


def published(head_dim: int, causal: bool) -> Compiled:
    """The published flash-attn-4's kernel of the same problem: one CTA, two Q tiles, its own settings."""
    folder = Path(tempfile.gettempdir()) / "sm100-static" / f"{head_dim}-{causal}"
    if not list(folder.glob("*.cubin")):
        script = (
            f"import os; os.makedirs({str(folder)!r}, exist_ok=True); os.environ.update(CUTE_DSL_ARCH='sm_100a',"
            f"FLASH_ATTENTION_ARCH='sm_100a',CUTE_DSL_KEEP='ptx,ir,cubin',CUTE_DSL_DUMP_DIR={str(folder)!r})\n"
            f"from tests.emulator.upstream import forward_sm100; forward_sm100({head_dim}, causal={causal})"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True, capture_output=True)
    ptx, ir, cubin = (next(folder.glob(f"*.{ending}")) for ending in ("ptx", "mlir", "cubin"))
    return read(ptx.read_text(), ir.read_text(), cubin.read_bytes())


def pipes(body: list[Instruction]) -> dict[str, int]:
    return dict(collections.Counter(i.pipe for i in body))


def _registers(text: str) -> list[str]:
    return re.findall(r"\bU?R\d+\b|\bU?P\d\b", text)


def issue_times(body: list[Instruction]) -> list[int]:
    """When one warp issues each instruction of a straight line, in order, one a clock, each pipe busy for 32 lanes."""
    ready: dict[str, int] = {}
    free: dict[str, int] = collections.defaultdict(int)
    times, clock = [], 0
    for i in body:
        operands = i.text.split(None, 1)[1] if " " in i.text else ""
        first, _, rest = operands.partition(",")
        used = _registers(rest) + ([i.guard.strip("!")] if i.guard else []) + re.findall(r"\[([^]]*)\]", first)
        start = max([clock, free[i.pipe], *(ready.get(r, 0) for r in used)])
        width = int(wide[1]) if (wide := re.search(r"\.x(\d+)", i.op)) else 1
        busy = (
            32 * i.lanes // RATES[i.pipe] if i.pipe in RATES else width * 128 // (TMEM_BYTES // 4) if width > 1 else 1
        )
        times.append(start)
        clock, free[i.pipe] = start + 1, start + busy
        result = re.match(r"U?R(\d+)", first.strip())
        done = start + busy - 1 + LATENCY[i.pipe]
        for register in _registers(first):
            ready[register] = done
        if result and i.name == "LDTM":
            for n in range(width):
                ready[f"R{int(result[1]) + n}"] = done
        elif result and ("64" in i.op or i.lanes == 2):
            ready[f"R{int(result[1]) + 1}"] = done
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


def cycles(softmax: list[Instruction], correction: list[Instruction], mma: list[Instruction], head_dim: int):
    """Clocks of each unit for one key tile of both Q tiles of a CTA, with no row rescaled."""
    load = collections.Counter()
    for i in softmax:
        load[i.pipe] += i.lanes
    found = {pipe: WARPS_A_SCHEDULER * load[pipe] * 32 / rate for pipe, rate in RATES.items()}
    skipped = [i for i in correction if i.name not in ("LDTM", "STTM", "FMUL2")]
    found["issue"] = WARPS_A_SCHEDULER * len(softmax) + len(skipped) + len(mma) / 4
    found["MMA"] = 2 * 2 * (2 * 128 * 128 * head_dim) / MMA_FLOP
    found["TMEM"] = 2 * sum(_tmem_bytes(i) for i in softmax) * 4 / TMEM_BYTES
    operands = head_dim // 16 * (2 * 128 * 16 * 2) + 8 * (16 * head_dim * 2)
    stores = sum(128 * 4 for i in softmax if i.name == "STS") + sum(128 * 4 for i in correction if i.name == "LDS") / 2
    found["shared"] = (2 * operands + 2 * 128 * head_dim * 2 + 2 * stores) / SHARED_BYTES
    return found


def _tmem_bytes(i: Instruction) -> int:
    """Bytes that a warp's instruction moves to or from tensor memory."""
    width = re.search(r"\.x(\d+)", i.op)
    return 32 * 4 * int(width[1]) if i.pipe == "TMEM" and width else 0


def static_rows(name: str, kernel: Compiled, head_dim: int, part: float = 0.75) -> dict[str, Any]:
    """A kernel's inner loops. part: of P, what is handed over first."""
    softmax, correction = kernel.innermost("MUFU", 64), kernel.innermost("FMUL2", head_dim)
    mma = kernel.innermost("UTCHMMA", 4 * 4)
    return {
        "kernel": name,
        "softmax": len(softmax),
        "softmax pipes": pipes(softmax),
        "correction": len(correction),
        "correction pipes": pipes(correction),
        "MMA loop": len(mma),
        "MMA pipes": pipes(mma),
        "TMEM bytes of a softmax warp": sum(_tmem_bytes(i) for i in softmax),
        "shared bytes of a softmax warp": sum(128 for i in softmax if i.name in ("STS", "LDS")),
        "cycles": cycles(softmax, correction, mma, head_dim),
        "chain": chain(softmax, head_dim, part),
    }


def executed(head_dim: int, causal: bool, seqlen: int) -> dict[str, dict[str, dict[str, int]]]:
    """Both kernels on the same inputs in the emulator: PTX instructions, waits and bytes by role."""
    from tests.emulator import launcher, machine
    from tests.emulator import published as package

    roles = {"softmax": range(8), "correction": range(8, 12), "MMA": range(12, 13), "store": range(13, 14),
             "load": range(14, 15)}  # fmt: skip
    counted: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)

    def count(frame, instruction, length: int) -> None:
        for warp in range(frame.lo, frame.hi):
            tally = counted[warp]
            tally["instructions"] += length
            op = instruction.op
            if length > 1:
                continue
            if op.startswith(("mbarrier.try_wait", "bar.sync", "barrier")):
                tally["waits"] += 1
            elif op.startswith(("tcgen05.ld", "tcgen05.st")):
                tally["TMEM bytes"] += 128 * int(re.search(r"\.x(\d+)", op)[1])  # type: ignore[index]
            elif op.startswith(("ld.shared", "st.shared")):
                parts = int(vector[1]) if (vector := re.search(r"\.v(\d)", op)) else 1
                tally["shared bytes"] += 32 * parts * int(re.search(r"(\d+)$", op)[1]) // 8  # type: ignore[index]

    class Counting(machine.Machine):
        """A machine that counts what each warp completes."""

        def _branch(self, group, node):
            count(group.frame, node.instruction, 1)
            return super()._branch(group, node)

        def _handle(self, group, node, mask):
            frame, before = group.frame, group.pc
            going = super()._handle(group, node, mask)
            if group.pc != before:
                count(frame, node.instruction, 1)
            return going

    def run(call) -> dict[str, dict[str, int]]:
        counted.clear()
        call()
        return {role: dict(sum((counted[w] for w in warps), collections.Counter())) for role, warps in roles.items()}

    problem = package.Problem(1, head_dim, seqlen, seqlen, causal=causal)
    original, launcher.Machine = launcher.Machine, Counting  # type: ignore[misc]
    try:
        from fa4_core.problem import Inputs, make_problem
        from tests.emulator.cute_backend import forward, kernel, request_of

        inputs = Inputs(problem.q, problem.k, problem.v)
        checked = make_problem(inputs, window_right=0 if causal else -1)
        _count_runs(kernel(request_of(checked, inputs, "sm_100a"))[0], count)
        mine = run(lambda: forward(checked, inputs, "sm_100a", programs=1, races=False))
        ptx, _ = package.artifacts("forward_sm100", head_dim=head_dim, group=1, causal=causal, pack=False, pair=False)
        program = launcher.load_program(ptx)
        _count_runs(program, count)
        theirs = run(lambda: package.forward(problem, sm100=True, program=program, check=False, races=False))
    finally:
        launcher.Machine = original  # type: ignore[misc]
    return {"ours": mine, "flash-attn-4": theirs}


def _count_runs(program, count) -> None:
    """Makes a program's straight-line runs report themselves."""

    class Run:
        def __init__(self, run, length: int, instruction) -> None:
            self.run, self.length, self.instruction = run, length, instruction

        def full(self, frame, mask):
            count(frame, self.instruction, self.length)
            return self.run.full(frame, mask)

        def masked(self, frame, mask):
            count(frame, self.instruction, self.length)
            return self.run.masked(frame, mask)

        def __getattr__(self, name: str):
            return getattr(self.run, name)

    for node in program.nodes:
        if node is not None and node.run is not None and not isinstance(node.run, Run):
            node.run = Run(node.run, node.next_pc - node.pc, node.instruction)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go, as JSON.")] = RESULT,
    seqlen: Annotated[int, typer.Option(help="Length of the executed problems; 0: do not execute.")] = 512,
    sweep: Annotated[
        bool, typer.Option(help="Also our kernel over shares of emulated exponentials and parts of P.")
    ] = True,
) -> None:
    """Prints the tables of docs/performance.md and writes them as JSON."""
    result: dict[str, Any] = {"loops": {}, "executed": {}, "sweep": {}}
    for head_dim in (64, 128):
        for causal in (False, True):
            name = f"D{head_dim} {'causal' if causal else 'full'}"
            alike = Sm100Config(head_dim, head_dim, PUBLISHED_SHARE)
            result["loops"][name] = [
                static_rows("ours", ours(head_dim, causal), head_dim),
                static_rows("flash-attn-4", published(head_dim, causal), head_dim),
                static_rows("ours, its share", ours(head_dim, causal, alike), head_dim),
            ]
            if seqlen:
                result["executed"][name] = executed(head_dim, causal, seqlen)
    if sweep:
        for head_dim in (64, 128):
            for share in (Exp2Share(), PUBLISHED_SHARE, Exp2Share(16, last=3), Exp2Share(16), Exp2Share(10)):
                for p_first in (64, 96):
                    config = Sm100Config(head_dim, head_dim, share, p_first=p_first)
                    row = static_rows("ours", ours(head_dim, False, config), head_dim, p_first / 128)
                    where = f"{share.fraction(128):.1%} in fragments {share.first} to {share.last - 1}"
                    result["sweep"][f"D{head_dim}, {where}, {p_first}"] = row
    out.write_text(json.dumps(result, indent=1))
    show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `main` wrote."""
    rows = []
    instructions = {"softmax": "softmax instructions", "correction": "correction, rescaling", "MMA loop": "MMA loop"}
    bytes_moved = {"TMEM bytes of a softmax warp": "TMEM bytes", "shared bytes of a softmax warp": "shared bytes"}
    for name, (mine, theirs, alike) in result["loops"].items():
        for what, words in {**instructions, **bytes_moved}.items():
            a, b, c = mine[what], theirs[what], alike[what]
            rows.append([name, words, a, c, b, f"{a / b:.2f}", f"{c / b:.2f}"])
        for what in mine["chain"]:
            a, b, c = (kernel["chain"][what] for kernel in (mine, theirs, alike))
            rows.append([name, what, round(a), round(c), round(b), f"{a / b:.2f}", f"{c / b:.2f}"])
    header = ["", "a key tile", "ours", "ours, its share", "flash-attn-4", "ratio", "ratio at its share"]
    print(table(header, rows), "\n")
    units = ("MMA", "MUFU", "FMA", "ALU", "issue", "TMEM", "shared")
    rows = []
    for name, pair in result["loops"].items():
        for row in pair:
            clocks = row["cycles"]
            rows.append([name, row["kernel"], *(round(clocks[u]) for u in units), round(max(clocks.values()))])
    print(table(["", "clocks a key tile of both Q tiles", *units, "bound"], rows), "\n")
    rows = []
    for name, row in result["sweep"].items():
        clocks = row["cycles"]
        rows.append(
            [name, *(round(clocks[u]) for u in units), round(max(clocks.values())), round(row["chain"]["S to O"])]
        )
    print(table(["emulated share, first columns of P", *units, "bound", "S to O"], rows), "\n")
    rows = []
    for name, pair in result["executed"].items():
        for role in pair["ours"]:
            for what in ("instructions", "waits", "TMEM bytes", "shared bytes"):
                a, b = (pair[kernel][role].get(what, 0) for kernel in ("ours", "flash-attn-4"))
                if a or b:
                    rows.append([name, role, what, a, b, f"{a / b:.2f}" if b else "-"])
    print(table(["executed", "role", "", "ours", "flash-attn-4", "ratio"], rows))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
