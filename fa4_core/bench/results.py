"""The result file: `{"environment": {...}, "rows": [...]}`, JSON, written by a run and read by the reports."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fa4_core.bench.contestants import Contestant, version
from fa4_core.bench.harness import Row

CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "clocks_event_reasons.active",
)


def _nvidia_smi(*fields: str) -> list[str] | None:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in output.splitlines()[0].split(",")] if output.strip() else None


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first device's clocks, heat and power; None without nvidia-smi."""
    values = _nvidia_smi(*CLOCKS)
    return None if values is None else dict(zip(CLOCKS, values))


def driver() -> str | None:
    """The NVIDIA driver's version; None without nvidia-smi."""
    values = _nvidia_smi("driver_version")
    return None if values is None else values[0]


def commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; else GIT_COMMIT of the environment, or None."""
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT")
    return described.stdout.strip()


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, contestants: Iterable[Contestant] = ()) -> dict[str, Any]:
    """Device and versions: what two runs must share to be compared."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        described = {"device": f"{device.type} ({platform.machine()})"}
    return described | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "peers": {peer.name: version(peer) for peer in contestants if peer.distribution is not None},
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """What a record of a run begins with: its environment, driver, commit and date."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**environment(device), "driver": driver(), "commit": commit(), "date": date}


def append_account(path: Path, device: torch.device, account: dict[str, Any]) -> None:
    """Adds one run's account, with its environment, commit and date, to a JSON file that holds a list of them."""
    runs = json.loads(path.read_text()) if path.exists() else []
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*runs, {**provenance(device), "command": command, **account}], indent=1) + "\n")


@dataclass
class Results:
    """An environment, the commands that were run in it, and their rows; a cell measured again replaces its row."""

    environment: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a result file.

        Raises:
            ValueError: the file is something else.
        """
        try:
            content = json.loads(path.read_text())
            environment = content["environment"]
            return cls(environment, environment.pop("runs"), content["rows"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: no result file of this harness; name another one") from None

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; runs that no row refers to any more are dropped."""
        used = sorted({row["run"] for row in self.rows})
        renumbered = {old: new for new, old in enumerate(used)}
        rows = [row | {"run": renumbered[row["run"]]} for row in self.rows]
        content = {"environment": self.environment | {"runs": [self.runs[old] for old in used]}, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(_dump(content))
        partial.replace(path)

    def start_run(self, commit: str | None) -> dict[str, Any]:
        """Adds a run, which the rows added from now on belong to."""
        run = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit,
            "driver": driver(),
            "clocks_before": clocks(),
        }
        self.runs.append(run)
        return run

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows of the last run; each replaces the row of its cell, if there is one."""
        for row in rows:
            row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
            row["run"] = len(self.runs) - 1
            cells = [cell(other) for other in self.rows]
            if cell(row) in cells:
                self.rows[cells.index(cell(row))] = row
            else:
                self.rows.append(row)


def cell(row: Row) -> tuple[str, str, str]:
    """What identifies a row."""
    return row["suite"], row["case"], row["name"]


def open_results(path: Path, environment: dict[str, Any]) -> Results:
    """The results in `path`, to add to; new ones where there is no file.

    Raises:
        ValueError: the file was measured on another device or with other versions, or is something else.
    """
    if not path.exists():
        return Results(environment)
    results = Results.load(path)
    differing = [key for key, value in environment.items() if results.environment.get(key) != value]
    if differing:
        now = ", ".join(f"{key} {results.environment.get(key)} there, {environment[key]} here" for key in differing)
        raise ValueError(f"{path}: measured in another environment ({now}); write to another file, or remove this one")
    return results


def _dump(content: dict[str, Any]) -> str:
    """JSON with one row a line, so that a new measurement is a readable diff."""
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    environment = json.dumps(content["environment"], indent=1)
    return f'{{\n"environment": {environment},\n"rows": [\n{rows}\n]\n}}\n'
