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
    r"D(?P<head_dim>\d+)(?:/(?P<head_dim_v>\d+))? H(?P<heads_q>\d+)/(?P<heads_kv>\d+) B(?P<batch>\d+)"
    r" S(?P<seqlen_q>\d+)(?:/(?P<seqlen_k>\d+))?(?: mean (?P<mean_length>\d+))? (?P<mask>causal|full)"
    r"(?: window (?P<window>\d+))?(?: softcap (?P<softcap>\d+))?(?P<sink> sink)? (?P<dtype>\w+)"
)
_DECODE_NAME = re.compile(
    r"decode D(?P<head_dim>\d+) H(?P<heads_q>\d+)/(?P<heads_kv>\d+) B(?P<batch>\d+) S(?P<seqlen>\d+)"
    r"(?: ragged to (?P<longest>\d+))?(?: capacity (?P<capacity>\d+))?(?: page (?P<page>\d+))? (?P<dtype>\w+)"
)


@dataclass(frozen=True)
class Case:
    """One problem: q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_kv, ...); v of head_dim_v.

    `window` is the number of keys to the left that a row sees beside its own; None: all. Masks align bottom-right. With
    a `mean_length` the seqlen_q = seqlen_k tokens are packed sequences of exponentially distributed lengths (batch 1).
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
    head_dim_v: int = 0
    """0: as head_dim."""
    softcap: int = 0
    sink: bool = False
    mean_length: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if self.mean_length is not None and (self.batch != 1 or self.seqlen_q != self.seqlen_k):
            raise ValueError(f"case: mean_length={self.mean_length} needs batch 1 and seqlen_q = seqlen_k")

    @property
    def name(self) -> str:
        """As in the result files: `D128 H16/16 B1 S16384 causal bf16`."""
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        mean = "" if self.mean_length is None else f" mean {self.mean_length}"
        extras = (f" softcap {self.softcap}" if self.softcap else "") + (" sink" if self.sink else "")
        seqlen = f"S{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"S{self.seqlen_q}/{self.seqlen_k}"
        window = "" if self.window is None else f" window {self.window}"
        mask = "causal" if self.causal else "full"
        heads = f"H{self.heads_q}/{self.heads_kv}"
        return f"{dims} {heads} B{self.batch} {seqlen}{mean} {mask}{window}{extras} {self.dtype}"

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
            head_dim_v=int(match["head_dim_v"] or 0),
            softcap=int(match["softcap"] or 0),
            sink=match["sink"] is not None,
            mean_length=None if match["mean_length"] is None else int(match["mean_length"]),
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
    def is_plain(self) -> bool:
        """Whether it is dense, of one head dimension, without softcap and sink."""
        return self.head_dim_v == self.head_dim and not self.softcap and not self.sink and self.mean_length is None

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """Lengths of the packed sequences, which sum to seqlen_q; drawn once and for all by mean and sum."""
        assert self.mean_length is not None
        return exponential_lengths(self.seqlen_q, self.mean_length)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask lets through, of one head of one batch element."""
        if self.mean_length is not None:
            return sum(_visible_pairs(n, n, *self.window_pair) for n in self.packed_lengths)
        return _visible_pairs(self.seqlen_q, self.seqlen_k, *self.window_pair)

    @property
    def forward_flops(self) -> int:
        """Two matrix products over the visible pairs, two operations a multiply-add."""
        return 2 * (self.head_dim + self.head_dim_v) * self.visible_pairs * self.heads_q * self.batch

    @property
    def backward_flops(self) -> float:
        """Of the backward alone."""
        return BACKWARD_FLOPS * self.forward_flops

    @property
    def forward_bytes(self) -> int:
        """What a forward must move: q, k and v read once, the output and the float32 LSE written once."""
        rows_q, rows_k = self.batch * self.seqlen_q * self.heads_q, self.batch * self.seqlen_k * self.heads_kv
        return (rows_q + rows_k) * (self.head_dim + self.head_dim_v) * self.torch_dtype.itemsize + 4 * rows_q


