"""The benchmark matrix as data: one `Case` a cell, its name, and the work it stands for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKWARD_FLOPS = 2.5
"""FLOPs of a backward over those of its forward: five matrix products for two."""

_NAME = re.compile(
    r"D(?P<head_dim>\d+) H(?P<heads_q>\d+)/(?P<heads_kv>\d+) B(?P<batch>\d+) S(?P<seqlen_q>\d+)(?:/(?P<seqlen_k>\d+))?"
    r" (?P<mask>causal|full)(?: window (?P<window>\d+))? (?P<dtype>\w+)"
)


@dataclass(frozen=True)
class Case:
    """One dense problem: q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim).

    `window` is the number of keys to the left that a row sees beside its own; None: all. Masks align bottom-right.
    """

    head_dim: int
    heads_q: int
    heads_kv: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    window: int | None = None
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """As in the result files: `D128 H16/16 B1 S16384 causal bf16`."""
        seqlen = f"S{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"S{self.seqlen_q}/{self.seqlen_k}"
        window = "" if self.window is None else f" window {self.window}"
        mask = "causal" if self.causal else "full"
        heads = f"H{self.heads_q}/{self.heads_kv}"
        return f"D{self.head_dim} {heads} B{self.batch} {seqlen} {mask}{window} {self.dtype}"

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of that name.

        Raises:
            ValueError: `name` is no case's name.
        """
        match = _NAME.fullmatch(name)
        if match is None or match["dtype"] not in DTYPES:
            raise ValueError(f"case: got {name!r}, accepted are names like 'D128 H16/16 B1 S16384 causal bf16'")
        numbers = ("head_dim", "heads_q", "heads_kv", "batch", "seqlen_q")
        return cls(
            *(int(match[number]) for number in numbers),
            seqlen_k=int(match["seqlen_k"] or match["seqlen_q"]),
            causal=match["mask"] == "causal",
            window=None if match["window"] is None else int(match["window"]),
            dtype=match["dtype"],
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and the output."""
        return DTYPES[self.dtype]

    @property
    def window_pair(self) -> tuple[int, int]:
        """(left, right) in keys, -1 for unbounded, causal included."""
        return (-1 if self.window is None else self.window), (0 if self.causal else -1)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask lets through, of one head of one batch element."""
        return _visible_pairs(self.seqlen_q, self.seqlen_k, *self.window_pair)

    @property
    def forward_flops(self) -> int:
        """Two matrix products over the visible pairs, two operations a multiply-add."""
        return 4 * self.head_dim * self.visible_pairs * self.heads_q * self.batch

    @property
    def backward_flops(self) -> float:
        """Of the backward alone."""
        return BACKWARD_FLOPS * self.forward_flops

    @property
    def forward_bytes(self) -> int:
        """What a forward must move: q, k and v read once, the output and the float32 LSE written once."""
        rows_q, rows_k = self.batch * self.seqlen_q * self.heads_q, self.batch * self.seqlen_k * self.heads_kv
        return 2 * (rows_q + rows_k) * self.head_dim * self.torch_dtype.itemsize + 4 * rows_q


@functools.cache
def _visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    total = 0
    for i in range(seqlen_k - seqlen_q, seqlen_k):
        first = 0 if left < 0 else max(0, i - left)
        last = seqlen_k - 1 if right < 0 else min(seqlen_k - 1, i + right)
        total += max(0, last - first + 1)
    return total


TOKENS = 16384
WIDTH = 2048
"""Every training case holds TOKENS tokens of WIDTH = heads * head_dim channels, so cases differ in shape alone."""


def _training_case(head_dim: int, seqlen: int, causal: bool, window: int | None = None) -> Case:
    heads = WIDTH // head_dim
    return Case(head_dim, heads, heads, TOKENS // seqlen, seqlen, seqlen, causal, window)


SUITES: dict[str, tuple[Case, ...]] = {
    "forward": tuple(
        _training_case(head_dim, seqlen, causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in (2048, 8192, 16384)
    )
    + tuple(_training_case(head_dim, TOKENS, causal=True, window=1024) for head_dim in (64, 128)),
    "backward": tuple(
        _training_case(head_dim, seqlen, causal)
        for head_dim in (64, 128)
        for causal in (False, True)
        for seqlen in (2048, 8192, 16384)
    ),
    "memory": tuple(_training_case(head_dim, TOKENS, causal=True) for head_dim in (64, 128)),
    # Small enough that the kernels end before the next call is on its way: what is left is the host's time.
    "host": (Case(128, 4, 4, 1, 128, 128, causal=True),),
}
