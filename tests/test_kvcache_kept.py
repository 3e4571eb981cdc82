"""What is kept between calls: counters, work space, compiled kernels. Host threads share it; no pool gets it back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from caches import needs_gpu, step_inputs
from host_threads import at_once, check_compiled_and_loaded_once
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dispatch import attention, attention_with_kvcache
from fa4_core import backends
from fa4_core import reserve as reserves
from fa4_core.lasting import make_lasting
from fa4_core.reserve import Reserve

pytest.importorskip("triton", reason="Triton is not installed")

from fa4_core import work_space
from fa4_core.work_space import ARRIVALS
from fa4_triton import decode_launch

CPU = torch.device("cpu")


@pytest.fixture
def nothing_kept(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(work_space, "_spaces", {})
    monkeypatch.setattr(work_space, "_reserves", {})


@pytest.fixture
def slow_memory(monkeypatch):
    """Making kept memory takes long enough for every thread to come by; the list of what was made."""
    made = []

    def make(function, device):
        time.sleep(0.05)
        made.append(make_lasting(function, device))
        return made[-1]

    monkeypatch.setattr(work_space, "make_lasting", make)
    monkeypatch.setattr(reserves, "make_lasting", make)
    return made


def test_the_counters_of_a_captured_launch_stay_its_own_when_the_reserve_is_filled_again():
    """A graph holds their address alone: freed, they would be another tensor's memory at the next replay."""
    reserve = Reserve(CPU, ARRIVALS)
    reserve.fill()
    taken = reserve.take(ARRIVALS // 2 + 1)
    assert not taken.any()
    memory = StorageWeakRef(taken.untyped_storage())
    first = taken.data_ptr()
    del taken  # as a launch does
    reserve.fill()
    assert not memory.expired()
    assert reserve.free.numel() == ARRIVALS
    assert reserve.take(1).data_ptr() != first


class Slow:
    """A tensor that is cut slowly: other threads go on meanwhile, as they may at any step of Python."""

    def __init__(self, tensor):
        self.numel, self.data_ptr, self._tensor = tensor.numel, tensor.data_ptr, tensor

    def __getitem__(self, part):
        time.sleep(0.01)
        return Slow(self._tensor[part])


def test_no_two_captured_launches_share_a_counter():
    """Two threads that capture at once take from one reserve; graphs that run at once would count together."""
    reserve = Reserve(CPU, ARRIVALS)
    reserve.fill()
    reserve.free = Slow(reserve.free)
    taken = at_once([lambda n=n: [(reserve.take(n).data_ptr(), n) for _ in range(3)] for n in (7, 1, 30, 12)])
    ranges = sorted(item for one in taken for item in one)
    assert all(a + 4 * n <= b for (a, n), (b, _) in zip(ranges, ranges[1:]))
    assert reserve.free.numel() == ARRIVALS - 3 * (7 + 1 + 30 + 12)


def test_threads_that_come_first_at_once_make_one_work_space_and_one_reserve(nothing_kept, slow_memory):
    """A second reserve would take the place of the first, and free counters that a graph already holds."""
    results = at_once([lambda: work_space.kept(100, 10, CPU, 5)] * 6)
    parts, arrivals = results[0]
    assert all(one is parts and other is arrivals for one, other in results)
    assert len(slow_memory) == 3
    assert parts.numel() == 100
    assert arrivals.numel() == ARRIVALS
    assert not arrivals.any()


def test_each_thread_gets_as_much_as_it_asks_for_and_the_most_is_kept(nothing_kept, slow_memory):
    """One that asks for less, a moment later, must neither shrink what another uses nor what is kept."""
    wanted = [(100 * i, 10 * i + ARRIVALS // 2 * (i % 3)) for i in (3, 1, 6, 2, 5, 4)]
    results = at_once([lambda n=n, m=m: work_space.kept(n, m, CPU, 5) for n, m in wanted])
    for (n, m), (parts, arrivals) in zip(wanted, results):
        assert parts.numel() >= n
        assert arrivals.numel() >= m
        assert not arrivals.any()
    made = len(slow_memory)
    parts, arrivals = work_space.kept(1, 1, CPU, 5)
    assert parts.numel() == max(n for n, _ in wanted)
    assert arrivals.numel() == max(ARRIVALS, *(m for _, m in wanted))
    assert work_space.kept(1, 1, CPU, 6)[1].data_ptr() != arrivals.data_ptr()  # another stream's
    assert len(slow_memory) == made + 2


def test_a_kernel_is_compiled_and_loaded_once_however_many_threads_launch_it(monkeypatch):
    plan = decode_launch._Plan(None, decode_launch.APPEND_TILE, {}, {})

    def launch():
        decode_launch._launch(plan, torch.device("cuda", 0), 1, lambda addresses: (), ("aligned",))

    check_compiled_and_loaded_once(monkeypatch, decode_launch, launch)


class Recording(TorchDispatchMode):
    """Notes the operations of its thread."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_what_lasts_is_made_by_another_thread_out_of_reach_of_this_ones_modes():
    """Pools to allocate from are a thread's own, and so are modes, of which a CPU has some."""
    threads = []

    def make():
        threads.append(threading.get_ident())
        return torch.zeros(3)

    with torch.inference_mode(), Recording() as recording:
        made = make_lasting(make, CPU)
    assert threads != [threading.get_ident()]
    assert not recording.seen
    assert not made.is_inference()


def test_what_cannot_be_made_raises_here(nothing_kept):
    def make():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        make_lasting(make, CPU)
    with pytest.raises(RuntimeError, match="memory"):
        work_space.kept(2**58, 10, CPU, 5)
    assert work_space.kept(1, 10, CPU, 5)[0].numel() == 1  # the lock is free again


def pool_of(tensor):
    """The number of the allocator's pool that a tensor's memory is from; (0, 0) is the general one."""
    for segment in torch.cuda.memory_snapshot():
        if 0 <= tensor.data_ptr() - segment["address"] < segment["total_size"]:
            return tuple(segment["segment_pool_id"])
    raise AssertionError("not the caching allocator's memory")


def all_that_is_kept():
    return [t for space in work_space._spaces.values() for t in (space.parts, space.arrivals, *space.reserve._kept)]


@pytest.mark.gpu
@needs_gpu
def test_nothing_that_is_kept_comes_from_a_pool_that_this_thread_allocates_from(nothing_kept):
    q, k_cache, v_cache, _, _, _ = step_inputs("cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        out = attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=600)
    assert pool_of(out) == tuple(pool.id)  # or the test would say nothing
    assert [pool_of(t) for t in all_that_is_kept()] == [(0, 0)] * 3
    assert torch.equal(out, attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=600))


def compiled_steps(scales):
    """Steps under mode="reduce-overhead", the very first calls of a process, are eager ones.

    In between another compiled function, whose graph has the same pool, fills what memory it gets there. scales: the
    softmax_scale of each step; where it never changes, the steps end up in one CUDA graph.
    """
    q, k_cache, v_cache, new, seqlens, _ = step_inputs("cuda")
    fresh = k_cache.clone(), v_cache.clone()
    for tensor in (k_cache, v_cache, seqlens):
        torch._dynamo.mark_static_address(tensor)
    launches = []
    real = decode_launch._launch
    # Counted, not kept: the arguments hold the output, and every tensor of the graphs' pool has to be accounted for.
    decode_launch._launch = lambda *args: launches.append(1) or real(*args)

    def step(q, k_cache, v_cache, new, seqlens, scale):
        return 2 * attention_with_kvcache(
            q, k_cache, v_cache, new, new, cache_seqlens=seqlens, causal=True, softmax_scale=scale
        )

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    fill = torch.compile(lambda x: [x[:, None] + x + i for i in range(4)], mode="reduce-overhead", fullgraph=True)
    numbers = torch.ones(512, device="cuda")  # four results of 1 MiB, as large as what is kept
    lengths = (3, 500, 638, 17, 300, 9, 620, 45)
    got, counts = [], []
    for n, scale in zip(lengths, scales):
        seqlens.fill_(n)
        torch.compiler.cudagraph_mark_step_begin()
        got.append(compiled(q, k_cache, v_cache, new, seqlens, scale).clone())
        assert all(filled.eq(2 + i).all() for i, filled in enumerate(fill(numbers)))
        counts.append(len(launches))
    if len(set(scales)) == 1:
        assert counts[-1] == counts[3] > 0, f"no CUDA graph was replayed: {counts} launches"
    kept = all_that_is_kept()
    assert kept
    assert all(pool_of(t) == (0, 0) for t in kept)
    for n, scale, out in zip(lengths, scales, got):
        seqlens.fill_(n)
        assert torch.equal(step(q, *fresh, new, seqlens, scale), out), (n, scale)
    assert torch.equal(fresh[0], k_cache)


def in_a_process(call, **environment):
    """Runs a call of this module, in Python, in a process where nothing is kept yet."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", f"import test_kvcache_kept; test_kvcache_kept.{call}"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("scales", ["[None] * 8", "[0.3, 0.3, 0.3, 0.3, 0.1, 0.1, 0.5, 0.3]"])
def test_steps_compiled_to_cuda_graphs_are_right_from_the_first_call(scales):
    """In a process of its own: nothing is kept yet, and a capture that fails would leave this one's generator in it."""
    in_a_process(f"compiled_steps({scales})")


def captured_first(backend, decodes):
    """The very first calls of a process are captured, in two graphs that then run at once, and only then one is eager.

    decodes: whether the calls are on a KV cache, or `attention`.
    """
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(3, 1, 8, 128, device="cuda", generator=g).bfloat16()
    k, v, new = (torch.randn(3, n, 2, 128, device="cuda", generator=g).bfloat16() for n in (9000, 9000, 1))
    seqlens = torch.tensor([8999, 5, 4000], dtype=torch.int32, device="cuda")

    def step():
        if decodes:
            return attention_with_kvcache(q, k, v, new, new, cache_seqlens=seqlens, backend=backend)
        return attention(k[:, :700], k[:, :700], v[:, :700], causal=True, backend=backend)

    def capture():
        graph, outs, others = torch.cuda.CUDAGraph(), [], []
        with torch.cuda.graph(graph):
            for _ in range(3):
                outs.append(step())
                # Of the sizes of counters: they get what a call gives back to the graph's pool.
                others += [torch.full((n,), -1, dtype=torch.int32, device="cuda") for n in (2, 6, 2**14, ARRIVALS)]
        return graph, outs

    graphs = [capture() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for lengths in ([8999, 5, 4000], [1, 8999, 64], [0, 700, 2500]):
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        torch.cuda.synchronize()
        for _ in range(10):
            for (graph, _), stream in zip(graphs[::-1], streams):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        want = step()
        assert all(torch.equal(out, want) for _, outs in graphs for out in outs), lengths
    # From now on counters are there ahead, and no replay has to zero any.
    device = q.device
    if decodes:
        # One a sequence and KV head, and the two by which blocks of the cute backend draw sequences.
        free, counters = lambda: work_space._reserves[device].free.numel(), 3 * 2 + 2 * (backend == "cute")
    else:
        from fa4_cute import launch

        free, counters = lambda: launch._reserve(device).free.numel(), 2
    before = free()
    capture()
    assert before - free() == 3 * counters


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("backend", "decodes"), [("cute", True), ("cute", False), ("triton", True)])
def test_a_call_may_be_captured_before_any_other(backend, decodes, tmp_path):
    """Nothing is compiled, loaded or reserved then.

    Counters that are zeroed once, in memory that the graph's pool gives to others, count wrongly at the next replay;
    those of a reserve made in the capture are zeroed while others count in them.
    """
    why = backends.load(backend).unavailable(torch.device("cuda", 0))
    if why is not None:
        pytest.skip(why)
    caches = {name: str(tmp_path / name) for name in ("FA4_CACHE_DIR", "TRITON_CACHE_DIR")}
    in_a_process(f"captured_first({backend!r}, {decodes})", **caches)


@pytest.mark.gpu
@needs_gpu
def test_streams_that_run_at_once_do_not_meet_in_the_work_space():
    """Arrivals of two launches in one counter would merge chunks that are not there yet."""
    q, k_cache, v_cache, _, _, _ = step_inputs("cuda")
    k_cache, v_cache = (c.repeat(1, 20, 1, 1) for c in (k_cache, v_cache))
    want = [attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n) for n in (12000, 9000)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, n in zip(streams, (12000, 9000)):
            with torch.cuda.stream(stream):
                got.append(attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


@pytest.mark.gpu
@needs_gpu
def test_host_threads_on_one_stream_and_on_several_get_their_own_results(nothing_kept):
    """Of different sizes, so that one asks for more while another launches."""
    q, k_cache, v_cache, _, _, _ = step_inputs("cuda")
    calls = [(q.repeat(1, rows, 1, 1), n) for rows in (1, 2, 4) for n in (600, 301, 17)]
    want = [attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n) for q, n in calls]
    work_space._spaces.clear()
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()

    def steps(i):
        q, n = calls[i]
        with torch.no_grad(), torch.cuda.stream(streams[i % 3]):
            return [attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=n) for _ in range(50)]

    got = at_once([lambda i=i: steps(i) for i in range(len(calls))])
    torch.cuda.synchronize()
    for outs, expected in zip(got, want):
        assert all(torch.equal(out, expected) for out in outs)
