"""Exact attention, forward and backward, on any NVIDIA GPU: `from dispatch import attention`.

`attention` computes softmax(scale * q k^T) v and its gradients through the fastest kernel that serves the problem;
`explain` says which one that is and why each other one is not; `python -m dispatch` is the command line. Semantics in
docs/semantics.md. Importing this module imports no kernel: each backend loads on its first use.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from fa4_core import backends, kvcache, merge, ops
from fa4_core.kvcache import CacheOptions
from fa4_core.problem import (
    DEFAULT_RESCALE_THRESHOLD,
    UNBOUNDED,
    Inputs,
    Kinds,
    Options,
    check_contents,
    check_signature,
    check_types,
    signature_of,
)

if TYPE_CHECKING:
    from fa4_core.backends import Backend
    from fa4_core.kvcache import CacheProblem

__all__ = ["Choice", "attention", "attention_with_kvcache", "explain", "merge_attention"]
__version__ = "0.1.0"

BackendName = Literal["auto", "triton", "cute", "reference"]
Window = tuple[int | None, int | None]
Default = TypeVar("Default", float, None)
Checked = TypeVar("Checked")

AUTO_ORDER = {"cuda": ("cute", "triton"), "cpu": ("reference",)}
"""What `auto` tries on a device type, in this order. The reference is never an automatic choice on a GPU."""


@dataclass(frozen=True)
class Choice:
    """What `auto` (or the named backend) runs, and for each backend that does not run, why.

    backward: the backend that computes the gradients, which need not be the forward's; None where it cannot, as
    `reasons` says.
    """

    backend: str
    reasons: dict[str, str]
    backward: str | None

    def __str__(self) -> str:
        chosen = f"runs on {self.backend}"
        if self.backward is None:
            chosen += ", without gradients"
        elif self.backward != self.backend:
            chosen += f", its gradients on {self.backward}"
        return "\n".join([chosen, *(f"not {name}: {why}" for name, why in self.reasons.items())])


class UnsupportedError(NotImplementedError):
    """No backend, or not the one named, serves the problem; the message names what is missing."""


def _objection(name: str, kinds: Kinds, device: torch.device, cache: CacheProblem | None = None) -> str | None:
    """Why the backend cannot serve the problem, or the KV-cache call, or None."""
    backend = backends.load(name)
    why = backend.unavailable(device)
    if why is not None:
        return why
    if kinds.kv_cache and not backend.serves_kv_cache:
        return "does not support a KV cache"
    missing = backend.missing(kinds, device) if cache is None else backend.missing_cache(cache)
    return f"does not support {', '.join(missing)}" if missing else None


def _choose(kinds: Kinds, device: torch.device, name: str, cache: CacheProblem | None = None) -> Backend:
    """The backend that runs the problem, or the KV-cache call.

    Raises:
        ValueError: there is no backend called `name`.
        NotImplementedError: the named backend, or every automatic one, cannot serve; the message says why.
    """
    if name != "auto":
        backend = backends.load(name)
        why = _objection(name, kinds, device, cache)
        if why is not None:
            raise UnsupportedError(f"backend={name!r}: {why}")
        return backend
    reasons = []
    for candidate in AUTO_ORDER.get(device.type, ()):
        why = _objection(candidate, kinds, device, cache)
        if why is None:
            return backends.load(candidate)
        reasons.append(f"{candidate}: {why}")
    raise UnsupportedError(
        f"no backend serves this problem on {device.type}: "
        + ("; ".join(reasons) or "it has no kernels of ours; name backend='reference' for plain PyTorch")
    )


ops.set_chooser(_choose)


def _float(name: str, value: float | None, default: Default) -> float | Default:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, accepted are numbers or None")
    return value


def _bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, accepted is a bool")
    return value


def _side(side: str, value: int | None) -> int:
    if value is None:
        return UNBOUNDED
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"window: {side} is a {type(value).__name__}, accepted are integers or None")
    if value > sys.maxsize:  # what an operator's integer holds
        raise ValueError(f"window: {side} is {value}, accepted are integers up to {sys.maxsize}, None: unbounded")
    return value


def _pair(window: Window) -> Window:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, accepted is a pair (left, right)")
    return window


def _window(left: int | None, right: int | None, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; causal caps right at 0."""
    left, right = _side("left", left), _side("right", right)
    if right < UNBOUNDED:
        raise ValueError(f"window: right is {right}, accepted are integers >= 0, and None or -1 for unbounded")
    return left, 0 if causal else right


