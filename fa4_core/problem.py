"""The attention problem: its static kinds, its run-time values, and the checks that stand before every launch.

A problem has five slots: sequence layout, source of K and V, mask, score modification, finalisation. Each slot has a
*kind*, which a kernel is compiled for (`Kinds`), and *values*, which are run-time arguments (`Problem`). Two calls with
equal kinds share a compiled kernel whatever their lengths and values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEFAULT_RESCALE_THRESHOLD = 8.0
MAX_RESCALE_THRESHOLD = 8.0
UNBOUNDED = -1
LARGEST = 2.0**127
"""Of a scale and a softcap, which kernels multiply by log2 e in float32."""
PAGE_MULTIPLE = 8


Stride = tuple[int, ...]
"""What `Tensor.stride()` gives."""


class Inputs(NamedTuple):
    """The tensors of one call. q, k, v as in `dispatch.attention`; the others are None where the call has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    page_table: Tensor | None = None


class Options(NamedTuple):
    """What a call has besides its tensors: as `dispatch.attention` takes it, but for the windows, -1 for unbounded."""

    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    rescale_threshold: float = DEFAULT_RESCALE_THRESHOLD
    deterministic: bool = False
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Kinds:
    """The static part of a problem: what a kernel is compiled for, besides the device's architecture."""

    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    group: int
    varlen: bool
    seqused_q: bool
    seqused_k: bool
    paged: bool
    window_left: bool
    window_right: bool
    softcap: bool
    sink: bool
    kv_cache: bool = False

    @property
    def indexed(self) -> bool:
        """Whether lengths lie in tensors, whose contents no signature tells."""
        return self.varlen or self.seqused_q or self.seqused_k

    @property
    def uneven(self) -> bool:
        """Whether query tiles may differ in the number of keys that they see."""
        return self.indexed or self.window_left or self.window_right

    def features(self) -> frozenset[str]:
        """The optional features this problem needs, in the words that `explain` and the errors use."""
        named = {
            "varlen": self.varlen,
            "seqused": self.seqused_q or self.seqused_k,
            "paged KV (page_table)": self.paged,
            "window or causal": self.window_left or self.window_right,
            "softcap": self.softcap,
            "sink": self.sink,
            "head_dim_v != head_dim": self.head_dim_v != self.head_dim,
            "GQA": self.group > 1,
            "KV cache": self.kv_cache,
        }
        return frozenset(name for name, needed in named.items() if needed)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One checked call; calls of one signature share it, and it compares and hashes by identity, so it is a fast key.

    `strides` are those of q, k and v, in elements. `batch` counts sequences. `seqlen_q` and `seqlen_k` are rows of the
    tensors: a batch element's in the dense layout, the total in varlen. Windows are in keys, -1 for unbounded.
    `softmax_scale` multiplies q k^T; `softcap` is in the units of the scaled scores; `rescale_threshold` is in log2
    units. Without `with_lse` nobody reads the forward's LSE, which may then be anything.
    """

    kinds: Kinds
    device: torch.device
    strides: tuple[Stride, Stride, Stride]
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    rescale_threshold: float
    deterministic: bool
    with_lse: bool = True

    @property
    def total_q(self) -> int:
        """Query rows in the whole call."""
        return self.seqlen_q if self.kinds.varlen else self.batch * self.seqlen_q

    @property
    def total_k(self) -> int:
        """Key rows in the whole call."""
        return self.seqlen_k if self.kinds.varlen else self.batch * self.seqlen_k

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output: q's, with the value head dimension."""
        rows = (self.seqlen_q,) if self.kinds.varlen else (self.batch, self.seqlen_q)
        return (*rows, self.heads_q, self.kinds.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp: (B, Hq, Sq), or (Hq, total_q) in varlen."""
        if self.kinds.varlen:
            return (self.heads_q, self.seqlen_q)
        return (self.batch, self.heads_q, self.seqlen_q)


class Meta(NamedTuple):
    """What the checks read of a tensor: everything but its contents and address."""

    shape: tuple[int, ...]
    stride: Stride
    dtype: torch.dtype
    device: torch.device


Signature = tuple["tuple | None", ...]
"""For each tensor of a call what `Meta` holds, in a plain tuple, which is made sooner; None where there is none."""


def signature_of(tensors: Iterable[Tensor | None]) -> Signature:
    """The signature of a call's tensors."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def check_types(names: Iterable[str], given: Iterable[Any], needed: tuple[str, ...], accepted: type = Tensor) -> None:
    """Raises TypeError where an argument is no tensor (or what else stands for one, `accepted`): None is no error but
    in the `needed` ones."""
    for name, value in zip(names, given):
        if not isinstance(value, accepted) and (value is not None or name in needed):
            raise TypeError(f"{name}: got {type(value).__name__}, accepted is a torch.Tensor")


def is_contiguous(shape: tuple[int, ...], stride: Stride) -> bool:
    """Whether a tensor of that shape and these strides lies in one piece, in order."""
    packed = 1
    for n, step in zip(reversed(shape), reversed(stride)):
        if n != 1 and step != packed:
            return 0 in shape
        packed *= n
    return True


def make_problem(inputs: Inputs, **options: Any) -> Problem:
    """Checks a call and returns its problem.

    Shapes, dtypes, devices and numbers are always checked. The contents of index tensors are checked where they lie on
    the CPU, or anywhere under `DISPATCH_CHECK=1`, which synchronises with the device.

    Args:
        inputs: the call's tensors.
        options: fields of `Options`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, number or index is out of what is accepted. Messages name the argument.
    """
    problem = check_signature(signature_of(inputs), Options(**options))
    check_contents(problem, inputs)
    return problem


def check_signature(signature: Signature, options: Options) -> Problem:
    """What `make_problem` does without a look at the contents of index tensors: so much, equal signatures share."""
    q, k, v, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table = (
        None if meta is None else Meta(*meta) for meta in signature
    )
    assert q is not None
    assert k is not None
    assert v is not None
    max_seqlen_q, max_seqlen_k, softmax_scale, softcap, window_left, window_right, rescale_threshold, *_ = options
    varlen = cu_seqlens_q is not None or cu_seqlens_k is not None
    paged = page_table is not None
    _check_tensors(q, k, v, varlen, paged)
    batch, heads_q, heads_kv = _check_shapes(q, k, v, varlen, paged)
    seqlen_k = k.shape[-3]
    if paged:
        if varlen:
            batch = _check_cu_seqlens(cu_seqlens_q, cu_seqlens_q, q.device)
        seqlen_k = _check_paged(page_table, k, cu_seqlens_k, seqused_k, max_seqlen_k, batch, q.device)
    elif varlen:
        batch = _check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.device)
    if not varlen and (max_seqlen_q is not None or max_seqlen_k is not None):
        raise ValueError(
            "max_seqlen_q and max_seqlen_k belong to the varlen layout: give cu_seqlens_q and cu_seqlens_k too"
        )
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            _check_index(name, used, (batch,), q.device)
    if sink is not None:
        _check_sink(sink, heads_q, q.device)
    for name, hint in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if hint is not None and hint < 0:
            raise ValueError(f"{name}: got {hint}, accepted are integers >= 0 or None")
    head_dim = q.shape[-1]
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    check_numbers(scale, softcap, window_left, window_right, rescale_threshold)
    return Problem(
        kinds=Kinds(
            dtype=q.dtype,
            head_dim=head_dim,
            head_dim_v=v.shape[-1],
            group=heads_q // heads_kv,
            varlen=varlen,
            seqused_q=seqused_q is not None,
            seqused_k=seqused_k is not None,
            paged=paged,
            window_left=window_left != UNBOUNDED,
            window_right=window_right != UNBOUNDED,
            softcap=softcap != 0.0,
            sink=sink is not None,
        ),
        device=q.device,
        strides=(q.stride, k.stride, v.stride),
        batch=batch,
        seqlen_q=q.shape[-3],
        seqlen_k=seqlen_k,
        heads_q=heads_q,
        heads_kv=heads_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        softcap=softcap,
        # A window wider than both sides hides nothing; cut there, positions plus it stay far from an int32's end.
        window_left=min(window_left, q.shape[-3] + seqlen_k),
        window_right=min(window_right, q.shape[-3] + seqlen_k),
        rescale_threshold=rescale_threshold,
        deterministic=options.deterministic,
    )


