"""Tables and charts from the rows of a result file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa4_core.bench.cases import SUITES, Case
from fa4_core.bench.contestants import RACE
from fa4_core.bench.harness import Row
from fa4_core.bench.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "triton": "ours, Triton",
    "cute": "ours, CuTe",
    "fa2": "FA2 (SDPA)",
    "cudnn": "cuDNN (SDPA)",
    "fa3": "FA3",
    "fa4": "FA4",
    "flex": "FlexAttention",
}
"""How the tables for readers name a contestant, where its own name would not do."""
METRICS = {
    "forward": ("tflops",),
    "backward": ("tflops",),
    "features": ("tflops",),
    "varlen": ("tflops",),
    "decode": ("gb_per_s", "wall_us"),
    "memory": ("extra_mib", "step_extra_mib"),
    "host": ("wall_us", "wall_grad_us", "wall_step_us"),
}
"""The columns that stand in a suite's tables."""
UNITS = {
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s of keys and values",
    "extra_mib": "MiB beyond the inputs, forward",
    "step_extra_mib": "MiB beyond the inputs, forward and backward",
    "wall_us": "us of host time a call, no grad",
    "wall_grad_us": "us of host time a call, with grad",
    "wall_step_us": "us of host time a call and its backward",
}
OURS = ("cute", "triton")
"""This project's backends, the faster first: ratios are those of the first one with a measurement."""


def pivot(rows: Iterable[Row], suite: str, metric: str) -> pd.DataFrame:
    """One line a case, one column a contestant, in the order of the suite and of the race; cells of `metric`.

    Cases that are not the suite's come last, in the order of the file.
    """
    measured = [row for row in rows if row["suite"] == suite and metric in row]
    places = {case.name: place for place, case in enumerate(SUITES.get(suite, ()))}
    cases = sorted(dict.fromkeys(row["case"] for row in measured), key=lambda name: places.get(name, len(places)))
    present = {row["name"] for row in measured}
    names = [name for name in RACE if name in present] + sorted(present - set(RACE))
    table = pd.DataFrame(math.nan, index=cases, columns=names)
    for row in measured:
        table.loc[row["case"], row["name"]] = row[metric]
    return table


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `ours/peer` for each peer, last: above 1 this project is faster."""
    ours = next((name for name in OURS if name in table), None)
    if ours is None:
        return table
    best = table[[name for name in OURS if name in table]].max(axis=1)
    ratios = {f"/{name}": best / table[name] for name in table if name not in OURS}
    return table.assign(**ratios)


def text(rows: Sequence[Row]) -> str:
    """What was skipped and what failed, then every suite as a plain table, ratios last."""
    parts = []
    for kind in ("skipped", "error"):
        said = Counter((row["name"], row[kind]) for row in rows if kind in row)
        parts += [f"{kind}: {name}, {count} cells: {why}" for (name, why), count in said.items()]
    for suite, metrics in METRICS.items():
        for metric in metrics:
            table = pivot(rows, suite, metric)
            if table.empty:
                continue
            shown = with_ratios(table) if metric in ("tflops", "gb_per_s") else table
            formats = {name: ("{:.2f}" if name.startswith("/") else "{:.4g}").format for name in shown}
            parts.append(f"\n{suite}, {UNITS[metric]}\n{shown.to_string(formatters=formats, na_rep='-')}")
    windows = window_shares(rows)
    if not windows.empty:
        shares = windows.to_string(float_format="{:.3f}".format, na_rep="-")
        parts.append(f"\nforward with a window, share of the time without\n{shares}")
    return "\n".join(parts)


def window_shares(rows: Sequence[Row]) -> pd.DataFrame:
    """Of each windowed forward: its time over that of the same case without the window."""
    times = pivot(rows, "forward", "ms")
    shares = {}
    for name in times.index:
        case = Case.parse(name)
        whole = replace(case, window=None).name
        if case.window is not None and whole in times.index:
            shares[name] = times.loc[name] / times.loc[whole]
    return pd.DataFrame(shares).T.dropna(axis=1, how="all")


def markdown(results: Results) -> str:
    """The README's tables: speed of the forward and the backward, host time, memory, and where it was measured."""
    parts = []
    for suite in ("forward", "backward", "features", "varlen", "decode"):
        metric = METRICS[suite][0]
        table = pivot(results.rows, suite, metric)
        if not table.empty:
            parts.append(f"**{suite.capitalize()}, {UNITS[metric]}** (more is better)\n\n{_markdown_table(table)}")
    for suite, title in (("host", "Host time"), ("memory", "Memory")):
        tables = []
        for metric in METRICS[suite]:
            table = pivot(results.rows, suite, metric)
            tables.append(table.rename(index={case: f"{UNITS[metric]}: {case}" for case in table.index}))
        joined = pd.concat(tables)
        if not joined.empty:
            parts.append(f"**{title}** (less is better)\n\n{_markdown_table(joined)}")
    parts.append(_where(results.environment, results.runs))
    return "\n\n".join(parts)


