"""Several host threads at once, and a compiler slow enough that they meet in it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch


def at_once(works):
    """What each of the functions returns, called in a thread of its own, all at the same time."""
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result() for future in [threads.submit(run, work) for work in works]]


def check_compiled_and_loaded_once(monkeypatch, launcher, launch):
    """Four threads call `launch`, a first launch by the module `launcher`: one compiles, none finds it half loaded.

    Triton loads a kernel in steps: a thread that finds it half loaded launches nothing, or something else.
    """
    compiled, launched = [], []

    class Kernel:
        loaded = False

        @property
        def run(self):
            time.sleep(0.05)
            self.loaded = True

    def compile_planned(*_):
        time.sleep(0.05)
        compiled.append(Kernel())
        return compiled[-1]

    monkeypatch.setattr(launcher, "interpreted", lambda: False)
    monkeypatch.setattr(launcher, "compile_planned", compile_planned)
    monkeypatch.setattr("fa4_triton.launch.target_of", lambda device: None)
    monkeypatch.setattr(launcher, "run_compiled", lambda kernel, *_: launched.append(kernel.loaded))
    monkeypatch.setattr(torch.cuda, "device", lambda device: threading.Lock())  # a context that does nothing
    at_once([launch] * 4)
    assert len(compiled) == 1
    assert launched == [True] * 4