def _options(
    max_seqlen_q, max_seqlen_k, softmax_scale, softcap, causal, left, right, rescale_threshold, deterministic, backend,
    return_lse,
) -> Options:  # fmt: skip
    """The call's options, with every Python type checked; numbers are checked with the tensors' shapes."""
    _bool("return_lse", return_lse)
    for name, hint in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if hint is not None and (isinstance(hint, bool) or not isinstance(hint, int)):
            raise TypeError(f"{name}: got {type(hint).__name__}, accepted are integers or None")
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, accepted is a str")
    scale = _float("softmax_scale", softmax_scale, None)
    if scale != scale:  # NaN, in a form that torch.compile can trace
        raise ValueError(f"softmax_scale: got {scale}, accepted are finite numbers > 0 or None")
    left, right = _window(left, right, _bool("causal", causal))
    softcap = _float("softcap", softcap, 0.0)
    threshold = _float("rescale_threshold", rescale_threshold, DEFAULT_RESCALE_THRESHOLD)
    deterministic = _bool("deterministic", deterministic)
    return Options(max_seqlen_q, max_seqlen_k, scale, softcap, left, right, threshold, deterministic, backend)


def _cache_options(
    softmax_scale, softcap, causal, left, right, rotary_interleaved, num_splits, backend, return_lse
) -> CacheOptions:
    """As `_options`, for `attention_with_kvcache`."""
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: got {type(num_splits).__name__}, accepted are integers")
    interleaved = _bool("rotary_interleaved", rotary_interleaved)
    scored = _options(None, None, softmax_scale, softcap, causal, left, right, None, False, backend, return_lse)
    return CacheOptions(
        scored.softmax_scale, scored.softcap, scored.window_left, scored.window_right, interleaved, num_splits, backend
    )


def _remembered(check: Callable[..., Checked]) -> Callable[..., Checked]:
    """A check of options, remembered: calls have few, and again and again the same."""
    known = functools.lru_cache(maxsize=1024, typed=True)(check)  # by type, too: 1 is no True
    is_traced = torch.compiler.is_dynamo_compiling

    def checked(*args) -> Checked:
        if not is_traced():
            try:  # contextlib.suppress would cost as much as the look-up
                return known(*args)
            except TypeError:  # of the check, or of what has no hash
                pass
        return check(*args)

    return checked


_checked_options, _checked_cache_options = _remembered(_options), _remembered(_cache_options)


