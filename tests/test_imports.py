"""Importing `dispatch`, each time in a fresh interpreter: what it loads, what it needs and what it costs."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "cutlass", "tvm_ffi", "cuda", "hypothesis", "typer", "rich", "numpy"}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(source, **environment):
    """Runs source in a fresh interpreter at the repository's root and returns what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "", **environment}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_loads_no_backend_and_nothing_heavy():
    """A module counts as ours to answer for if torch alone does not load it."""
    show = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    added = set(json.loads(python(f"import dispatch; {show}"))) - set(json.loads(python(f"import torch; {show}")))
    allowed = {"dispatch", "dispatch.attention", "fa4_core", "fa4_core.backends", "fa4_core.kvcache", "fa4_core.merge"}
    allowed |= {"fa4_core.allocation", "fa4_core.ops", "fa4_core.problem"}
    assert added <= allowed


@pytest.mark.parametrize(
    "source",
    [
        "from dispatch import attention",
        "import dispatch; attention = dispatch.attention",
        "import dispatch.attention; attention = dispatch.attention",
        "import dispatch.attention as attention",
        "import dispatch; import dispatch.attention; attention = dispatch.attention",
        "import importlib; attention = importlib.import_module('dispatch.attention')",
    ],
)
def test_every_way_to_import_attention_gives_the_function(source):
    check = (
        "import torch; q = torch.ones(1, 2, 1, 8); assert torch.equal(attention(q, q, q), q); print(type(attention))"
    )
    assert "function" in python(f"{source}\n{check}")


def test_everything_but_kernels_works_without_triton_and_numpy():
    """As on macOS, where neither Triton nor the DSL has wheels: forward, backward, explain."""
    source = (
        BLOCK
        + """
import torch
from dispatch import attention, explain
q = torch.randn(1, 3, 2, 8, requires_grad=True)
attention(q, q, q, causal=True).sum().backward()
choice = explain(q, q, q)
assert choice.backend == "reference", choice
assert "pip install 'fa4-attention[triton]'" in choice.reasons["triton"], choice
try:
    attention(q, q, q, backend="triton")
except NotImplementedError as error:
    print(error)
"""
    )
    assert "needs the package triton; install it with: pip install" in python(source)


def test_a_cuda_tensor_without_triton_raises_with_the_install_line():
    """A GPU is faked by its device alone: the choice is made before anything is touched."""
    source = (
        BLOCK
        + """
import torch
import dispatch
from fa4_core.problem import Inputs, make_problem
q = torch.empty(1, 3, 2, 8, device="meta")
kinds = make_problem(Inputs(q, q, q)).kinds
try:
    dispatch._choose(kinds, torch.device("cuda", 0), "auto")
except NotImplementedError as error:
    print(error)
"""
    )
    message = python(source)
    assert "pip install 'fa4-attention[triton]'" in message
    assert "no backend serves this problem on cuda" in message


def test_the_import_costs_what_torch_costs():
    """The time of `import dispatch` once torch is there, beside torch's own, in the median of five interpreters."""
    source = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import dispatch
print(middle - start, time.perf_counter() - middle)
"""
    times = [tuple(map(float, python(source).split())) for _ in range(5)]
    torch_time, own_time = (statistics.median(column) for column in zip(*times))
    assert own_time < max(0.1 * torch_time, 0.05), f"torch {torch_time:.3f} s, dispatch {own_time:.3f} s on top"


def test_the_reference_loads_on_its_first_use():
    source = """
import sys, torch, dispatch
assert "fa4_core.reference" not in sys.modules
q = torch.ones(1, 2, 1, 8)
dispatch.attention(q, q, q)
assert "fa4_core.reference" in sys.modules
assert "fa4_triton.launch" not in sys.modules
"""
    python(source)


def test_dispatch_run_as_a_program_loads_one_copy():
    """`python -m dispatch` is the module `__main__`: a second copy would register the operators twice."""
    done = subprocess.run([sys.executable, "-m", "dispatch", "--help"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
