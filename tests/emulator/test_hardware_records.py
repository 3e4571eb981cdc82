"""What a GPU computed, kept in records/, against what the emulator computes from the same launch.

`record_hardware.py` made the files: PTX, parameters and memory of a launch as it ran, and the memory after it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from .launcher import TRITON_TOLERATES
from .published import forward
from .record_hardware import load, published_problem, record_triton

RECORDS = Path(__file__).with_name("records")
TOLERATED = (*TRITON_TOLERATES, "missing proxy fence")
"""Triton 3.6 leaves fences out between cp.async and wgmma; the device did not mind (docs/emulator.md)."""

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-16}
"""What the order of float32 sums can move: one unit of the result's type (two roundings may differ by one), relative to
the largest value."""


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    scale = want.float()[want.isfinite()].abs().max()
    difference = (found.float() - want.float()).abs().nan_to_num(0.0)
    assert torch.equal(found.isfinite(), want.isfinite())
    assert difference.max() <= 2 * ROUNDING[want.dtype] * scale
    # Nearly all elements agree to the bit: an error of layout or of masking would not.
    assert (found == want).float().mean() > 0.95 or want.dtype is torch.float32


@pytest.mark.parametrize("seed", [2, 5])
@pytest.mark.parametrize("path", sorted(RECORDS.glob("*-*_*.npz")) or [None], ids=lambda path: path and path.stem)
def test_a_triton_launch_computes_what_the_gpu_computed(path, seed):
    if path is None:
        pytest.skip("no records yet")
    recording, after, _ = load(path)
    result, memory = recording.replay(seed, tolerate=TOLERATED)
    assert not result.races
    assert after
    for address, want in after.values():
        raw = memory.find(address, want.nbytes, 0).bytes(address, want.nbytes)
        same(torch.from_numpy(raw.copy()).view(want.dtype), want)


@pytest.mark.upstream
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
@pytest.mark.parametrize("path", sorted(RECORDS.glob("published-*.npz")) or [None], ids=lambda path: path and path.stem)
def test_the_published_sm90_forward_computes_what_the_gpu_computed(path):
    if path is None:
        pytest.skip("no records yet")
    with np.load(path) as file:
        facts = json.loads(file["facts"].tobytes())
        out, lse = torch.from_numpy(file["out"]).view(torch.bfloat16), torch.from_numpy(file["lse"])
    options = {k: v for k, v in facts["options"].items() if k not in ("head_dim", "causal")}
    run = forward(published_problem(facts["options"]), sm100=False, **options)
    assert hashlib.sha256(run.ptx.encode()).hexdigest() == facts["ptx"], "another compiler made this PTX"
    same(run.outputs["out"], out)
    same(run.outputs["lse"], lse)


def test_a_record_holds_all_that_a_launch_depends_on(tmp_path):
    """Recorded from the emulator itself and loaded again, every kernel of a forward and backward computes the same."""
    pytest.importorskip("triton", reason="needs the package triton")
    from .triton_backend import emulated_triton

    with emulated_triton(90, seed=2):
        record_triton(tmp_path, "cpu", ("causal-gqa-bf16",))
    paths = sorted(tmp_path.glob("*.npz"))
    assert len(paths) == 4
    for path in paths:
        recording, after, facts = load(path)
        assert facts["device"] == "cpu"
        _, memory = recording.replay(2)
        for address, want in after.values():
            assert (
                memory.find(address, want.nbytes, 0).bytes(address, want.nbytes).tobytes()
                == want.view(torch.uint8).numpy().tobytes()
            )
