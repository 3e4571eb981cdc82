"""The kernels for KV caches as compiled for each architecture: bfloat16 and fp8 caches, splits, appends, prefill.

The interpreter knows neither the asynchronous copies nor the tensor cores, and no bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")

from fa4_core import kvcache, problem  # noqa: E402
from fa4_core.checks import compare, expected  # noqa: E402

from .launcher import TRITON_TOLERATES, launch_triton  # noqa: E402
from .triton_backend import emulated_triton  # noqa: E402

CAPABILITIES = (80, 90, 100, 120)
INT32 = torch.int32


@functools.cache
def _plans(capability: int):
    """Plans of their own for each target: a compiled kernel belongs to one."""
    from fa4_triton import decode_launch

    return functools.cache(decode_launch._plan.__wrapped__)


@contextmanager
def emulated_cache(capability: int, seed: int, tolerate=TRITON_TOLERATES) -> Iterator[list[str]]:
    """`emulated_triton` for the calls on KV caches; gives the names of the kernels that ran."""
    from fa4_triton import decode_launch as host
    from fa4_triton import launch

    ran = []

    def run(plan, device, grid, arguments, layout):
        if grid == 0:
            return
        args = arguments(False)
        if layout not in plan.compiled:
            plan.compiled[layout] = host.compile_planned(plan, args, launch.target_of(device), layout)
        named = dict(zip(plan.kernel.arg_names, args))
        launch_triton(plan.compiled[layout], (grid,), named, seed=seed, tolerate=tolerate)
        ran.append(plan.kernel.__name__)

    original = host._launch, host._plan
    with emulated_triton(capability, seed=seed, tolerate=tolerate):
        host.forget()
        host._launch, host._plan = run, _plans(capability)
        try:
            yield ran
        finally:
            host._launch, host._plan = original
            host.forget()


def draw(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def paged(rows, lengths, page, spare=2, poison=float("nan")):
    """(pages, table) of (batch, n, heads, dim) rows: pages in reverse order, NaN where no valid row is."""
    batch, longest = len(lengths), max(lengths) + spare
    per = -(-longest // page)
    table = torch.arange(batch * per).flip(0).view(batch, per).to(INT32)
    pages = torch.full((batch * per, page, *rows.shape[2:]), poison, dtype=torch.float32).to(rows.dtype)
    for b, n in enumerate(lengths):
        for i in range(n):
            pages[table[b, i // page], i % page] = rows[b, i]
    return pages, table


def require(out, lse, want):
    for name, got in (("out", out), ("lse", lse)):
        found = compare(name, got, want[name])
        assert found.passed, found.message


@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_appended_step_over_split_sequences(capability, page):
    """Two query rows, GQA; one sequence of several chunks, one that only has what is appended. A chunk's part that is
    read before it is written is a race, and poison where no key is shows."""
    lengths, new = [1100, 2], 2
    q, k, v = draw(2, 2, 4, 64, seed=0), draw(2, 1100, 2, 64, seed=1), draw(2, 1100, 2, 64, seed=2)
    used = torch.tensor(lengths, dtype=INT32)
    kept = [n - new for n in lengths]
    options = {}
    if page:
        (k_cache, table), (v_cache, _) = (paged(t, kept, page) for t in (k, v))
        options["page_table"] = table
    else:
        k_cache, v_cache = (torch.full((2, 1110, 2, 64), float("nan"), dtype=torch.bfloat16) for _ in range(2))
        for b, n in enumerate(kept):
            k_cache[b, :n], v_cache[b, :n] = k[b, :n], v[b, :n]
    at = (used - new)[:, None] + torch.arange(new)
    k_new, v_new = (t[torch.arange(2)[:, None], at] for t in (k, v))
    with emulated_cache(capability, seed=page) as ran:
        out, lse = dispatch.attention_with_kvcache(
            q, k_cache, v_cache, k_new, v_new, cache_seqlens=used - new, causal=True, return_lse=True,
            backend="triton", **options,
        )  # fmt: skip
    assert ran == ["append_rows", "attention_decode"]
    require(out, lse, expected(q, k, v, seqused_k=used, causal=True))


@pytest.mark.parametrize("page", [0, 8, 128])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_program_that_ends_one_split_sequence_and_begins_another(capability, page):
    """It says of both at once that its parts are written; with two sequences for three programs one of them does."""
    lengths = [650, 700]
    q, k, v = draw(2, 1, 3, 64, seed=9), draw(2, 700, 1, 64, seed=10), draw(2, 700, 1, 64, seed=11)
    used = torch.tensor(lengths, dtype=INT32)
    options = {}
    k_cache, v_cache = k, v
    if page:
        (k_cache, table), (v_cache, _) = (paged(t, lengths, page) for t in (k, v))
        options["page_table"] = table
    with emulated_cache(capability, seed=page):
        out, lse = dispatch.attention_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=used, return_lse=True, backend="triton", **options
        )
    require(out, lse, expected(q, k, v, seqused_k=used))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_fp8_cache_with_a_window_a_cap_and_a_sink(capability):
    fp8 = torch.float8_e4m3fn
    q, k, v = draw(1, 1, 4, 64, seed=3), draw(1, 300, 1, 64, seed=4).to(fp8), draw(1, 300, 1, 64, seed=5).to(fp8)
    scales = torch.tensor([1.5]), torch.tensor([0.7])
    used, sink = torch.tensor([290], dtype=INT32), torch.linspace(-1, 1, 4)
    options = {"window": (200, 0), "softcap": 20.0, "sink": sink}
    with emulated_cache(capability, seed=1):
        out, lse = dispatch.attention_with_kvcache(
            q, k, v, cache_seqlens=used, k_descale=scales[0], v_descale=scales[1], return_lse=True, backend="triton",
            **options,
        )  # fmt: skip
    require(out, lse, expected(q, k.float() * 1.5, v.float() * 0.7, seqused_k=used, **options))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_packed_prompt_on_pages(capability):
    lengths_q, lengths_k = [70, 1], [150, 90]
    q, k, v = draw(2, 70, 2, 64, seed=6), draw(2, 150, 1, 64, seed=7), draw(2, 150, 1, 64, seed=8)
    used = torch.tensor(lengths_k, dtype=INT32)
    (k_pages, table), (v_pages, _) = (paged(t, lengths_k, 16) for t in (k, v))
    packed = torch.cat([q[0], q[1, :1]])
    cu = torch.tensor([0, 70, 71], dtype=INT32)
    with emulated_cache(capability, seed=2) as ran:
        out, lse = dispatch.attention(
            packed, k_pages, v_pages, causal=True, cu_seqlens_q=cu, seqused_k=used, page_table=table, return_lse=True,
            backend="triton",
        )  # fmt: skip
    assert ran == ["attention_prefill"]
    want = expected(q, k, v, seqused_q=torch.tensor(lengths_q, dtype=INT32), seqused_k=used, causal=True)
    for b, rows in enumerate((slice(0, 70), slice(70, 71))):
        n = lengths_q[b]
        for name, got in (("out", out[rows]), ("lse", lse[:, rows])):
            value, budget = want[name]
            cut = (value[b, :n], budget[b, :n]) if name == "out" else (value[b, :, :n], budget[b, :, :n])
            found = compare(name, got, want[name]._replace(value=cut[0], budget=cut[1]))
            assert found.passed, found.message


WILD = (2**31 - 1, -(2**31), -1, 99, 2**30, 0, 1, 3)


def wild(seed, *shape):
    """Numbers that no length and no index should be, among some that they are."""
    at = torch.randint(0, len(WILD), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(WILD, dtype=INT32)[at]


def wild_places(where, seed, batch):
    """Lengths, and where sequences lie: in `rows` of a contiguous cache, behind a `leftpad` there, or in `pages`."""
    options = {"cache_seqlens": wild(seed, batch)}
    if where == "pages":
        options["page_table"] = wild(seed + 10, batch, 3)
    else:
        options["cache_batch_idx"] = wild(seed + 10, batch)
    if where == "leftpad":
        options["cache_leftpad"] = wild(seed + 20, batch)
    return options


@pytest.fixture
def unread_contents(monkeypatch):
    """Index tensors that nobody checks, as on a GPU."""
    for module in (kvcache, problem):
        monkeypatch.setattr(module, "contents_are_checked", lambda device: False)


@pytest.mark.parametrize("where", ["rows", "leftpad", "pages"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_wild_length_or_index_leads_a_step_out_of_its_tensors(capability, where, unread_contents):
    """What memcheck would say of the compiled kernels: here no memory exists but that of the arguments."""
    batch, new, blocks = 6, 2, 1 if where == "leftpad" else 3
    angles = torch.rand(7, 16)
    for seed in range(2):
        q, k, v = draw(batch, new, 4, 64, seed=0), draw(batch, new, 2, 64, seed=1), draw(batch, new, 2, 64, seed=2)
        k_cache, v_cache = draw(blocks, 16, 2, 64, seed=3), draw(blocks, 16, 2, 64, seed=4)
        options = wild_places(where, seed, batch)
        with emulated_cache(capability, seed=seed) as ran:
            out, lse = dispatch.attention_with_kvcache(
                q, k_cache, v_cache, k, v, rotary_cos=angles.cos(), rotary_sin=angles.sin(), causal=True,
                return_lse=True, backend="triton", **options,
            )  # fmt: skip
        assert ran == ["append_rows", "attention_decode"]
        assert out.isfinite().all()
        assert not lse.isnan().any()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_wild_length_or_index_leads_a_prompt_out_of_its_tensors(capability, unread_contents):
    k, v = draw(4, 16, 1, 64, seed=7), draw(4, 16, 1, 64, seed=8)
    for seed in range(2):
        options = {"seqused_k": wild(seed, 6), "page_table": wild(seed + 10, 6, 2), "causal": True}
        # The least number after the largest one: their difference wraps around. No row is in two sequences.
        ends = torch.tensor([2**31 - 1, -(2**31), 50, 99, -1, 0, -5], dtype=INT32) if seed else wild(seed + 20, 7)
        for layout in ({}, {"cu_seqlens_q": ends}):
            q = draw(*((70,) if layout else (6, 70)), 1, 64, seed=6)
            with emulated_cache(capability, seed=seed) as ran:
                out, lse = dispatch.attention(q, k, v, backend="triton", return_lse=True, **layout, **options)
            assert ran == ["attention_prefill"]
            assert out.isfinite().all()
            assert not lse.isnan().any()
