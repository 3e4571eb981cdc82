"""Hypothesis strategies for attention calls: `cases` draws valid ones, `invalid_calls` ones that must be refused.

A case is a handful of small numbers. Its tensors are filled from its seed, never drawn element by element, so examples
are cheap, shrink well and print as a call that can be pasted (`Case.as_call`). Rows that take part in nothing (past
seqused, past the last sequence) hold NaN in every case: a kernel that lets them show fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

STORAGES = ("contiguous", "heads_first", "packed", "broadcast", "odd_stride")
SCORES = ("normal", "large", "rising")
SINKS = (None, "normal", "off", "large")


class Call(NamedTuple):
    """The tensors and options of one call, and the gradients that arrive at its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor


@dataclass(frozen=True)
class Case:
    """One call of `attention`, small enough to print.

    Args:
        dtype: of q, k and v.
        head_dim, head_dim_v, heads_q, heads_kv: as the tensors have them.
        lengths: (seqlen_q, seqlen_k) of each sequence; equal for all of them in the dense layout.
        varlen: packed sequences with cu_seqlens, else the dense layout.
        used: (seqused_q, seqused_k) of each sequence, either entry None for a side that has none; None for neither.
        tail: rows (of q, of k) after the last packed sequence, which belong to none.
        causal, window, softmax_scale, softcap, rescale_threshold, deterministic: as `attention` takes them.
        sink: None, "normal" (N(0, 1)), "off" (-inf), "large" (N(0, 1) + 30).
        sink_dtype: its dtype.
        hints: max_seqlen as "none", "exact" or "tenfold".
        storage: how q, k and v lie in memory: "contiguous"; "heads_first" (B, H, S, D, transposed); "packed" (slices
            of one wider tensor); "broadcast" (K and V of one head expanded to all); "odd_stride" (every second column).
        scores: "normal" (N(0, 1)); "large" (q x 16: rows near one-hot); "rising" (scores grow along the keys by more
            than any threshold every 64, so the running maximum keeps moving).
        seed: fills the tensors.
    """

    dtype: torch.dtype = torch.float32
    head_dim: int = 16
    head_dim_v: int = 16
    heads_q: int = 1
    heads_kv: int = 1
    lengths: tuple[tuple[int, int], ...] = ((1, 1),)
    varlen: bool = False
    used: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None = None
    tail: tuple[int, int] = (0, 0)
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softmax_scale: float | None = None
    softcap: float = 0.0
    sink: str | None = None
    sink_dtype: torch.dtype = torch.float32
    rescale_threshold: float = 8.0
    deterministic: bool = False
    hints: str = "none"
    storage: str = "contiguous"
    scores: str = "normal"
    seed: int = 0

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def as_call(self, device: str = "cpu", backend: str = "auto") -> str:
        """Python source that runs this case and checks it against float64, to be pasted as it is."""
        return "\n".join(
            [
                "import torch",
                "from dispatch import attention",
                "from fa4_core.checks import check_backward",
                "from fa4_core.strategies import Case",
                "",
                f"case = {self!r}",
                f"q, k, v, options, dout, dlse = case.build({device!r})",
                f"out, lse = attention(q, k, v, **options, return_lse=True, backend={backend!r})",
                f"report = check_backward(attention, q, k, v, dout=dout, dlse=dlse, **options, backend={backend!r})",
                "print(report)",
                "report.require()",
            ]
        )

    def build(self, device: str | torch.device = "cpu") -> Call:
        """The call's tensors, equal on every device: they are drawn on the CPU."""
        random = torch.Generator().manual_seed(self.seed)
        n_seqs = len(self.lengths)
        q, k, v, dout = (self._filled(random, side, heads, dim) for side, heads, dim in (
            (0, self.heads_q, self.head_dim),
            (1, self.heads_kv, self.head_dim),
            (1, self.heads_kv, self.head_dim_v),
            (0, self.heads_q, self.head_dim_v),
        ))  # fmt: skip
        dlse = torch.randn(q.shape[:-1], generator=random)
        sink = torch.randn(self.heads_q, generator=random)
        if self.scores == "large":
            q *= 16.0
        elif self.scores == "rising":
            q[..., 0] = 2.0
            position = torch.arange(k.shape[-3]).view(-1, 1)
            k[..., 0] = position * (0.1 / 2.0 / self._scale())
        if self.storage == "broadcast":
            k, v = (t[..., :1, :].expand(t.shape) for t in (k, v))
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "rescale_threshold": self.rescale_threshold,
            "deterministic": self.deterministic,
        }
        for side, name in enumerate("qk"):
            lengths = [pair[side] for pair in self.lengths]
            if self.varlen:
                ends = torch.tensor([0, *lengths]).cumsum(0)
                options[f"cu_seqlens_{name}"] = ends.to(torch.int32).to(device)
                if self.hints != "none":
                    options[f"max_seqlen_{name}"] = max(lengths, default=0) * (10 if self.hints == "tenfold" else 1)
            used = self.used[side] if self.used else None
            if used is not None:
                options[f"seqused_{name}"] = torch.tensor(used, dtype=torch.int32, device=device)
            idle = self._idle(side)
            for tensor in (q, dout) if side == 0 else (k, v):
                # An expanded tensor cannot be written to, and needs no poison of its own: its source has it.
                source = tensor[..., :1, :] if tensor.stride(-2) == 0 else tensor
                source[idle] = math.nan
            if side == 0:
                dlse[idle] = math.nan
        if self.sink is not None:
            sink = sink.fill_(-math.inf) if self.sink == "off" else sink + (30.0 if self.sink == "large" else 0.0)
            options["sink"] = sink.to(self.sink_dtype).to(device)
        assert self.varlen or n_seqs == q.shape[0]
        q, k, v = (_stored(t.to(self.dtype).to(device), self.storage) for t in (q, k, v))
        return Call(q, k, v, options, dout.to(self.dtype).to(device), dlse.transpose(-1, -2).to(device))

    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.softmax_scale is None else self.softmax_scale

    def _rows(self, side: int) -> tuple[int, ...]:
        """The leading dimensions of q (side 0) or of k and v (side 1)."""
        lengths = [pair[side] for pair in self.lengths]
        return (sum(lengths) + self.tail[side],) if self.varlen else (len(lengths), max(lengths, default=0))

    def _filled(self, random: torch.Generator, side: int, heads: int, dim: int) -> Tensor:
        return torch.randn((*self._rows(side), heads, dim), generator=random)

    def _idle(self, side: int) -> Tensor:
        """Bool, over the rows of a side: those that take part in nothing."""
        rows = self._rows(side)
        lengths = [pair[side] for pair in self.lengths]
        used = (self.used[side] if self.used else None) or lengths
        idle = torch.ones(rows, dtype=torch.bool)
        start = 0
        for i, (length, n) in enumerate(zip(lengths, used)):
            idle[(slice(start, start + n),) if self.varlen else (i, slice(0, n))] = False
            start += length
        return idle


