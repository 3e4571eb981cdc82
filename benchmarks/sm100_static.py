"""The SM100 forward beside the published flash-attn-4's, without a Blackwell GPU: `python -m benchmarks.sm100_static`.

Both kernels are compiled for the same problems here and now. From their SASS (`sm100_sass.py`): instructions by pipe of
the inner loops, cycles of each unit a key tile, and the length of the chain S -> P -> P V -> O in an in-order issue
model of one warp alone. From the emulator, on the same inputs: instructions executed, waits, tensor-memory and
shared-memory bytes by role, and the same chain in the graph of all events (`sm100_events.py`).

Needs nvidia-cutlass-dsl, flash-attn-4 (for its side) and nvdisasm (Triton's package brings it). The numbers are a
model's, not a measurement; `sm100_rates.py` says where its constants come from.
"""

from __future__ import annotations

import collections
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import sm100_costs, sm100_events, sm100_sass
from benchmarks.sm100_events import Timing, report, timed
from benchmarks.sm100_sass import Compiled, chain, cycles, ours, pipes, published, tmem_bytes
from fa4_core.problem import Inputs, make_problem
from fa4_cute.sm100_config import Exp2Share, Sm100Config
from tests.emulator import published as package
from tests.emulator.cute_backend import forward
from tests.emulator.events import Graph, recording
from tests.emulator.patching import replaced

RESULT = Path(__file__).parent / "results" / "sm100_static.json"


class Case(NamedTuple):
    """A problem, and how both kernels lay it out. ctas: that share their MMAs; each has two Q tiles."""

    head_dim: int
    causal: bool
    ctas: int = 1

    @property
    def name(self) -> str:
        return f"D{self.head_dim} {'causal' if self.causal else 'full'}{', pairs' if self.ctas == 2 else ''}"

    @property
    def published_share(self) -> Exp2Share:
        """What flash-attn-4 4.0.0b36 emulates of the exponentials; it hands over P after 96 columns, too."""
        return Exp2Share(period=10 if self.ctas == 2 else 16, emulated=4, first=1, last=3)

    def config(self, **changes) -> Sm100Config:
        """Our kernel's."""
        return replace(Sm100Config(self.head_dim, self.head_dim, Exp2Share(16), ctas=self.ctas), **changes)

    def problem(self, seqlen_q: int, seqlen_k: int):
        """The same inputs for flash-attn-4, and checked for our kernel."""
        theirs = package.Problem(1, self.head_dim, seqlen_q, seqlen_k, causal=self.causal)
        inputs = Inputs(theirs.q, theirs.k, theirs.v)
        return theirs, inputs, make_problem(inputs, window_right=0 if self.causal else -1)


CASES = (Case(64, False), Case(64, True), Case(128, False), Case(128, False, 2), Case(128, True))


def inner_loops(kernel: Compiled, case: Case) -> tuple[list, list, list]:
    """SASS of the loops of the softmax, the MMA and the correction warps."""
    found = [("MUFU", 64), ("UTCHMMA", 16), ("FMUL2", case.head_dim)]
    return tuple(kernel.innermost(*each) for each in found)  # type: ignore[return-value]


def static_rows(name: str, kernel: Compiled, case: Case, part: float = 0.75) -> dict[str, Any]:
    """A kernel's inner loops. part: of P, what is handed over first."""
    softmax, mma, correction = inner_loops(kernel, case)
    return {
        "kernel": name,
        "softmax": len(softmax),
        "softmax pipes": pipes(softmax),
        "correction": len(correction),
        "correction pipes": pipes(correction),
        "MMA loop": len(mma),
        "MMA pipes": pipes(mma),
        "TMEM bytes of a softmax warp": sum(tmem_bytes(i) for i in softmax),
        "shared bytes of a softmax warp": sum(128 for i in softmax if i.name in ("STS", "LDS")),
        "cycles": cycles(softmax, correction, mma, case.head_dim, case.ctas),
        "chain": chain(softmax, case.head_dim, part),
    }


ROLES = {"softmax": range(8), "correction": range(8, 12), "MMA": range(12, 13), "store": range(13, 14),
         "load": range(14, 15)}  # fmt: skip
"""Warps of both kernels' roles."""


