"""What the tests run on: every backend on every device it serves here, and the kernels (compile-time axes) to test."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import dispatch
from fa4_core import backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SERVED = ""
CACHE_CALLS: Counter[str] = Counter()
"""Calls of `Target.with_kvcache` in the running test: those that its backend `SERVED`, and by what it lacked those that
went elsewhere. conftest.py reports them."""


@dataclass(frozen=True)
class Target:
    """One backend on one device; called like `dispatch.attention`, which it calls with its own backend."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    limits: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, q, k, v, **options):
        return dispatch.attention(q, k, v, backend=self.backend, **options)

    def with_kvcache(self, *tensors, **options):
        """Called like `dispatch.attention_with_kvcache`. What cute lacks goes where `auto` says, and is counted."""
        try:
            results = dispatch.attention_with_kvcache(*tensors, backend=self.backend, **options)
        except dispatch.UnsupportedError as error:
            if "every_kv_cache" in self.serves:
                raise
            CACHE_CALLS[str(error)] += 1
            return dispatch.attention_with_kvcache(*tensors, **options)
        CACHE_CALLS[SERVED] += 1
        return results

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it: on the CPU, slowly."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def widest(self) -> torch.dtype:
        """The most precise dtype that it takes."""
        return torch.float32 if torch.float32 in self.dtypes else self.dtypes[0]

    @property
    def serves(self) -> set[str]:
        """What tests may ask for with `pytest.mark.serves`: "float32", "kv_cache", and "every_kv_cache": fp8, pages of
        1 row, any head dimension and number of query rows, and `attention` on pages."""
        every = {"every_kv_cache"} if self.backend in ("triton", "reference") else set()
        return {"kv_cache"} | every | ({"float32"} if torch.float32 in self.dtypes else set())

    @property
    def cache_dim(self) -> int:
        """A small head dimension that its KV caches may have."""
        return 16 if "every_kv_cache" in self.serves else 64

    @property
    def compiles(self) -> bool:
        """Whether new compile-time axes cost it seconds."""
        return self.backend != "reference" and not self.interpreted

    @property
    def gathers(self) -> bool:
        """Whether it works on whole row ranges where lengths lie on the device: cuBLAS then rounds by their shape."""
        return self.backend == "reference" and self.device != "cpu"

    def parameter(self):
        """The target as a value of `pytest.mark.parametrize`."""
        marks = []
        if self.device != "cpu":
            marks.append(pytest.mark.gpu)
        if self.interpreted:
            marks.append(pytest.mark.interpreter)
        return pytest.param(self, id=str(self), marks=marks)


def _targets() -> list[Target]:
    if INTERPRETED:
        # The interpreter computes bfloat16 on raw bits, silently wrong, so bfloat16 is left to the GPU. About 30 ms for
        # one head of 256 rows: few, short sequences and few heads.
        small = {"longest": 70, "sequences": 2, "max_head_dim": 64, "heads_kv": 1, "heads_q": st.integers(1, 2)}
        return [Target("triton", "cpu", (torch.float16, torch.float32), small)]
    found = [Target("reference", "cpu")]
    if torch.cuda.is_available():
        device = torch.device("cuda")
        found += [
            Target(name, "cuda", tuple(t for t in DTYPES if t in backends.load(name).dtypes), {"longest": 600})
            for name in backends.MODULES
            if backends.load(name).unavailable(device) is None
        ]
    return found


TARGETS = _targets()

PLAIN: dict[str, Any] = {
    "varlen": False,
    "used_sides": (False, False),
    "causal": False,
    "window": (None, None),
    "softcap": 0.0,
    "sink": None,
    "sink_dtype": torch.float32,
    "storage": "contiguous",
}
SIDE = st.sampled_from((0, 1, 63, 64, 65)) | st.integers(0, 300)
SOFTCAP = st.sampled_from((0.5, 5.0, 50.0))
SINK = st.sampled_from(("normal", "off", "large"))


def _kernel(head_dim: int, head_dim_v: int | None = None, group: int = 1, **changed: Any) -> dict[str, Any]:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    heads_kv = 1 if INTERPRETED else 2
    heads = {"heads_kv": heads_kv, "heads_q": heads_kv * group}
    return {**PLAIN, **heads, "head_dim": head_dim, "head_dim_v": head_dim_v, **changed}


KERNELS: dict[str, dict[str, Any]] = {
    "full-64": _kernel(64),
    "causal-128-gqa": _kernel(128, group=3, causal=True, storage="heads_first"),
    "left-64-broadcast": _kernel(64, group=2, window=st.tuples(SIDE, st.none()), storage="broadcast"),
    "window-80x48": _kernel(80, 48, window=st.tuples(SIDE, SIDE), storage="packed"),
    "varlen-64": _kernel(64, varlen=True),
    "varlen-causal-gqa-128-sink": _kernel(128, group=4, varlen=True, causal=True, sink=SINK, storage="packed"),
    "seqused-72-odd-stride": _kernel(72, used_sides=(True, True), causal=True, storage="odd_stride"),
    "varlen-everything-24x100": _kernel(
        24, 100, group=2, varlen=True, used_sides=(True, True), window=st.tuples(SIDE, SIDE), softcap=SOFTCAP, sink=SINK
    ),
    "softcap-sink-256": _kernel(256, causal=True, softcap=SOFTCAP, sink=SINK, sink_dtype=torch.bfloat16),
    "padded-1x7": _kernel(1, 7, group=2, window=st.tuples(SIDE, st.none()), sink=SINK),
    "causal-192x128": _kernel(192, 128, causal=True),
}
"""The compile-time axes, covered pairwise rather than crossed: a GPU compiles each in seconds. Fields of `Case`."""