def _markdown_table(table: pd.DataFrame) -> str:
    lines = [["", *(TITLES.get(name, name) for name in table)], ["---", *("---:" for _ in table)]]
    for case, values in zip(table.index, table.to_numpy()):
        lines.append([case, *("-" if math.isnan(value) else f"{value:.0f}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(environment: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    versions = {
        "torch": environment.get("torch"),
        "cuDNN": environment.get("cudnn"),
        "Triton": environment.get("triton"),
    }
    versions |= {TITLES.get(name, name): version for name, version in environment.get("peers", {}).items()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    dates = sorted({run["date"][:10] for run in runs})
    commits = sorted({run["commit"][:9] for run in runs if run.get("commit")})
    at = f", commit {' and '.join(commits)}" if commits else ""
    return f"Measured on one {environment['device']} with {listed} ({' and '.join(dates)}{at})."


def write_between(path: Path, name: str, content: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->` in a text file.

    Raises:
        ValueError: the file lacks the markers.
    """
    document = path.read_text()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"{path}: accepted is a file with one {start} and one {end}")
    before, rest = document.split(start)
    path.write_text(f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}")


def chart(results: Results, path: Path) -> None:
    """Writes a picture of the forward and backward rates, one panel for each suite, head dimension, group and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}
    for suite in ("forward", "backward"):
        table = pivot(results.rows, suite, "tflops")
        parsed = {name: Case.parse(name) for name in table.index}
        panel_of = {name: _panel(suite, case) for name, case in parsed.items() if case.window is None}
        for panel in dict.fromkeys(panel_of.values()):
            names = [name for name in panel_of if panel_of[name] == panel]
            panels[panel] = table.loc[names].rename(index={name: parsed[name].seqlen_q for name in names})
    if not panels:
        raise ValueError("chart: the results hold no forward or backward rates to draw")
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False)
    for axis, (title, table) in zip(axes.flat, panels.items()):
        _bars(axis, title, table)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles = {label: bar for axis in axes.flat for bar, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{results.environment['device']}, {UNITS['tflops']} (more is better)")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _panel(suite: str, case: Case) -> str:
    heads = "" if case.heads_q == case.heads_kv else f", {case.heads_q}/{case.heads_kv} heads"
    return f"{suite}, head_dim {case.head_dim}{heads}, {'causal' if case.causal else 'full'}"


def _bars(axis: Axes, title: str, table: pd.DataFrame) -> None:
    width = 0.8 / len(table.columns)
    for number, name in enumerate(table.columns):
        # A contestant keeps its colour in every panel, whoever else ran there.
        color = f"C{RACE.index(name)}" if name in RACE else "gray"
        positions = [place - 0.4 + (number + 0.5) * width for place in range(len(table))]
        axis.bar(positions, table[name], width, label=TITLES.get(name, name), color=color)
    axis.set_xticks(range(len(table)), [f"{seqlen // 1024}k" if seqlen >= 1024 else seqlen for seqlen in table.index])
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("sequence length", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