def _stored(tensor: Tensor, storage: str) -> Tensor:
    """The same values, laid out in memory as `storage` says."""
    if storage == "heads_first":
        return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)
    if storage == "packed":
        wide = tensor.new_full((*tensor.shape[:-2], 3, *tensor.shape[-2:]), math.nan)
        wide[..., 1, :, :] = tensor
        return wide[..., 1, :, :]
    if storage == "odd_stride":
        wide = tensor.new_full((*tensor.shape, 2), math.nan)
        wide[..., 0] = tensor
        return wide[..., 0]
    if storage == "broadcast" and tensor.stride(-2) == 0:
        return tensor[..., :1, :].contiguous().expand(tensor.shape)
    return tensor


HEAD_DIMS = (16, 64, 128, 256, 1, 8, 24, 40, 72, 80, 96, 100, 192)
"""Head dimensions that `cases` draws from: powers of two, multiples of 8, and some that need padding."""


def _lengths(longest: int) -> st.SearchStrategy[int]:
    """Sequence lengths, with those around tile edges drawn often."""
    edges = [n for n in (1, 0, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257) if n <= longest]
    return st.sampled_from(edges) | st.integers(0, longest)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    longest: int = 160,
    sequences: int = 4,
    max_head_dim: int = 256,
    features: frozenset[str] | None = None,
    used_sides: tuple[bool, bool] | None = None,
    **fixed: Any,
) -> Case:
    """Draws a valid Case.

    Args:
        longest: the longest sequence.
        sequences: the most sequences, or batch elements.
        max_head_dim: the largest head_dim and head_dim_v.
        features: the optional features that may be drawn, in the words of `Kinds.features`; None for all of them.
        used_sides: whether there is a seqused_q, a seqused_k; drawn when None.
        fixed: fields of Case: values for those that are not to be drawn, or strategies to draw them from instead.
    """

    def pick(name: str, strategy: st.SearchStrategy, feature: str | None = None) -> Any:
        if name in fixed:
            given = fixed[name]
            return draw(given) if isinstance(given, st.SearchStrategy) else given
        if feature is not None and features is not None and feature not in features:
            return getattr(Case(), name)
        return draw(strategy)

    dims = st.sampled_from([d for d in HEAD_DIMS if d <= max_head_dim])
    head_dim = pick("head_dim", dims)
    other_dim_v = features is None or "head_dim_v != head_dim" in features
    head_dim_v = pick("head_dim_v", st.just(head_dim) | dims if other_dim_v else st.just(head_dim))
    heads_kv = pick("heads_kv", st.integers(1, 3))
    groups = st.integers(1, 4) if features is None or "GQA" in features else st.just(1)
    heads_q = pick("heads_q", groups.map(lambda group: group * heads_kv))
    varlen = pick("varlen", st.booleans(), "varlen")
    pair = st.tuples(_lengths(longest), _lengths(longest))
    if varlen:
        lengths = pick("lengths", st.lists(pair, min_size=0, max_size=sequences).map(tuple))
    else:
        lengths = pick(
            "lengths", st.builds(lambda batch, pair: (pair,) * batch, st.integers(1, min(3, sequences)), pair)
        )

    if used_sides is None:
        has_used = features is None or "seqused" in features
        used_sides = draw(st.tuples(st.booleans(), st.booleans())) if has_used else (False, False)
    used = tuple(
        st.tuples(*(st.integers(0, pair[side]) for pair in lengths)) if used_sides[side] else st.none()
        for side in (0, 1)
    )
    tail = st.tuples(st.sampled_from((0, 1, 70)), st.sampled_from((0, 1, 70))) if varlen else st.just((0, 0))
    edge = st.none() | st.sampled_from((0, 1, 63, 64, 65)) | st.integers(0, longest) | st.just(-1)
    return Case(
        dtype=pick("dtype", st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads_q=heads_q,
        heads_kv=heads_kv,
        lengths=lengths,
        varlen=varlen,
        used=pick("used", st.tuples(*used) if any(used_sides) else st.none()),
        tail=pick("tail", tail),
        causal=pick("causal", st.booleans(), "window or causal"),
        window=pick("window", st.just((None, None)) | st.tuples(edge, edge), "window or causal"),
        softmax_scale=pick("softmax_scale", st.none() | st.sampled_from((1.0, 0.03125, 0.3))),
        softcap=pick("softcap", st.just(0.0) | st.sampled_from((0.5, 5.0, 50.0)), "softcap"),
        sink=pick("sink", st.sampled_from(SINKS), "sink"),
        sink_dtype=pick("sink_dtype", st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        rescale_threshold=pick("rescale_threshold", st.sampled_from((8.0, 0.0, 1.0)) | st.floats(0.0, 8.0)),
        deterministic=pick("deterministic", st.booleans()),
        hints=pick("hints", st.sampled_from(("none", "exact", "tenfold")) if varlen else st.just("none")),
        storage=pick("storage", st.sampled_from(STORAGES)),
        scores=pick("scores", st.sampled_from(SCORES)),
        seed=pick("seed", st.integers(0, 2**31 - 1)),
    )


@dataclass(frozen=True)
class InvalidCall:
    """A valid call with one argument made wrong, the exception that must follow and the argument it must name.

    `in_contents`: what is wrong are an index tensor's contents, which on a GPU are read under DISPATCH_CHECK=1 only.
    """

    case: Case
    argument: str
    change: str
    error: type[Exception]
    wrong: Callable[[dict[str, Any]], Any]
    in_contents: bool = False

    def __repr__(self) -> str:
        return f"InvalidCall({self.case!r}, {self.argument} = {self.change})"

    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The call's arguments by name, with the wrong one in its place."""
        call = self.case.build(device)
        arguments = {"q": call.q, "k": call.k, "v": call.v, **call.options}
        return {**arguments, self.argument: self.wrong(arguments)}


def _replaced(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: value


@st.composite
def invalid_calls(draw: st.DrawFn, **fixed: Any) -> InvalidCall:
    """Draws a call that must be refused before anything runs. `fixed` are fields of its Case (see `cases`)."""
    heads_kv = 2
    fixed = {"longest": 20, "max_head_dim": 64, "heads_kv": heads_kv, "heads_q": 4, **fixed}
    case = draw(cases(**fixed))
    nan, inf = math.nan, math.inf
    not_numbers = st.sampled_from(("8", True, [1.0], 1j))
    not_integers = st.sampled_from(("8", True, 1.5, [1]))
    number_errors = [
        ("softmax_scale", st.sampled_from((nan, inf, -inf, 0.0, -0.0)) | st.floats(max_value=0.0), ValueError),
        ("softmax_scale", not_numbers, TypeError),
        ("softcap", st.sampled_from((nan, inf)) | st.floats(max_value=0.0, exclude_max=True), ValueError),
        ("softcap", not_numbers, TypeError),
        ("rescale_threshold", st.just(nan) | st.floats(min_value=8.0, exclude_min=True), ValueError),
        ("rescale_threshold", st.floats(max_value=0.0, exclude_max=True), ValueError),
        ("rescale_threshold", not_numbers, TypeError),
        ("window", st.tuples(st.integers(-1000, -2), st.none()), ValueError),
        ("window", st.tuples(st.none(), st.integers(-1000, -2)), ValueError),
        ("window", st.tuples(not_integers, st.none()), TypeError),
        ("window", st.sampled_from(((1,), (1, 2, 3), 5, None)), ValueError),
        ("causal", st.sampled_from((0, 1, None, "yes")), TypeError),
        ("deterministic", st.sampled_from((0, 1, None, "yes")), TypeError),
        ("backend", st.sampled_from(("cuda", "", "Triton", "flash")), ValueError),
        ("backend", st.sampled_from((None, 0)), TypeError),
    ]
    if case.varlen:
        number_errors += [
            ("max_seqlen_k", st.integers(-100, -1), ValueError),
            ("max_seqlen_q", not_integers, TypeError),
        ]

    def tensor_error(
        argument: str, change: str, error: type[Exception], of: Callable[[Tensor], Any], in_contents: bool = False
    ) -> InvalidCall:
        return InvalidCall(case, argument, change, error, lambda arguments: of(arguments[argument]), in_contents)

    dim = draw(st.integers(1, 300).filter(lambda d: d != case.head_dim))
    heads = draw(st.integers(1, 9).filter(lambda h: h != heads_kv))
    q_dtype = draw(st.sampled_from((torch.int32, torch.bool, torch.complex64)))
    tensor_errors = [
        tensor_error("q", f"a {q_dtype} tensor", TypeError, lambda t: torch.zeros_like(t, dtype=q_dtype)),
        tensor_error("k", "a tensor of another dtype", TypeError, lambda t: t.to(torch.float64)),
        tensor_error("v", "a list", TypeError, lambda t: [1.0]),
        tensor_error("q", "a flat tensor", ValueError, lambda t: t.flatten()),
        tensor_error("k", "with one more dimension", ValueError, lambda t: t[None]),
        tensor_error("k", f"head_dim {dim}", ValueError, lambda t: t.new_zeros((*t.shape[:-1], dim))),
        tensor_error("v", "head_dim 257", ValueError, lambda t: t.new_zeros((*t.shape[:-1], 257))),
        tensor_error("v", "head_dim 0", ValueError, lambda t: t[..., :0]),
        tensor_error("v", f"{heads} heads", ValueError, lambda t: t.new_zeros((*t.shape[:-2], heads, t.shape[-1]))),
        tensor_error(
            "v", "one key more", ValueError, lambda t: t.new_zeros((*t.shape[:-3], t.shape[-3] + 1, *t.shape[-2:]))
        ),
        InvalidCall(case, "sink", "five logits for four heads", ValueError, lambda a: a["q"].new_zeros(5)),
        InvalidCall(case, "sink", "integers", TypeError, lambda a: a["q"].new_zeros(4, dtype=torch.int64)),
        InvalidCall(
            case, "seqused_k", "int64", TypeError, lambda a: a["q"].new_zeros(len(case.lengths), dtype=torch.int64)
        ),
        InvalidCall(
            case, "seqused_q", "a wrong length", ValueError,
            lambda a: a["q"].new_zeros(len(case.lengths) + 1, dtype=torch.int32),
        ),
    ]  # fmt: skip
    if case.varlen:
        tensor_errors += [
            tensor_error("cu_seqlens_q", "int64", TypeError, lambda t: t.long()),
            tensor_error("cu_seqlens_k", "missing", ValueError, lambda t: None),
            tensor_error("cu_seqlens_k", "one entry too many", ValueError, lambda t: torch.cat((t, t[-1:]))),
            tensor_error("cu_seqlens_q", "starting at 1", ValueError, lambda t: t + 1, True),
            tensor_error("cu_seqlens_k", "past the rows", ValueError, lambda t: torch.cat((t[:-1], t[-1:] + 99)), True),
        ]

    def number_error(entry: tuple[str, st.SearchStrategy, type[Exception]]) -> st.SearchStrategy[InvalidCall]:
        argument, values, error = entry
        return values.map(lambda value: InvalidCall(case, argument, repr(value), error, _replaced(value)))

    return draw(st.sampled_from(tensor_errors) | st.sampled_from(number_errors).flatmap(number_error))