@functools.cache
def exponential_lengths(total: int, mean: int) -> tuple[int, ...]:
    """Lengths of at least 1 that sum to `total`, drawn from an exponential distribution of that mean."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = torch.empty((), dtype=torch.float64).exponential_(1 / mean, generator=generator)
        lengths.append(min(max(1, int(drawn)), total - sum(lengths)))
    return tuple(lengths)


@dataclass(frozen=True)
class DecodeCase:
    """One step of decoding: a query row for each of `batch` sequences, over a cache of `seqlen` keys each.

    With `longest` the lengths are exponentially distributed with mean `seqlen`, and the first one is `longest`.
    `capacity` is what the cache has room for (0: the longest length), `page` the rows of a page (0: contiguous).
    """

    head_dim: int
    heads_q: int
    heads_kv: int
    batch: int
    seqlen: int
    longest: int = 0
    capacity: int = 0
    page: int = 0
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """As in the result files: `decode D128 H32/8 B16 S8192 page 16 bf16`."""
        extras = f" ragged to {self.longest}" if self.longest else ""
        extras += (f" capacity {self.capacity}" if self.capacity else "") + (f" page {self.page}" if self.page else "")
        return (
            f"decode D{self.head_dim} H{self.heads_q}/{self.heads_kv} B{self.batch} S{self.seqlen}{extras} {self.dtype}"
        )

    @classmethod
    def parse(cls, name: str) -> DecodeCase:
        """The case of that name.

        Raises:
            ValueError: `name` is no decode case's name.
        """
        match = _DECODE_NAME.fullmatch(name)
        if match is None or match["dtype"] not in DTYPES:
            raise ValueError(f"case: got {name!r}, accepted are names like 'decode D128 H32/8 B16 S8192 bf16'")
        numbers = ("head_dim", "heads_q", "heads_kv", "batch", "seqlen", "longest", "capacity", "page")
        return cls(*(int(match[number] or 0) for number in numbers), dtype=match["dtype"])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the query and the cache."""
        return DTYPES[self.dtype]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        if not self.longest:
            return (self.seqlen,) * self.batch
        generator = torch.Generator().manual_seed(0)
        drawn = torch.empty(self.batch, dtype=torch.float64).exponential_(1 / self.seqlen, generator=generator)
        return (self.longest, *(min(max(1, int(n)), self.longest) for n in drawn[1:]))

    @property
    def room(self) -> int:
        """Rows of a sequence's cache: whole pages."""
        rows = self.capacity or max(self.lengths)
        return rows if not self.page else -(-rows // self.page) * self.page

    @property
    def cache_bytes(self) -> int:
        """What a step must read: the keys and values of every sequence."""
        return 2 * sum(self.lengths) * self.heads_kv * self.head_dim * self.torch_dtype.itemsize


def parse_case(name: str) -> Case | DecodeCase:
    """The case of that name, of either kind.

    Raises:
        ValueError: `name` is no case's name.
    """
    return DecodeCase.parse(name) if name.startswith("decode") else Case.parse(name)


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


_DECODE = (
    DecodeCase(128, 32, 8, 1, 32768),
    DecodeCase(128, 32, 8, 16, 8192),
    DecodeCase(128, 64, 8, 64, 4096),
    DecodeCase(128, 32, 32, 128, 2048),
    DecodeCase(128, 32, 8, 64, 4096, longest=65536),
    DecodeCase(128, 32, 8, 64, 4096),
    DecodeCase(128, 32, 8, 64, 4096, capacity=131072),
    DecodeCase(128, 32, 8, 16, 8192, page=16),
    DecodeCase(128, 32, 8, 16, 8192, page=256),
    DecodeCase(128, 64, 8, 64, 4096, page=16),
    DecodeCase(128, 64, 8, 64, 4096, page=256),
    # Lengths that nothing divides.
    DecodeCase(128, 32, 8, 1, 37001),
    DecodeCase(128, 32, 8, 3, 20011),
    # As small as the case of the suite "host", for the host's time.
    DecodeCase(128, 4, 4, 1, 128),
)

SUITES: dict[str, tuple[Case, ...] | tuple[DecodeCase, ...]] = {
    "forward": tuple(
        _training_case(head_dim, seqlen, causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
    )
    + tuple(_training_case(head_dim, TOKENS, causal=True, window=1024) for head_dim in (64, 128))
    + tuple(Case(128, 32, 8, TOKENS // n, n, n, causal) for causal in (False, True) for n in (1024, 8192)),
    "backward": tuple(
        _training_case(head_dim, seqlen, causal)
        for head_dim in (64, 128)
        for causal in (False, True)
        for seqlen in (2048, 8192, 16384)
    ),
    # Features that change the schedule or the arithmetic of a tile.
    "features": (
        Case(64, 64, 8, 1, TOKENS, TOKENS, causal=True, window=128, sink=True),
        Case(128, 32, 8, 1, 2048, 2 * TOKENS, causal=True),
        Case(96, 16, 16, 1, TOKENS, TOKENS, causal=True),
        Case(192, 16, 16, 1, TOKENS, TOKENS, causal=True, head_dim_v=128),
        Case(128, 16, 16, 1, TOKENS, TOKENS, causal=True, softcap=30),
    ),
    "varlen": tuple(
        Case(head_dim, WIDTH // head_dim, WIDTH // head_dim, 1, 2 * TOKENS, 2 * TOKENS, causal=True, mean_length=mean)
        for head_dim in (64, 128)
        for mean in (512, 2048)
    ),
    "decode": _DECODE,
    "memory": tuple(_training_case(head_dim, TOKENS, causal=True) for head_dim in (64, 128)),
    # Small enough that the kernels end before the next call is on its way: what is left is the host's time.
    "host": (Case(128, 4, 4, 1, 128, 128, causal=True),),
}