def _refuse_gradients_of_pages(tensors: tuple) -> None:
    check_types(Inputs._fields, tensors, ("q", "k", "v"))
    kvcache.refuse_gradients(Inputs._fields, tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (None, None),
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    return_lse: bool = False,
    rescale_threshold: float = DEFAULT_RESCALE_THRESHOLD,
    deterministic: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention with gradients for q, k, v and sink.

    Args:
        q: (B, Sq, Hq, D), or (total_q, Hq, D) in varlen; float16, bfloat16 or float32 (float64 on the reference).
        k: (B, Sk, Hkv, D) or (total_k, Hkv, D). Hkv divides Hq; query head h reads KV head h // (Hq / Hkv).
        v: (B, Sk, Hkv, Dv) or (total_k, Hkv, Dv). D and Dv from 1 to 256.
        causal: key j is visible to query i iff j <= i + Sk - Sq (aligned bottom-right).
        window: (left, right): key j is visible iff i + Sk - Sq - left <= j <= i + Sk - Sq + right; None, -1: unbounded.
        softmax_scale: factor of q k^T; None means 1/sqrt(D).
        softcap: c > 0 turns each scaled score s into c * tanh(s / c); 0 or None: off.
        sink: (Hq,), one extra logit a head in the softmax's denominator, natural-log units, not scaled. Differentiable.
        cu_seqlens_q, cu_seqlens_k: (n_seqs + 1,) int32 on q's device; sequence n holds rows cu[n] to cu[n + 1].
        max_seqlen_q, max_seqlen_k: optional hints for varlen; they change no result.
        seqused_q, seqused_k: (B,) or (n_seqs,) int32; only the first so many rows of each sequence take part.
            Query rows past it give O = 0, LSE = -inf and no gradient.
        page_table: (batch, pages) int32, for paged K and V of (n_pages, page_size, Hkv, D or Dv), page_size 1 or a
            multiple of 8: entry (b, p) is the page with keys p * page_size and on of sequence b, which has seqused_k[b]
            of them. q dense or, with cu_seqlens_q alone, varlen. Without gradients.
        return_lse: return (out, lse) instead of out.
        rescale_threshold: the running maximum is followed only when it grows by more than this, in log2 units; 0 to 8,
            0 follows it always. The result is exact either way.
        deterministic: the backward's sums run in a fixed order, too.
        backend: "auto", or one by name, which then runs or raises.

    Returns:
        out, of q's dtype and shape with Dv for D; with `return_lse` also lse, float32, natural log, (B, Hq, Sq) or
        (Hq, total_q). A row that sees no key gives 0 and -inf (or the sink's logit).

    Raises:
        ValueError, TypeError: an argument is not accepted; the message names it, what came and what is accepted.
        NotImplementedError: no backend (or not the one named) serves the problem; the message says what is missing.

    Source: Dao et al., "FlashAttention" (2022); Zadouri et al., "FlashAttention-4" (2026) for the skipped rescaling.
    """
    tensors = (q, k, v, sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)  # as in `Inputs`
    if page_table is not None:
        _refuse_gradients_of_pages(tensors)
    left, right = _pair(window)
    options = _checked_options(
        max_seqlen_q, max_seqlen_k, softmax_scale, softcap, causal, left, right, rescale_threshold, deterministic,
        backend, return_lse,
    )  # fmt: skip
    return ops.attention(tensors, options, return_lse)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
    causal: bool = False,
    window: Window = (None, None),
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    sink: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, if given, and attends over what the cache then holds. No gradients.

    Args:
        q: (B, Sq, Hq, D); float16, bfloat16 or float32 (float64 on the reference).
        k_cache, v_cache: (cache batch, capacity, Hkv, D and Dv), or with a page_table (n_pages, page_size, Hkv, D and
            Dv), page_size 1 or a multiple of 8; of q's dtype or float8_e4m3fn. The last dimension is contiguous.
        k, v: (B, new, Hkv, D and Dv), of q's dtype; sequence b's rows go to cache_seqlens[b] and on. One that would not
            fit is refused where the host knows its length, and leaves the cache as it is elsewhere.
        cache_seqlens: rows in each sequence's cache before the call, padded ones included: an int, or (B,) int32 on q's
            device.
        page_table: (B, pages) int32: entry (b, p) is the page with rows p * page_size and on of sequence b.
        cache_batch_idx: (B,) int32: the row of a contiguous cache that is sequence b's; by default b.
        cache_leftpad: (B,) int32: so many first rows of the cache are no keys.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), floating point of 16 bits or more: k and q are rotated
            before their use. New row i stands at position cache_seqlens + i, padding counted; so does query row i under
            causal or a window, and without either all query rows stand at the first position.
        rotary_interleaved: columns 2i and 2i + 1 are rotated together; else i and i + rotary_dim / 2.
        k_descale, v_descale: (B, Hkv) or (Hkv,) float32: an fp8 cache's elements stand for so many times their value.
        out: where to put the result, of its shape and q's dtype; its last dimension is contiguous.
        causal, window, softmax_scale, softcap, sink: as in `attention`, over all keys, the appended ones included.
        num_splits: into how many parts the keys of a sequence are split, up to 64; 0 chooses by each sequence's own
            length, so that no result depends on the rest of the batch.
        return_lse: return (out, lse) instead of out.
        backend: "auto", or one by name, which then runs or raises.

    Returns:
        out (B, Sq, Hq, Dv); with `return_lse` also lse, (B, Hq, Sq) float32, natural log.

    Raises:
        ValueError, TypeError, NotImplementedError: as `attention`; the cache is then untouched.

    Source: the interface is that of flash-attn's `flash_attn_with_kvcache`.
    """
    length = lengths = None
    if isinstance(cache_seqlens, Tensor):
        lengths = cache_seqlens
    elif isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        length = cache_seqlens
    else:
        raise TypeError(f"cache_seqlens: got {type(cache_seqlens).__name__}, accepted are an int and a torch.Tensor")
    inputs = kvcache.CacheInputs(
        q, k_cache, v_cache, k, v, lengths, page_table, cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin,
        k_descale, v_descale, sink,
    )  # fmt: skip
    left, right = _pair(window)
    options = _checked_cache_options(
        softmax_scale, softcap, causal, left, right, rotary_interleaved, num_splits, backend, return_lse
    )
    out, lse = kvcache.attend(inputs, out, length, options, return_lse)
    return out if lse is None else (out, lse)


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merges attention over parts of the keys into attention over all of them. Differentiable in every argument.

    Args:
        outs: for each part its output, (B, Sq, H, Dv) or (total_q, H, Dv), of one dtype.
        lses: for each part its log-sum-exp, (B, H, Sq) or (H, total_q), computed without a sink: one that holds a sink
            does not merge.
        sink: (H,), added to the whole once, here; as in `attention`.

    Returns:
        (out, lse): out of the parts' dtype; lse float32 (float64 for float64 parts). Sums run in the parts' order.

    Raises:
        ValueError, TypeError: an argument is not accepted; the message names it.

    Source: Dao et al., "FlashAttention" (2022), the softmax of a concatenation.
    """
    merge.check_parts(outs, lses, sink)
    return merge.merge(outs, lses, sink)


def explain(q: Tensor, k: Tensor, v: Tensor, **options) -> Choice:
    """Which backend `attention` would run for the same arguments, and why not each other one. Nothing is computed.

    Args:
        q, k, v, options: as `attention` takes them.

    Raises:
        ValueError, TypeError, NotImplementedError: as `attention` would.
    """
    bound = inspect.signature(attention).bind(q, k, v, **options)
    bound.apply_defaults()
    rest = bound.arguments
    inputs = Inputs(*[rest.pop(name) for name in Inputs._fields])
    check_types(Inputs._fields, inputs, ("q", "k", "v"))
    if inputs.page_table is not None:
        _refuse_gradients_of_pages(inputs)
    inputs = ops.autocast(inputs)
    left, right = _pair(rest.pop("window"))
    checked = _options(**rest, left=left, right=right)
    problem = check_signature(signature_of(inputs), checked)
    check_contents(problem, inputs)
    kinds, device, requested = problem.kinds, problem.device, checked.backend
    backend = _choose(kinds, device, requested)
    chosen = backend.name
    others = (name for name in backends.MODULES if name != chosen)
    reasons = {name: _reason(name, chosen, kinds, device, requested) for name in others}
    backward = backend.backward_backend or chosen
    if backward != chosen and _objection(backward, kinds, device) is not None:
        backward = None
    return Choice(chosen, reasons, backward)


def _reason(name: str, chosen: str, kinds: Kinds, device: torch.device, requested: str) -> str:
    """Why `name` does not run where `chosen` does."""
    why = _objection(name, kinds, device)
    if why is not None:
        return why
    if requested != "auto":
        return f"backend={requested!r} was asked for"
    if name not in AUTO_ORDER.get(device.type, ()):
        return f"could serve, but on {device.type} runs only when asked for by name"
    return f"could serve, but {chosen} comes first"


# `import dispatch.attention` works and keeps the name a function: the import system takes what sys.modules holds.
sys.modules[f"{__name__}.attention"] = attention  # type: ignore[assignment]

if __name__ == "__main__":
    from fa4_core.cli import main

    main(sys.modules[__name__])
