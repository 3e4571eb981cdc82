"""pytest support: the `emulator` fixture, and a command that replays a launch whose test failed.

A test module outside this folder imports the two names it needs:

    from emulator.plugin import emulator, pytest_runtest_makereport  # noqa: F401
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from . import launcher as _launch
from .cute_launch import launch_cute
from .triton_backend import emulated_triton

_last: list[_launch.Recording] = []


class Emulator:
    """What the fixture hands out: the ways to launch. Each takes `seed`, which picks the schedule, and raises an
    `EmulatorError` on races, deadlocks, out-of-bounds accesses and the like.

    run: any PTX text (`launcher.launch`). triton: a result of `triton.compile` (`launcher.launch_triton`). cute:
    kept PTX and IR of the CuTe DSL (`cute_launch.launch_cute`). triton_backend: the project's Triton backend on CPU
    tensors.
    """

    run = staticmethod(_launch.launch)
    triton = staticmethod(_launch.launch_triton)
    cute = staticmethod(launch_cute)
    triton_backend = staticmethod(emulated_triton)


@pytest.fixture(scope="session")
def emulator():
    """Launches kernels on numpy arrays and CPU tensors; see `Emulator`. Session-wide, so Hypothesis may share it."""

    def keep(recording: _launch.Recording) -> None:
        _last[:] = [recording]

    _launch.on_launch = keep
    yield Emulator()
    _launch.on_launch = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Saves the last launch of a failed test and prints how to run it again."""
    report = yield
    if report.when == "setup":
        _last.clear()
    elif report.when == "call" and report.failed and _last:
        folder = Path(tempfile.gettempdir()) / "emulator-failures"
        folder.mkdir(exist_ok=True)
        path = folder / (re.sub(r"[^\w.-]+", "_", item.name)[:80] + ".pickle")
        _last[0].save(path)
        report.sections.append(("Emulator", f"replay the last launch with: python -m tests.emulator --replay {path}"))
    return report
