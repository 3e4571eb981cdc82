"""Who runs the matrix: this project's backends and the libraries to measure against, each saying what it cannot run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa4_core import backends
from fa4_core.bench.cases import Case, DecodeCase

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Cache(NamedTuple):
    """What a decode step reads: q (B, 1, Hq, D), the caches, contiguous or paged, lengths and pages (or None)."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqlens: Tensor
    page_table: Tensor | None


def make_sink(case: Case, device: torch.device) -> Tensor | None:
    """The case's sink, N(0, 1) and the same for everyone, in its dtype; None where it has none."""
    if not case.sink:
        return None
    return torch.randn(case.heads_q, generator=torch.Generator().manual_seed(0)).to(device, case.torch_dtype)


def make_cu_seqlens(case: Case, device: torch.device) -> Tensor | None:
    """Where the packed sequences of a case begin and end, int32; None where it is dense."""
    if case.mean_length is None:
        return None
    ends = torch.tensor((0, *case.packed_lengths)).cumsum(0)
    return ends.to(device, torch.int32)


class Contestant(ABC):
    """One implementation in the race."""

    name: str
    heads_first: bool = False
    """Whether it takes (B, H, S, D). It is then handed transposed views: the memory is (B, S, H, D) for everyone."""
    compiles: bool = False
    """Whether its first call compiles into a cache on disk, which other processes can fill ahead."""
    distribution: str | None = None
    """Its package on PyPI, whose version goes into the result file; None for what torch or this project brings."""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on `device` at all, or None."""

    @abstractmethod
    def refusal(self, case: Case, backward: bool) -> str | None:
        """Why it cannot run `case`, or None."""

    @abstractmethod
    def function(self, case: Case) -> Function:
        """Attention as this case needs it: (q, k, v) -> out. May import and compile; is called once a case.

        The tensors of a packed case are (total, heads, head_dim).
        """

    def decode_refusal(self, case: DecodeCase) -> str | None:
        """Why it cannot run a decode step, or None."""
        return "has no decode step"

    def decode(self, case: DecodeCase) -> Callable[[Cache], Tensor]:
        """One decode step as this case needs it: the result is (B, 1, Hq, D)."""
        raise NotImplementedError

    def context(self) -> contextlib.AbstractContextManager:
        """Surrounds the calls; entered once, so it costs no call its time."""
        return contextlib.nullcontext()


class Dispatch(Contestant):
    """This project's `attention`, one named backend."""

    compiles = True

    def __init__(self, attention: Callable, backend: str, with_kvcache: Callable | None = None) -> None:
        self.name = backend
        self._attention = attention
        self._with_kvcache = with_kvcache

    def unavailable(self, device: torch.device) -> str | None:
        return backends.load(self.name).unavailable(device)

    def refusal(self, case: Case, backward: bool) -> str | None:
        return None  # a problem that the backend does not serve raises, and the row records what it says

    def function(self, case: Case) -> Function:
        options = {"causal": case.causal, "window": (case.window, None), "backend": self.name}
        if not case.is_plain:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            options |= {"softcap": float(case.softcap), "sink": make_sink(case, device)}
            cu_seqlens = make_cu_seqlens(case, device)
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return functools.partial(self._attention, **options)

    def decode_refusal(self, case: DecodeCase) -> str | None:
        if not backends.load(self.name).serves_kv_cache:
            return "serves no KV cache"
        return None if self._with_kvcache is not None else "no attention_with_kvcache was given"

    def decode(self, case: DecodeCase) -> Callable[[Cache], Tensor]:
        attend = self._with_kvcache
        assert attend is not None

        def run(cache: Cache) -> Tensor:
            return attend(cache.q, cache.k, cache.v, cache_seqlens=cache.seqlens, page_table=cache.page_table,
                          backend=self.name)  # fmt: skip

        return run


class Sdpa(Contestant):
    """torch's scaled_dot_product_attention, one of its backends."""

    heads_first = True

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name = name
        self._backend = backend

    def unavailable(self, device: torch.device) -> str | None:
        if self._backend != SDPBackend.MATH and device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        return None

    def refusal(self, case: Case, backward: bool) -> str | None:
        if case.mean_length is not None:
            return "has no packed sequences"
        if case.softcap or case.sink:
            return f"has no {'softcap' if case.softcap else 'sink'}"
        if case.window is not None:
            return "has no window but through a dense mask"
        if case.causal and case.seqlen_q != case.seqlen_k:
            return "aligns causal top-left"
        if case.dtype == "fp32" and self._backend != SDPBackend.MATH:
            return "has no float32"
        return None

    def function(self, case: Case) -> Function:
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=case.causal,
            enable_gqa=case.heads_q != case.heads_kv,
        )

    def decode_refusal(self, case: DecodeCase) -> str | None:
        if case.page or case.capacity or case.longest:
            return "has no lengths and no pages"
        return None

    def decode(self, case: DecodeCase) -> Callable[[Cache], Tensor]:
        def run(cache: Cache) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (cache.q, cache.k, cache.v))
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, enable_gqa=case.heads_q != case.heads_kv).transpose(1, 2)

        return run

    def context(self) -> contextlib.AbstractContextManager:
        return sdpa_kernel(self._backend)


