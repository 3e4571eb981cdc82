"""Steps over a KV cache in PyTorch and on a GPU: compiled, captured, without synchronisation, at any size."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from caches import FP8, INT32, INTERPRETED, Layout, ThroughCache, a_problem, lay_out, needs_gpu, step_inputs

from dispatch import attention_with_kvcache
from fa4_core import kvcache

pytestmark = pytest.mark.serves("kv_cache")


def test_a_length_that_grows_with_every_step_prepares_nothing_anew(target):
    """Neither a problem nor a launch: a step would cost a hundred microseconds of host time more."""
    q, k, v, _ = a_problem(target, lengths=(50, 50), seqlen_q=1)
    k_cache, v_cache, _ = lay_out(Layout(room=9), k, v, [50, 50])
    new = (k[:, :1], v[:, :1])
    prepared = []
    for n in (50, 51, 52):
        attention_with_kvcache(q, k_cache, v_cache, *new, cache_seqlens=n, backend=target.backend)
        calls = [kvcache._call_of]
        if target.backend != "reference":
            from fa4_cute.decode_launch import _call_of as call_of_cute
            from fa4_triton import decode_launch

            calls += [decode_launch._call_of, decode_launch._append_of, call_of_cute]
        prepared.append([made.cache_info().misses for made in calls])
    assert prepared[0] == prepared[1] == prepared[2]


def test_compile_keeps_the_call_in_one_graph_and_mutates_the_cache(target):
    q, k_cache, v_cache, new, seqlens, _ = step_inputs(target.device, dtype=target.widest)

    def step(q, k_cache, v_cache, seqlens, window):
        out = attention_with_kvcache(
            q * 2, k_cache, v_cache, new, new, cache_seqlens=seqlens, window=(window, None), softmax_scale=0.3,
            backend=target.backend,
        )  # fmt: skip
        return out + 1, k_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for window in (50, 60):
        mine, theirs = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
        want = step(q, *mine, seqlens, window)
        got = compiled(q, *theirs, seqlens, window)
        assert all(map(torch.allclose, got, want))
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(("options", "overload"), [({}, "default"), ({"softmax_scale": 0.3}, "scored")])
def test_a_scale_keeps_the_call_out_of_the_cuda_graphs_that_compile_makes(options, overload):
    """They would go on with the scale that they were captured with, whatever a later call says."""
    q, k_cache, v_cache, new, seqlens, _ = step_inputs("cpu", dtype=torch.float32)
    called = []

    def note(module, example_inputs):
        called.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def step():
        return attention_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens, **options)

    want = step()
    assert torch.equal(torch.compile(step, fullgraph=True, backend=note)(), want)
    (operator,) = [
        target for target in called if isinstance(target, torch._ops.OpOverload) and "kvcache" in str(target)
    ]
    assert operator is getattr(torch.ops.fa4.attention_with_kvcache, overload)
    assert (torch.Tag.cudagraph_unsafe in operator.tags) == (overload == "scored")


def test_autocast_casts_nothing(target):
    """A cache in autocast's dtype could not be given back to the caller, nor one in another be written in place."""
    q, k, v, used = a_problem(target, target.widest)
    want = ThroughCache(target, Layout())(q, k, v, seqused_k=used)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        got = ThroughCache(target, Layout())(q, k, v, seqused_k=used)
    assert all(map(torch.equal, got, want))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("page", [0, 16])