def executed(graph: Graph) -> dict[str, dict[str, int]]:
    """What the warps of each role did: PTX instructions, waits, bytes. A word that several lanes read counts once."""
    found: dict[str, collections.Counter] = {role: collections.Counter() for role in ROLES}
    for (_, warp), steps in graph.steps.items():
        tally = next((found[role] for role, warps in ROLES.items() if warp in warps), collections.Counter())
        for step in steps:
            node = graph.program.nodes[step.pc]
            assert node is not None
            op = node.instruction.op
            tally["instructions"] += node.next_pc - node.pc
            if step.skipped:
                continue
            if op.startswith(("mbarrier.try_wait", "bar.sync", "barrier")):
                tally["waits"] += 1
            elif op.startswith(("tcgen05.ld", "tcgen05.st")):
                tally["TMEM bytes"] += 128 * int(re.search(r"\.x(\d+)", op)[1])  # type: ignore[index]
            elif op.startswith(("ld.shared", "st.shared")):
                parts = int(vector[1]) if (vector := re.search(r"\.v(\d)", op)) else 1
                tally["shared bytes"] += step.places * parts * int(re.search(r"(\d+)$", op)[1]) // 8  # type: ignore[index]
    return {role: dict(tally) for role, tally in found.items()}


def recorded(case: Case, kernel: Compiled, config: Sm100Config | None, items: int, keys: int) -> tuple[Graph, Timing]:
    """The event graph of a launch on so many items of each CTA, and its times. config: our kernel's, or None."""
    graph = launched(case, config, 256 * case.ctas * items, keys)
    return graph, timed(graph, inner_loops(kernel, case))


def launched(case: Case, config: Sm100Config | None, seqlen_q: int, seqlen_k: int) -> Graph:
    """What happened in a launch of our kernel on one SM (two, for pairs), or without a config of flash-attn-4's."""
    theirs, inputs, checked = case.problem(seqlen_q, seqlen_k)
    with recording() as graphs:
        if config:
            forward(checked, inputs, "sm_100a", config, programs=case.ctas, races=False)
        else:
            package.forward(theirs, sm100=True, pair=case.ctas == 2, check=False, races=False)
    return graphs[0]


def events(case: Case, compiled: dict[str, Compiled], configs: dict[str, Sm100Config]) -> dict[str, dict[str, Any]]:
    """The event graphs of each kernel: of one item of every CTA on 2048 keys, and of four items on 1024 keys, the whole
    launch on one SM (two, for a pair): flash-attn-4's CTAs, which have one item each, one after the other."""
    found: dict[str, dict[str, Any]] = {}
    for name, kernel in compiled.items():
        loops = inner_loops(kernel, case)
        graph, timing = recorded(case, kernel, configs.get(name), 1, 2048)
        found[name] = report(graph, timing)
        lower = report(graph, timed(graph, loops, turns=False))
        found[name] |= {f"{what}, lower warp first": lower[what] for what in ("S to O", "period")}
        _, four = recorded(case, kernel, configs.get(name), 4, 1024)
        found[name]["four items"] = sum(four.ends.values()) / case.ctas
        for what, places in other_constants().items():
            with replaced(places):
                found[name][f"S to O, {what}"] = report(graph, timed(graph, loops))["S to O"]
    return found


