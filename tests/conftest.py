"""Profiles for Hypothesis, poisoned memory, and the parametrisation over backends, devices, dtypes and kernels.

`python -m pytest tests` runs on the reference, and with a GPU on every backend there (`-m gpu` for those alone);
`TRITON_INTERPRET=1 python -m pytest tests -m interpreter` runs the Triton kernels on the CPU;
`--hypothesis-profile=soak` draws at random and for long.
"""

from __future__ import annotations

import os
from collections import Counter

# cuBLAS is deterministic only with a fixed workspace, which has to be chosen before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A pool of compiling processes for every worker of xdist would be hundreds of them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from targets import CACHE_CALLS, INTERPRETED, KERNELS, SERVED, TARGETS, Target

from fa4_core import allocation

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    "print_blob": True,
}
settings.register_profile("ci", derandomize=True, database=None, max_examples=25, **_COMMON)
settings.register_profile("interpreter", derandomize=True, database=None, max_examples=5, **_COMMON)
settings.register_profile(
    "soak",
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    max_examples=500,
    **_COMMON,
)
settings.load_profile("interpreter" if INTERPRETED else "ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    config.addinivalue_line("markers", "serves(*what): on the targets that serve all of it, see `Target.serves`")
    config.addinivalue_line("markers", "interpreter: runs Triton's kernels in its interpreter (TRITON_INTERPRET=1)")
    # Small problems: threads that wait for work cost more than they bring, above all beside xdist's other processes.
    torch.set_num_threads(1)
    # Under this setting torch.empty fills with NaN: a result element that a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # The faster allocation of results on CUDA devices would leave them as they are.
    allocation._empty_strided_cuda = None


ELSEWHERE = "KV-cache calls that went elsewhere"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Notes which calls the target's backend left to another; a test of which it served none says nothing about it."""
    CACHE_CALLS.clear()
    result = yield
    elsewhere = {why: n for why, n in CACHE_CALLS.items() if why != SERVED}
    if elsewhere:
        item.user_properties.append((ELSEWHERE, elsewhere))
        if not CACHE_CALLS[SERVED]:
            pytest.skip(f"every call went elsewhere: {'; '.join(elsewhere)}")
    return result


def pytest_terminal_summary(terminalreporter) -> None:
    elsewhere: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("skipped"):
        if report.when == "call":
            for name, calls in report.user_properties:
                elsewhere.update(calls if name == ELSEWHERE else {})
    if elsewhere:
        terminalreporter.section(ELSEWHERE)
        for why, n in elsewhere.most_common():
            terminalreporter.write_line(f"{n}: {why}")


def _targets(metafunc: pytest.Metafunc) -> list[Target]:
    """The targets that serve what the test's `serves` marker asks for."""
    marker = metafunc.definition.get_closest_marker("serves")
    wanted = set(marker.args) if marker else set()
    return [target for target in TARGETS if wanted <= target.serves]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "target" in names and "dtype" in names:
        pairs = [(target, dtype) for target in _targets(metafunc) for dtype in target.dtypes]
        metafunc.parametrize(
            ("target", "dtype"),
            [
                pytest.param(target, dtype, id=f"{target}-{str(dtype)[6:]}", marks=target.parameter().marks)
                for target, dtype in pairs
            ],
        )
    elif "target" in names:
        metafunc.parametrize("target", [target.parameter() for target in _targets(metafunc)])
    if "kernel" in names:
        metafunc.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
