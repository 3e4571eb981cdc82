"""The reference's memory is O(N): at S=8192 one matrix of scores alone would take 256 MiB."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SEQLEN = 8192
MIB = 2**20
# q, k, v, out, dout and three gradients in float32 at 64 columns are 2 MiB each, with copies heads first, and scores of
# one chunk 1 MiB. Measured: 43 to 49 MiB.
BOUND = 96 * MIB
SCORES = SEQLEN * SEQLEN * 4

PEAK = """
import re, sys, torch
from pathlib import Path

from dispatch import attention
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(1)

def peak():
    # Not ru_maxrss: a process starts with what its parent held when it forked, here a whole pytest.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def step(n, dense):
    q, k, v = (torch.randn(1, n, 1, 64, requires_grad=True) for _ in range(3))
    if dense:
        torch.softmax(q[0, :, 0] @ k[0, :, 0].T, -1).sum().backward()
    else:
        attention(q, k, v, causal=sys.argv[1] == "causal").sum().backward()

step(64, False)
before = peak()
step(int(sys.argv[2]), sys.argv[1] == "dense")
print(peak() - before)
"""


def growth(kind, seqlen=SEQLEN):
    """Bytes by which one forward and backward raise a fresh process's peak."""
    done = subprocess.run([sys.executable, "-c", PEAK, kind, str(seqlen)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_the_references_peak_is_linear(kind):
    assert growth(kind) < BOUND


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_measurement_sees_a_matrix_of_scores():
    """The test above would fail for an O(N^2) implementation: here is one."""
    assert growth("dense") > SCORES


@pytest.mark.gpu
def test_kernels_keep_no_scores_on_the_gpu(target):
    """Forward: output, LSE and 1 MiB at most; backward: gradients and some statistics a row."""
    if target.device == "cpu" or target.backend == "reference":
        pytest.skip("needs a GPU and a kernel")
    q, k, v = (
        torch.randn(1, 2 * SEQLEN, 8, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)
    )
    target(q, k, v).sum().backward()  # compiles
    torch.cuda.synchronize()
    q.grad = k.grad = v.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = target(q, k, v)
    results = out.numel() * 2 + out.shape[1] * 8 * 4
    assert torch.cuda.max_memory_allocated() - before <= results + MIB
    dout = torch.ones_like(out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.backward(dout)
    statistics = 8 * out.shape[1] * 8 * 4
    assert torch.cuda.max_memory_allocated() - before <= 3 * out.numel() * 2 + statistics + 4 * MIB
