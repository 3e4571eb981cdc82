"""Fault injection: kernels known to be good, broken in every generated way, must be caught.

Caught means: an error, a race report, or a wrong result, on one of four schedules. A survivor fails the test unless
a table here holds an argument why the broken kernel is as good as the whole one.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from .errors import EmulatorError
from .faults import Fault, data_path_faults, idle, program_with, synchronisation_faults
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
    (
        "swap",
        "mbarrier.init",
    ): "two barriers are initialised by one thread before anyone uses either: the order is free",
    (
        "swap",
        "fence.proxy.async",
    ): "the fence covers the mbarrier inits before it; the TMEM allocation needs no fence, and bar.sync follows both",
    (
        "delete",
        "bar.warp.sync",
    ): "every lane waits on the mbarrier next, and thread 0 alone issues; the lanes need not meet",
    (
        "delete",
        "bar.sync 0",
    ): "the last phase: no barrier is used again, and another bar.sync stands before the dealloc",
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


_LAST_WAIT = (
    "a role's last wait: only its arrival at the barrier before the dealloc follows, and the warps that touch TMEM "
    "arrive there after their own accesses"
)

UPSTREAM_EQUIVALENT = {
    ("delete", "[%r1475], %r3277"): _LAST_WAIT,
    ("flip parity", "[%r1475], %r3277"): _LAST_WAIT,
    ("delete", "[%r3259], %r3260"): _LAST_WAIT,
    ("swap", "<-> bar.sync"): "an arrival and a barrier with no access between them: neither waits for the other",
    (
        "swap",
        "fence.mbarrier_init",
    ): "the fence acts on barriers that its own thread initialised; bar.sync still precedes "
    "the cluster's first use, and this launch has clusters of one CTA",
    ("delete", "cp.async.bulk.commit_group"): "the epilogue's last stores: one work tile a CTA, so nothing refills the "
    "staging buffer, and the grid's end completes them",
    ("delete", "cp.async.bulk.wait_group"): "as above: nothing refills the staging buffer after the only work tile",
    ("swap", "cp.async.bulk"): "as above: nothing refills the staging buffer after the only work tile",
    (
        "swap",
        "mbarrier.arrive",
    ): "arrives on the staging buffer's barrier, whose next wait belongs to a second work tile",
    (
        "delete",
        "bar.warp.sync",
    ): "joins lanes before one of them arrives; the wait::st before it is a whole warp's",
    ("swap", "tcgen05.wait::st"): "wait::st and the warp barrier both precede the arrival that publishes the store",
}


@pytest.mark.faults_full
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
def test_the_published_forward_with_every_fault():
    """Every synchronisation and data-path fault of the SM100 forward at head_dim 128: five key tiles, so that every
    ring wraps, and logits large enough to force rescaling."""
    from .published import Problem, artifacts, forward

    def run(program, seed: int):
        problem = Problem(seed, 128, 256, 640, scale=8.0)
        return forward(problem, sm100=True, program=program, max_steps=40_000)

    def caught(program) -> bool:
        for seed in (1, 2, 3, 5):
            try:
                errors = run(program, seed).errors
            except EmulatorError:
                return True
            if not (errors["out"] < 3.5e-3 and errors["lse"] < 1e-3):
                return True
        return False

    ptx, _ = artifacts("forward_sm100", head_dim=128, group=1, causal=False, pack=False, pair=False)
    whole = load_program(ptx)
    reference = run(whole, 0).result
    faults = [f for f in synchronisation_faults(whole.kernel) if not idle(f, reference)]
    survivors = [f for f in faults if not caught(program_with(whole.kernel, f))]
    unexplained = [f for f in survivors if argument(f, UPSTREAM_EQUIVALENT) is None]
    assert not unexplained, "\n".join(map(str, unexplained))
    assert len(survivors) <= 0.1 * len(faults)
    missed = [str(f) for f in data_path_faults(whole.kernel) if not caught(program_with(whole.kernel, f))]
    assert not missed, "\n".join(missed)