def _check_tensors(q: Meta, k: Meta, v: Meta, varlen: bool, paged: bool) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: dtype {q.dtype} is not accepted, only {', '.join(map(str, DTYPES))}")
    dense = (4, "(batch, seqlen, heads, head_dim)")
    packed = (3, "(total, heads, head_dim)")
    pages = (4, "(n_pages, page_size, heads, head_dim)")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        rank, shape = pages if paged and name != "q" else packed if varlen else dense
        if len(tensor.shape) != rank:
            hint = "" if varlen or paged else "; for packed sequences give cu_seqlens_q and cu_seqlens_k"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, accepted is {shape}{hint}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from q's {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}")


def _check_shapes(q: Meta, k: Meta, v: Meta, varlen: bool, paged: bool) -> tuple[int, int, int]:
    """Returns batch (1 in varlen), heads_q and heads_kv."""
    heads_q, head_dim = q.shape[-2:]
    heads_kv = k.shape[-2]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: head_dim={head_dim}, accepted are 1 to {MAX_HEAD_DIM}")
    if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"v: head_dim={v.shape[-1]}, accepted are 1 to {MAX_HEAD_DIM}")
    if k.shape[-1] != head_dim:
        raise ValueError(f"k: head_dim={k.shape[-1]} differs from q's {head_dim}")
    if v.shape[-2] != heads_kv:
        raise ValueError(f"v: heads_kv={v.shape[-2]} differs from k's {heads_kv}")
    if heads_kv == 0 or heads_q == 0:
        raise ValueError(f"q, k: heads_q={heads_q}, heads_kv={heads_kv}; both must be at least 1")
    if heads_q % heads_kv:
        raise ValueError(f"k: heads_kv={heads_kv} does not divide heads_q={heads_q}")
    if k.shape[-3] != v.shape[-3]:
        raise ValueError(f"v: seqlen_k={v.shape[-3]} differs from k's {k.shape[-3]}")
    batch = 1 if varlen else q.shape[0]
    if paged and k.shape[0] != v.shape[0]:
        raise ValueError(f"v: n_pages={v.shape[0]} differs from k's {k.shape[0]}")
    if not varlen and not paged:
        if k.shape[0] != v.shape[0]:
            raise ValueError(f"v: batch={v.shape[0]} differs from k's {k.shape[0]}")
        if k.shape[0] != batch:
            raise ValueError(f"k: batch={k.shape[0]} differs from q's {batch}")
    return batch, heads_q, heads_kv


