"""Fault injection: kernels known to be good, broken in every generated way, must be caught.

Caught means: an error, a race report, or a wrong result, on one of four schedules. A survivor fails the test unless
a table here holds an argument why the broken kernel is as good as the whole one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from .errors import EmulatorError
from .faults import Fault, data_path_faults, idle, mask_faults, program_with, reached, synchronisation_faults
from .kernels import two_tiles_one_buffer, wgmma_from_registers
from .launcher import launch, load_program
from .record_hardware import load
from .tensor_map import TensorMap
from .test_hardware_records import TOLERATED, same
from .test_tensor_cores import RegisterProduct, small_integers

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
            launch(program, 1, 128, [*maps, out], memory=raw, dynamic_shared=shared, seed=seed, max_steps=5000,
                   tolerate=())  # fmt: skip
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


WGMMA_EQUIVALENT = {
    (
        "swap",
        "fence.proxy.async",
    ): "every warp fences behind the barrier instead: what it has seen there is what its own wgmma reads",
    ("swap", "<-> wgmma.fence"): "the barrier touches no register of the wgmma",
}


def test_broken_wgmma_synchronisation_is_caught():
    """Every synchronisation instruction of a wgmma with A in registers, each way: the fences, the group, the wait."""
    product = RegisterProduct("bf16", 64, "f32")
    kernel = load_program(wgmma_from_registers("bf16", 64, "f32")).kernel

    def caught(program) -> bool:
        for seed in SEEDS:
            product.d_words[:] = np.nan
            try:
                product.run(seed, program=program)
            except (EmulatorError, AssertionError):
                return True
        return False

    faults = list(synchronisation_faults(kernel))
    assert {f.text.split(".sync")[0].split(".shared")[0] for f in faults} == {
        "fence.proxy.async", "bar", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"
    }  # fmt: skip
    survivors = [f for f in faults if not caught(program_with(kernel, f))]
    unexplained = [str(f) for f in survivors if argument(f, WGMMA_EQUIVALENT) is None]
    assert not unexplained, "\n".join(unexplained)
    assert len(survivors) <= len(WGMMA_EQUIVALENT)


RECORDED = Path(__file__).with_name("records") / "causal-gqa-bf16-attention_forward.npz"


def test_broken_descriptors_and_masks_of_a_recorded_forward_are_caught():
    """A sample of the project's own Triton forward as it ran on an H100: whatever changes a bit of the result is wrong
    by more than rounding. (A mask may be turned round to no effect where another one hides the same scores.)"""
    recording, after, _ = load(RECORDED)
    kernel = load_program(recording.text).kernel

    def results(program, seed: int) -> bytes:
        _, memory = recording.replay(seed, program, tolerate=TOLERATED, max_steps=20_000)
        return [memory.find(a, want.nbytes, 0).bytes(a, want.nbytes).tobytes() for a, want in after.values()]

    def wrong(found: list[bytes]) -> bool:
        for raw, (_, want) in zip(found, after.values()):
            try:
                same(torch.frombuffer(bytearray(raw), dtype=want.dtype), want)
            except AssertionError:
                return True
        return False

    reference, _ = recording.replay(2, tolerate=TOLERATED)
    whole = results(None, 2)
    assert not wrong(whole)
    faults = [f for f in (*data_path_faults(kernel), *mask_faults(kernel)) if reached(f, reference)][::19]
    broken = {f: results(program_with(kernel, f), 2) for f in faults}
    assert not [str(f) for f, found in broken.items() if found != whole and not wrong(found)]
    caught = {f.kind for f, found in broken.items() if wrong(found)}
    assert caught == {"descriptor 1 +32 bytes", "descriptor 2 +32 bytes", "mask inverted"}


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


_OWN_ROWS = "a warp stores its rows of O over the rows of Q that it alone reads, behind its own wait_group"
_ONE_TILE = "the epilogue's last store: one work tile a CTA, so nothing refills the staging buffer"

SM90_EQUIVALENT = {
    ("swap", "fence.mbarrier_init"): UPSTREAM_EQUIVALENT["swap", "fence.mbarrier_init"],
    ("swap", "<-> wgmma.fence"): "the barrier touches no register of the wgmma",
    ("delete", "wgmma.fence"): "before Q K^T only: it starts from zero, and its accumulators' last readers were moves, "
    "which only rename here",
    ("swap", "bar.arrive"): "the two warpgroups take turns by this barrier for speed; no data depends on it",
    ("delete", "bar.sync 1, 256"): _OWN_ROWS,
    ("swap", "bar.sync 1, 256 <-> stmatrix"): _OWN_ROWS,
    ("delete", "cp.async.bulk.commit_group"): _ONE_TILE,
    ("swap", "cp.async.bulk.commit_group"): _ONE_TILE,
    ("delete", "cp.async.bulk.wait_group.read"): _ONE_TILE,
}


@pytest.mark.faults_full
@pytest.mark.timeout(2400)
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
@pytest.mark.parametrize("sm100", [True, False], ids=["sm100", "sm90"])
def test_the_published_forward_with_every_fault(sm100):
    """Every synchronisation and data-path fault of the forwards at head_dim 128: five key tiles, so that every ring
    wraps, and logits large enough to force rescaling."""
    from .published import Problem, artifacts, forward

    def run(program, seed: int):
        return forward(Problem(seed, 128, 256, 640, scale=8.0), sm100=sm100, program=program, max_steps=40_000)

    def caught(program) -> bool:
        for seed in (1, 2, 3, 5):
            try:
                errors = run(program, seed).errors
            except EmulatorError:
                return True
            if not (errors["out"] < 3.5e-3 and errors["lse"] < 1e-3):
                return True
        return False

    options = {"head_dim": 128, "group": 1, "causal": False, "pack": False}
    ptx, _ = (artifacts("forward_sm100", **options, pair=False) if sm100 else
              artifacts("forward_sm90", **options, tile_m=128))  # fmt: skip
    whole = load_program(ptx)
    reference = run(whole, 0).result
    faults = [f for f in synchronisation_faults(whole.kernel) if not idle(f, reference)]
    survivors = [f for f in faults if not caught(program_with(whole.kernel, f))]
    arguments = UPSTREAM_EQUIVALENT if sm100 else SM90_EQUIVALENT
    unexplained = [f for f in survivors if argument(f, arguments) is None]
    assert not unexplained, "\n".join(map(str, unexplained))
    assert len(survivors) <= 0.1 * len(faults)
    missed = [str(f) for f in data_path_faults(whole.kernel) if not caught(program_with(whole.kernel, f))]
    assert not missed, "\n".join(missed)