class FlashAttention3(Contestant):
    """FlashAttention-3 as the package fa3-fwd builds it; what the build left out, it refuses."""

    name = "fa3"
    distribution = "fa3-fwd"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if importlib.util.find_spec("fa3_fwd_interface") is None:
            return "the package fa3-fwd is not installed"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "is built for compute capability 9.0"
        return None

    def refusal(self, case: Case, backward: bool) -> str | None:
        flags = importlib.import_module("fa3_fwd_config").CONFIG["build_flags"]
        needed = {"BACKWARD": backward, "LOCAL": case.window is not None, "FP16": case.dtype == "fp16"}
        needed |= {"SOFTCAP": bool(case.softcap), "VARLEN": case.mean_length is not None}
        if case.sink:
            return "has no sink"
        left_out = [name for name, need in needed.items() if need and flags.get(f"FLASHATTENTION_DISABLE_{name}")]
        if left_out:
            return f"this build leaves out {', '.join(left_out).lower()}"
        return "has no float32" if case.dtype == "fp32" else None

    def function(self, case: Case) -> Function:
        module = importlib.import_module("fa3_fwd_interface")
        window = (-1, -1) if case.window is None else case.window_pair
        options = {"causal": case.causal, "window_size": window, "softcap": float(case.softcap)}
        if case.mean_length is None:
            return functools.partial(module.flash_attn_func, **options)
        cu_seqlens, longest = make_cu_seqlens(case, torch.device("cuda")), max(case.packed_lengths)
        packed = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        return functools.partial(module.flash_attn_varlen_func, **packed, **options)

    def decode_refusal(self, case: DecodeCase) -> str | None:
        flags = importlib.import_module("fa3_fwd_config").CONFIG["build_flags"]
        if case.page and flags["FLASHATTENTION_DISABLE_PAGEDKV"]:
            return "this build leaves out pagedkv"
        return None

    def decode(self, case: DecodeCase) -> Callable[[Cache], Tensor]:
        attend = importlib.import_module("fa3_fwd_interface").flash_attn_with_kvcache
        return lambda cache: attend(cache.q, cache.k, cache.v, cache_seqlens=cache.seqlens, page_table=cache.page_table)


class FlashAttention4(Contestant):
    """FlashAttention-4, the package flash-attn-4."""

    name = "fa4"
    distribution = "flash-attn-4"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return "the package flash-attn-4 is not installed"
        return None

    def refusal(self, case: Case, backward: bool) -> str | None:
        return "has no float32" if case.dtype == "fp32" else None

    def function(self, case: Case) -> Function:
        module = importlib.import_module("flash_attn.cute")
        left, right = (None if side < 0 else side for side in case.window_pair)
        # A window and causal=True exclude each other there: right = 0 says the same.
        options = {"causal": case.causal} if case.window is None else {"window_size": (left, right)}
        attend = module.flash_attn_func
        if not case.is_plain:
            device = torch.device("cuda")
            options |= {"softcap": float(case.softcap), "learnable_sink": make_sink(case, device)}
            # Its default looks at both head dimensions.
            options["softmax_scale"] = case.head_dim**-0.5
            if case.mean_length is not None:
                cu_seqlens, longest = make_cu_seqlens(case, device), max(case.packed_lengths)
                options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
                options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
                attend = module.flash_attn_varlen_func

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, **options)[0]

        return run

    def decode_refusal(self, case: DecodeCase) -> str | None:
        if case.page or case.capacity or case.longest:
            return "has no KV-cache call; its dense call has no lengths"
        return None

    def decode(self, case: DecodeCase) -> Callable[[Cache], Tensor]:
        attend = importlib.import_module("flash_attn.cute").flash_attn_func
        return lambda cache: attend(cache.q, cache.k, cache.v)[0]


class Flex(Contestant):
    """torch's FlexAttention, compiled for each shape: with dynamic shapes it takes a path 30 times slower."""

    name = "flex"
    heads_first = True
    compiles = True

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"runs on CUDA devices, not on {device.type}"

    def refusal(self, case: Case, backward: bool) -> str | None:
        if case.mean_length is not None:
            return "has no packed sequences but through a mask of documents"
        return f"has no {'softcap' if case.softcap else 'sink'} of its own" if case.softcap or case.sink else None

    def function(self, case: Case) -> Function:
        import torch._dynamo
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        # The backward is timed alone, over one forward's saved tensors: it must not take them as its scratch space.
        torch._functorch.config.donated_buffer = False
        left, right = case.window_pair
        shift = case.seqlen_k - case.seqlen_q

        def visible(batch, head, i, j):
            diagonal = i + shift
            if left < 0:
                return j <= diagonal + right
            below = j >= diagonal - left
            return below if right < 0 else below & (j <= diagonal + right)

        mask = None
        if (left, right) != (-1, -1):
            mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return functools.partial(compiled, block_mask=mask, enable_gqa=case.heads_q != case.heads_kv)


def all_contestants(attention: Callable, with_kvcache: Callable | None = None) -> dict[str, Contestant]:
    """Every contestant by name, in the order of the tables.

    Args:
        attention: `dispatch.attention`.
        with_kvcache: `dispatch.attention_with_kvcache`; without it the suite "decode" has none of this project.
    """
    contestants = (
        Dispatch(attention, "triton", with_kvcache),
        Dispatch(attention, "cute", with_kvcache),
        Dispatch(attention, "reference", with_kvcache),
        Sdpa("fa2", SDPBackend.FLASH_ATTENTION),
        Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("math", SDPBackend.MATH),
        FlashAttention3(),
        FlashAttention4(),
        Flex(),
    )
    return {contestant.name: contestant for contestant in contestants}


RACE = ("triton", "cute", "fa2", "cudnn", "fa3", "fa4", "flex")
"""Who runs by default on a GPU. `reference` and `math` are there for machines without one."""


def version(contestant: Contestant) -> str | None:
    """The installed version of its package, or None where it has none of its own or is not installed."""
    if contestant.distribution is None:
        return None
    try:
        return metadata.version(contestant.distribution)
    except metadata.PackageNotFoundError:
        return None