def test_a_step_neither_synchronises_nor_compiles_when_lengths_change_and_can_be_captured(target, page, monkeypatch):
    if target.backend == "reference":
        pytest.skip("plain PyTorch, which has no kernel of ours")
    from fa4_cute import kernels
    from fa4_triton import decode_launch

    q, k_cache, v_cache, new, seqlens, where = step_inputs("cuda", page=page)

    def step(**options):
        return attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            new,
            new,
            cache_seqlens=seqlens,
            causal=True,
            backend=target.backend,
            **where,
            **options,
        )

    step()
    torch.cuda.synchronize()
    compiled = []
    for module, name in ((decode_launch, "compile_planned"), (kernels, "decode")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: compiled.append(args) or real(*args))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in (5, 620):
            seqlens.fill_(n)
            step()
        step(num_splits=7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for n in (3, 500, 638):
        seqlens.fill_(n)
        graph.replay()
        assert torch.equal(captured, step()), n


@pytest.mark.gpu
@needs_gpu
def test_the_capacity_costs_neither_programs_nor_much_memory(monkeypatch):
    """A grid, or a work space, made for the capacity would grow with it."""
    from fa4_triton import decode_launch

    grids = []
    real = decode_launch._launch

    def launch(plan, device, grid, *rest):
        grids.append(grid)
        real(plan, device, grid, *rest)

    monkeypatch.setattr(decode_launch, "_launch", launch)
    q = torch.randn(4, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(1, 2**20, 1, 64, device="cuda", dtype=torch.bfloat16).expand(4, -1, -1, -1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_with_kvcache(q, cache, cache, cache_seqlens=100)
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20
    assert max(grids) <= 4 * torch.cuda.get_device_properties(0).multi_processor_count


def test_neither_capacity_nor_group_changes_how_the_work_is_laid_out(monkeypatch):
    """Programs lay it out from the lengths, and share out KV heads: query heads of one lie in one tile."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    import fa4_triton
    from fa4_triton import decode_launch

    launched = []

    def launch(plan, device, grid, arguments, layout):
        parts, arrivals, *_ = arguments(False)[8]
        launched.append((plan.kernel.__name__, plan.tile.rows, grid, parts.numel(), arrivals.numel()))

    monkeypatch.setattr(fa4_triton, "_unavailable", lambda device: None)
    monkeypatch.setattr(decode_launch.host, "target_of", lambda device: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(decode_launch, "_launch", launch)
    decode_launch.forget()
    for capacity, group in ((4096, 4), (2**20, 4), (4096, 16)):
        q = torch.zeros(3, 1, 2 * group, 64, dtype=torch.bfloat16)
        cache = torch.zeros(3, 1, 2, 64, dtype=torch.bfloat16).expand(-1, capacity, -1, -1)
        attention_with_kvcache(q, cache, cache, cache_seqlens=100, backend="triton")
    decode_launch.forget()
    few, roomy, grouped = launched
    assert few == roomy
    assert few[0] == grouped[0] == "attention_decode"
    assert few[1] == grouped[1] == 16
    assert few[2] == grouped[2]
    assert few[4] == grouped[4] == 3 * 2  # a counter for each sequence and KV head


@pytest.mark.gpu
@needs_gpu
def test_a_cache_beyond_2_to_the_31_elements(target):
    """32-bit offsets wrap around there, in rows and in pages."""
    if target.backend == "reference":
        pytest.skip("plain PyTorch, which has no kernel of ours")
    n = 2**31 // (8 * 128) + 4096
    cache = torch.zeros(1, n, 8, 128, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(512, 8, 128, device="cuda", dtype=torch.bfloat16)
    cache[0, -512:] = tail
    q = torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.bfloat16)

    def attend(cache, length, **where):
        return attention_with_kvcache(q, cache, cache, cache_seqlens=length, backend=target.backend, **where)

    want = attend(tail[None], 512)
    pad = torch.tensor([n - 512], dtype=INT32, device="cuda")
    assert torch.equal(attend(cache, n, cache_leftpad=pad), want)
    pages = cache.view(-1, 16, 8, 128)
    table = torch.arange(pages.shape[0] - 32, pages.shape[0], device="cuda", dtype=INT32)[None]
    assert torch.equal(attend(pages, 512, page_table=table), want)
    if "every_kv_cache" in target.serves:
        pad = torch.tensor([512 - 500], dtype=INT32, device="cuda")
        got = attend(pages, 512, page_table=table, cache_leftpad=pad)
        torch.testing.assert_close(got, attend(tail[None, -500:], 500), atol=2e-2, rtol=2e-2)


@contextmanager
def compile_only(architecture):
    """Calls on KV caches compile their kernels and launch none; gives (name, kernel, programs of a multiprocessor)."""
    compiler = pytest.importorskip("triton.backends.compiler", reason="Triton is not installed")
    import fa4_triton
    from fa4_triton import decode_launch, launch

    target = compiler.GPUTarget("cuda", architecture, 32)
    compiled = []

    def compile_planned(plan, device, grid, arguments, layout):
        kernel = decode_launch.compile_planned(plan, arguments(False), target, layout)
        compiled.append((plan.kernel.__name__, kernel, plan.tile.programs or 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fa4_triton, "_unavailable", lambda device: None)
        patch.setattr(launch, "target_of", lambda device: target)
        patch.setattr(decode_launch, "_launch", compile_planned)
        decode_launch.forget()
        yield compiled
    decode_launch.forget()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("lengths", ["of the host", "of the device"])
def test_keys_are_on_their_way_during_the_arithmetic_wherever_they_lie(lengths):
    """Seen: with a length of the host, Triton made a loop of copies each of which was waited for at once; and under 3.9
    a choice between two pages' offsets had elements come one by one, in loads that no pipeline takes."""
    rows = torch.zeros(2, dtype=INT32)
    layouts = {"contiguous": {}, "rows": {"cache_batch_idx": rows}, "leftpad": {"cache_leftpad": rows}}
    layouts |= {page: {"page_table": torch.zeros(2, 4, dtype=INT32)} for page in (8, 16, 48, 256)}
    q = torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16)
    copies = {}
    for name, where in layouts.items():
        cache = torch.zeros(2, name if "page_table" in where else 64, 2, 128, dtype=torch.bfloat16)
        seqlens = 3 if lengths == "of the host" else rows + 3
        with compile_only(90) as compiled:
            attention_with_kvcache(q, cache, cache, cache_seqlens=seqlens, backend="triton", **where)
        ((_, kernel, _),) = compiled
        copies[name] = kernel.asm["ptx"].count("cp.async.cg")
    # 16 bytes a thread of the query, the keys and the values of a tile, ahead of the loop and in it.
    assert set(copies.values()) == {2 * (2 + 8 + 8)}, copies


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_every_kernel_compiles_within_the_shared_memory_of_every_architecture(architecture):
    """A launch would fail with "out of resources" on a GPU that nobody here has."""
    compiler = pytest.importorskip("triton.backends.compiler", reason="Triton is not installed")
    from fa4_triton import cache_tiles, tiles

    with compile_only(architecture) as compiled:
        for dim, seqlen_q, dtype in ((128, 1, torch.bfloat16), (256, 2, torch.bfloat16), (128, 40, FP8)):
            q, new = (torch.zeros(2, seqlen_q, heads, dim, dtype=torch.bfloat16) for heads in (8, 2))
            cache, table = torch.zeros(9, 16, 2, dim).to(dtype), torch.zeros(2, 4, dtype=INT32)
            attention_with_kvcache(q, cache, cache, new, new, cache_seqlens=3, page_table=table, backend="triton")
    assert [name for name, _, _ in compiled] == ["append_rows", "attention_decode"] * 2 + [
        "append_rows",
        "attention_prefill",
    ]
    limit = tiles.SHARED_MEMORY[tiles.family_of(compiler.GPUTarget("cuda", architecture, 32))]
    for name, kernel, programs in compiled:
        # A multiprocessor has a KiB more than one program may use, and keeps one for each.
        of_each = (limit + 1) * 1024 // programs - cache_tiles.RESERVED
        assert kernel.metadata.shared <= of_each, f"{name}: {kernel.metadata.shared} bytes, and {programs} programs"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_the_decode_kernel_spills_nothing(architecture, tmp_path):
    """Seen: where a chunk's end was found behind a branch, the results of every tile went to the stack on sm_80."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from test_triton import stack_bytes

    q, cache = torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16), torch.zeros(2, 64, 2, 128, dtype=torch.bfloat16)
    for where in ({}, {"page_table": torch.zeros(2, 4, dtype=INT32)}):
        with compile_only(architecture) as compiled:
            seqlens = torch.tensor([3, 4], dtype=INT32)
            attention_with_kvcache(q, cache, cache, cache_seqlens=seqlens, backend="triton", **where)
        ((_, kernel, _),) = compiled
        assert stack_bytes(kernel, tmp_path) == 0