def _check_index(name: str, index: Meta, shape: tuple[int, ...], device: torch.device) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{name}: dtype {index.dtype} is not accepted, only torch.int32")
    if tuple(index.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(index.shape)}, accepted is {shape}")
    if index.device != device:
        raise ValueError(f"{name}: on {index.device}, but q is on {device}")


def _check_cu_seqlens(cu_seqlens_q: Meta | None, cu_seqlens_k: Meta | None, device: torch.device) -> int:
    """Returns the number of sequences."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing, given = ("cu_seqlens_q", "cu_seqlens_k") if cu_seqlens_q is None else ("cu_seqlens_k", "cu_seqlens_q")
        raise ValueError(f"{missing}: missing, but {given} was given; the varlen layout takes both")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if len(cu.shape) != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(cu.shape)}, accepted is (n_seqs + 1,)")
        _check_index(name, cu, tuple(cu.shape), device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: {cu_seqlens_k.shape[0]} entries, but cu_seqlens_q has {cu_seqlens_q.shape[0]}; "
            "both hold n_seqs + 1"
        )
    return cu_seqlens_q.shape[0] - 1


def _check_paged(
    page_table: Meta, k: Meta, cu_seqlens_k: Meta | None, seqused_k: Meta | None, max_seqlen_k: int | None,
    batch: int, device: torch.device,
) -> int:  # fmt: skip
    """Returns how many keys of one sequence the table reaches."""
    if cu_seqlens_k is not None:
        raise ValueError(
            "cu_seqlens_k: given with page_table, which takes seqused_k: a paged sequence has no place of its own"
        )
    if seqused_k is None:
        raise ValueError("seqused_k: missing, but page_table was given; it says how many keys each sequence has")
    if max_seqlen_k is not None:
        raise ValueError("max_seqlen_k: given with page_table, whose width bounds the sequences")
    check_page_size("k", k.shape[1])
    if len(page_table.shape) != 2:
        raise ValueError(f"page_table: got shape {tuple(page_table.shape)}, accepted is (batch, pages)")
    _check_index("page_table", page_table, (batch, page_table.shape[1]), device)
    # Without a page there is no key, whatever the table says: kernels clamp to the last page.
    return page_table.shape[1] * k.shape[1] if k.shape[0] else 0


def check_page_size(name: str, page_size: int) -> None:
    """Raises ValueError where a paged cache, argument `name`, has pages of that many rows."""
    if page_size != 1 and (page_size % PAGE_MULTIPLE or page_size == 0):
        raise ValueError(f"{name}: page size {page_size}, accepted are 1 and multiples of {PAGE_MULTIPLE}")


def _check_sink(sink: Meta, heads_q: int, device: torch.device) -> None:
    if sink.dtype not in DTYPES:
        raise TypeError(f"sink: dtype {sink.dtype} is not accepted, only floating-point ones of 16 bits or more")
    if tuple(sink.shape) != (heads_q,):
        raise ValueError(f"sink: got shape {tuple(sink.shape)}, accepted is (heads_q,) = ({heads_q},)")
    if sink.device != device:
        raise ValueError(f"sink: on {sink.device}, but q is on {device}")


def check_numbers(scale: float, softcap: float, left: int, right: int, threshold: float) -> None:
    if not (0.0 < scale <= LARGEST):
        raise ValueError(
            f"softmax_scale: got {scale}, accepted are finite numbers > 0, up to 2^127 in float32, or None"
        )
    if not (0.0 <= softcap <= LARGEST):
        raise ValueError(
            f"softcap: got {softcap}, accepted are finite numbers >= 0, up to 2^127 in float32; 0 and None: off"
        )
    if softcap and scale / softcap > LARGEST:  # infinite in float32, and NaN times a score of 0
        raise ValueError(f"softcap: got {softcap}, accepted with softmax_scale={scale} are {scale / LARGEST:g} or more")
    for side, value in (("left", left), ("right", right)):
        if value < UNBOUNDED:
            raise ValueError(f"window: {side} is {value}, accepted are integers >= 0, and None or -1 for unbounded")
    if not (0.0 <= threshold <= MAX_RESCALE_THRESHOLD):
        raise ValueError(f"rescale_threshold: got {threshold}, accepted are 0 to {MAX_RESCALE_THRESHOLD:g}")


def contents_are_checked(device: torch.device) -> bool:
    """Whether index tensors on `device` are read by the checks: on the CPU, or anywhere under DISPATCH_CHECK=1."""
    if device.type == "cpu":
        return True
    # Asked with every call: a look-up that fails costs four times as much.
    return "DISPATCH_CHECK" in os.environ and os.environ["DISPATCH_CHECK"] == "1"


def check_contents(problem: Problem, inputs: Inputs) -> None:
    """Checks what index tensors hold, where they are read at all.

    Raises:
        ValueError: a length or a page number is out of what is accepted.
    """
    if not problem.kinds.indexed or not contents_are_checked(problem.device):
        return
    spans = []
    for side, cu, used, rows, hint in (
        ("q", inputs.cu_seqlens_q, inputs.seqused_q, problem.seqlen_q, problem.max_seqlen_q),
        ("k", inputs.cu_seqlens_k, inputs.seqused_k, problem.seqlen_k, problem.max_seqlen_k),
    ):
        if cu is not None:
            starts = cu.tolist()
            if starts[0] != 0:
                raise ValueError(f"cu_seqlens_{side}: starts at {starts[0]}, must start at 0")
            lengths = [end - start for start, end in zip(starts, starts[1:])]
            if any(length < 0 for length in lengths):
                where = next(i for i, length in enumerate(lengths) if length < 0)
                raise ValueError(
                    f"cu_seqlens_{side}: falls from {starts[where]} to {starts[where + 1]} at entry {where + 1}; "
                    "it must not decrease"
                )
            if starts[-1] > rows:
                raise ValueError(f"cu_seqlens_{side}: ends at {starts[-1]}, but {side} has {rows} rows")
            if hint is not None and lengths and hint < max(lengths):
                raise ValueError(f"max_seqlen_{side}: got {hint}, but the longest sequence has {max(lengths)} rows")
        else:
            lengths = [rows] * problem.batch
        spans.append(lengths)
        if used is not None:
            for i, (n, room) in enumerate(zip(used.tolist(), lengths)):
                if not 0 <= n <= room:
                    raise ValueError(f"seqused_{side}: entry {i} is {n}, accepted are 0 to {room}, the sequence's rows")
    if inputs.page_table is not None:
        page_size, n_pages = inputs.k.shape[1], inputs.k.shape[0]
        assert inputs.seqused_k is not None
        check_pages(inputs.page_table, [-(-n // page_size) for n in inputs.seqused_k.tolist()], n_pages)


def check_pages(page_table: Tensor, used: list[int], n_pages: int) -> None:
    """Checks the first `used` pages of each sequence; reads the table.

    Raises:
        ValueError: a page that is used does not exist.
    """
    for i, (pages, n) in enumerate(zip(page_table.tolist(), used)):
        for j, page in enumerate(pages[:n]):
            if not 0 <= page < n_pages:
                raise ValueError(f"page_table: entry ({i}, {j}) is {page}, accepted are 0 to {n_pages - 1}")