def other_constants() -> dict[str, dict[tuple[Any, str], Any]]:
    """Each of the assumed constants halved and doubled: what `replaced` takes."""
    found: dict[str, dict[tuple[Any, str], Any]] = {}
    for factor, word in ((0.5, "half"), (2, "twice")):
        for name, words in (("HANDOVER", "hand-over"), ("L2_LATENCY", "L2 latency"), ("L2_BYTES", "L2 rate")):
            found[f"{word} the {words}"] = {(sm100_events, name): getattr(sm100_events, name) * factor}
        latency = {pipe: clocks * factor for pipe, clocks in sm100_sass.LATENCY.items()}
        found[f"{word} the latencies"] = {(module, "LATENCY"): latency for module in (sm100_costs, sm100_sass)}
    return found


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main(
    out: Annotated[Path, typer.Option(help="Where the numbers go, as JSON.")] = RESULT,
    seqlen: Annotated[int, typer.Option(help="Length of the executed problems; 0: do not execute.")] = 1024,
    sweep: Annotated[
        bool, typer.Option(help="Also our kernel over shares of emulated exponentials and parts of P.")
    ] = True,
) -> None:
    """Prints the tables of docs/blackwell.md and docs/performance.md and writes them as JSON."""
    result: dict[str, Any] = {"loops": {}, "executed": {}, "events": {}, "sweep": {}}
    for case in CASES:
        configs = {"ours": case.config(), "ours, its share": case.config(share=case.published_share)}
        compiled = {name: ours(case.head_dim, case.causal, config) for name, config in configs.items()}
        compiled["flash-attn-4"] = published(case.head_dim, case.causal, case.ctas == 2)
        result["loops"][case.name] = [static_rows(name, kernel, case) for name, kernel in compiled.items()]
        if seqlen:
            result["executed"][case.name] = {
                name: executed(launched(case, configs.get(name), seqlen, seqlen)) for name in compiled
            }
            result["events"][case.name] = events(case, compiled, configs)
    if sweep:
        for case in (Case(64, False), Case(128, False)):
            for share in (Exp2Share(), case.published_share, Exp2Share(16, last=3), Exp2Share(16), Exp2Share(10)):
                for p_first in (64, 96):
                    config = case.config(share=share, p_first=p_first)
                    kernel = ours(case.head_dim, False, config)
                    row = static_rows("ours", kernel, case, p_first / 128)
                    if seqlen:
                        row["events"] = report(*recorded(case, kernel, config, 1, 2048))
                    where = f"{share.fraction(128):.1%} in fragments {share.first} to {share.last - 1}"
                    result["sweep"][f"D{case.head_dim}, {where}, {p_first}"] = row
    out.write_text(json.dumps(result, indent=1))
    show(result)


def show_events(found: dict[str, dict[str, Any]]) -> None:
    """Prints the chains and periods of `events`, how far the constants move them, and what the longest paths are."""
    rows, ranges, paths = [], [], []
    for name, by_kernel in found.items():
        mine, alike, theirs = by_kernel.values()
        others: dict[str, list[float]] = {"ours": [], "ours, its share": []}
        for what, a in mine.items():
            if what in ("path", "tiles"):
                continue
            b, c = theirs[what], alike[what]
            if what.startswith(("S to O, half", "S to O, twice")):
                others["ours"].append(a / b)
                others["ours, its share"].append(c / b)
            else:
                rows.append([name, what, round(a), round(c), round(b), f"{a / b:.2f}", f"{c / b:.2f}"])
        for kernel, ratios in others.items():
            ranges.append([name, kernel, f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
        for kernel, each in by_kernel.items():
            parts = ", ".join(f"{kind} {part:.0%}" for kind, part in each["path"].items() if part >= 0.03)
            paths.append([name, kernel, parts])
    header = ["event graph", "clocks", "ours", "ours, its share", "flash-attn-4", "ratio", "ratio at its share"]
    print(table(header, rows), "\n")
    print(table(["S to O with a constant halved or doubled", "kernel", "lowest ratio", "highest ratio"], ranges), "\n")
    print(table(["event graph", "kernel", "longest path"], paths), "\n")


def show(result: dict[str, Any]) -> None:
    """Prints what `main` wrote."""
    rows = []
    instructions = {"softmax": "softmax instructions", "correction": "correction, rescaling", "MMA loop": "MMA loop"}
    bytes_moved = {"TMEM bytes of a softmax warp": "TMEM bytes", "shared bytes of a softmax warp": "shared bytes"}
    for name, (mine, alike, theirs) in result["loops"].items():
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
    show_events(result["events"])
    rows = []
    for name, row in result["sweep"].items():
        clocks = row["cycles"]
        rows.append(
            [name, *(round(clocks[u]) for u in units), round(max(clocks.values())), round(row["chain"]["S to O"])]
            + [round(row["events"][what]) for what in ("S to O", "period") if "events" in row]
        )
    header = ["emulated share, first columns of P", *units, "bound", "S to O", "in the graph", "period"]
    print(table(header, rows), "\n")
    rows = []
    for name, by_kernel in result["executed"].items():
        for role in by_kernel["ours"]:
            for what in ("instructions", "waits", "TMEM bytes", "shared bytes"):
                a, c, b = (kernel[role].get(what, 0) for kernel in by_kernel.values())
                if a or b:
                    rows.append([name, role, what, a, c, b, *(f"{x / b:.2f}" if b else "-" for x in (a, c))])
    header = ["executed", "role", "", "ours", "ours, its share", "flash-attn-4", "ratio", "ratio at its share"]
    print(table(header, rows))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
