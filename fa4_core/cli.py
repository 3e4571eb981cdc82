"""The command line, `python -m dispatch`: finds out whether its packages are there, and starts it.

Typer, rich and Hypothesis come with the extra `cli`, so this module imports none of them; `fa4_core.commands.app` does.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

NEEDED = {"cli": ("typer", "rich", "hypothesis"), "bench": ("typer", "rich", "hypothesis", "pandas", "matplotlib")}
"""Modules that an extra brings and its commands need."""


def missing_line(extra: str) -> str | None:
    """What is missing of an extra, and the line that installs it; None where nothing is."""
    missing = [module for module in NEEDED[extra] if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    return f"this command needs {', '.join(missing)}; install with: pip install 'fa4-attention[{extra}]'"


def main(dispatch: ModuleType) -> None:
    """Runs the command line and exits: 0, or 1 where a check failed or a package is missing, or 2 on wrong usage.

    Args:
        dispatch: the module, under whatever name it runs.
    """
    line = missing_line("cli")
    if line is not None:
        sys.exit(line)
    from fa4_core.commands.app import make_app

    make_app(dispatch)(prog_name="python -m dispatch")
