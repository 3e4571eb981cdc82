"""Fault injection: kernels known to be good, broken in every generated way, must be caught.

Caught means: an error, a race report, or a wrong result, on one of four schedules. A survivor fails the test unless
`EQUIVALENT` holds an argument why the broken kernel is as good as the whole one, or why no run of this problem size can tell.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from .errors import EmulatorError
from .faults import Fault, data_path_faults, program_with, synchronisation_faults
from .kernels import two_tiles_one_buffer
from .launcher import launch, load_program
from .tensor_map import TensorMap
from .test_tensor_cores import small_integers

SEEDS = (0, 1, 2, 5)


def tile_pair_caught(program) -> bool:
    """Whether running `two_tiles_one_buffer` in this form shows an error on one of the schedules."""
    _, a, b, shared = two_tiles_one_buffer(True)
    for seed in SEEDS:
        left, right = small_integers((128, 128), "bf16", seed), small_integers((64, 128), "bf16", seed + 1)
        raw = [x.view(torch.uint8) for x in (left, right)]
        maps = [
            TensorMap(r.data_ptr(), (128, rows), (256,), operand.box, 128, "bf16")
            for r, rows, operand in zip(raw, (128, 64), (a, b))
        ]
        out = np.full((128, 64), np.nan, np.float32)
        try:
            launch(program, 1, 128, [*maps, out], memory=raw, dynamic_shared=shared, seed=seed, max_steps=5000)
        except EmulatorError:
            return True
        if not np.array_equal(out, (left.float() @ right.float().T).numpy()):
            return True
    return False


def argument(fault: Fault, arguments: dict[tuple[str, str], str]) -> str | None:
    """The written argument for a survivor: by kind of fault and the start of the instruction's text."""
    return next((why for (kind, text), why in arguments.items() if fault.kind == kind and text in fault.text), None)


TILE_PAIR_EQUIVALENT = {
    ("swap", "mbarrier.init"): "two barriers are initialised by one thread before anyone uses either: the order is free",
    ("swap", "fence.proxy.async"): "the fence covers the mbarrier inits before it; the TMEM allocation needs no fence, and "
    "bar.sync follows both",
    ("delete", "bar.warp.sync"): "every lane waits on the mbarrier next, and thread 0 alone issues; the lanes need not meet",
    ("delete", "bar.sync 0"): "the last phase: no barrier is used again, and another bar.sync stands before the dealloc",
}


def test_broken_synchronisation_is_caught():
    """Every synchronisation instruction of a tcgen05 kernel, each way, four schedules."""
    kernel = load_program(two_tiles_one_buffer(True)[0]).kernel
    assert not tile_pair_caught(load_program(two_tiles_one_buffer(True)[0]))
    faults = list(synchronisation_faults(kernel))
    survivors = [f for f in faults if not tile_pair_caught(program_with(kernel, f))]
    unexplained = [str(f) for f in survivors if argument(f, TILE_PAIR_EQUIVALENT) is None]
    assert not unexplained, "\n".join(unexplained)
    # The barrier between the two tiles is no survivor: only the last one has an argument.
    assert sum(f.text == "bar.sync 0" for f in survivors) == 1
    assert len(survivors) <= 0.15 * len(faults)


def test_broken_data_paths_are_all_caught():
    """Descriptors off by 32 bytes, TMEM columns off by one."""
    kernel = load_program(two_tiles_one_buffer(True)[0]).kernel
    faults = list(data_path_faults(kernel))
    assert len(faults) >= 20
    assert not [str(f) for f in faults if not tile_pair_caught(program_with(kernel, f))]
