"""The CuTe backend's own promises: what is visited and skipped, its cache of compiled kernels, its choice by device."""

import errno
import functools
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulation import simulated_skips, visited_by_warpgroups, visited_tiles

import fa4_cute
from dispatch import attention, attention_with_kvcache, explain
from fa4_core.commands import warm
from fa4_core.problem import Inputs, Kinds, make_problem
from fa4_cute import cache, kernels, launch, sm90_config, sm100_config

has_dsl = importlib.util.find_spec("cutlass") is not None
needs_dsl = pytest.mark.skipif(not has_dsl, reason="needs the package nvidia-cutlass-dsl")
SERVED = torch.cuda.is_available() and fa4_cute.BACKEND.unavailable(torch.device("cuda", 0)) is None
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not SERVED, reason="needs a GPU that the cute backend serves")]
needs_gpu = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731


def kinds(head_dim=64, head_dim_v=None, dtype=torch.bfloat16, **changed):
    plain = {
        "group": 1, "varlen": False, "seqused_q": False, "seqused_k": False, "paged": False, "window_left": False,
        "window_right": False, "softcap": False, "sink": False,
    }  # fmt: skip
    return Kinds(dtype, head_dim, head_dim_v or head_dim, **{**plain, **changed})


def count(q, k, v, **options):
    """(visits, skips) of every row, (B, H, Sq) each, from the kernel's debug counters."""
    from fa4_cute import launch

    inputs = Inputs(q, k, v)
    problem = make_problem(inputs, **options)
    counts = torch.zeros(*problem.lse_shape, 2, dtype=torch.int32, device=q.device)
    launch.forward(problem, inputs, counts)
    return counts.cpu().unbind(-1)


def config_of(q):
    return kernels.config(make_problem(Inputs(q, q, q)).kinds, kernels.architecture(q.device))


@needs_gpu
@pytest.mark.parametrize("threshold", [0.0, 8.0])
@pytest.mark.parametrize("scale", [1, 16])
def test_skips_are_counted_as_a_numpy_simulation_counts_them(scale, threshold):
    """A pivot followed where it should be kept costs speed that no result shows; kept too long, it overflows fp16."""
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, n, 2, 64, generator=g).half().cuda() for n in (70, 650))
    _, skips = count(q * scale, k, k, rescale_threshold=threshold)
    want = simulated_skips(q * scale, k, config_of(q).tile_n, threshold)
    # float32 and float64 may fall on different sides of the threshold in a rare row.
    assert (skips.numpy() != want).mean() <= 0.01
    if threshold == 8.0 and scale == 1:
        assert skips.sum() > 0.99 * skips.numel() * ((k.shape[1] - 1) // config_of(q).tile_n)


@needs_gpu
def test_hidden_tiles_are_never_visited():
    """Counted against brute force over random masks: visited is a tile where a row of the query tile sees a key."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        len_q, len_k = (int(n) for n in rng.integers(1, 700, 2))
        left, right = (int(rng.integers(0, 200)) if rng.random() < 0.6 else -1 for _ in range(2))
        q, k = torch.randn(1, len_q, 1, 64).half().cuda(), torch.randn(1, len_k, 1, 64).half().cuda()
        visits, _ = count(q, k, k, window_left=left, window_right=right)
        config = config_of(q)
        if isinstance(config, sm90_config.Sm90Config):
            want = visited_by_warpgroups(len_q, len_k, left, right, config)
        else:
            want = visited_tiles(len_q, len_k, left, right, config.tile_m, config.tile_n)
        assert (visits[0, 0].numpy() == want).all(), (len_q, len_k, left, right)


@needs_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_input_gives_the_same_bits_a_hundred_times(causal):
    """Blocks draw their work in an order that differs from run to run; no result may show it."""
    q, k, v = (torch.randn(2, 1500, 4, 128, device="cuda").bfloat16() for _ in range(3))
    first = attention(q, k, v, causal=causal, backend="cute", return_lse=True)
    for _ in range(99):
        again = attention(q, k, v, causal=causal, backend="cute", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@needs_gpu
def test_auto_takes_it_and_says_whose_gradients():
    q = torch.randn(1, 8, 1, 64, device="cuda").half()
    choice = explain(q, q, q)
    assert (choice.backend, choice.backward) == ("cute", "triton")
    assert str(choice).startswith("runs on cute, its gradients on triton")


@needs_gpu
def test_a_graph_keeps_its_own_counter():
    """The counter that blocks draw from belongs to a stream; a graph may run beside that stream's own calls."""
    q, k, v = (torch.randn(1, 700, 8, 64, device="cuda").half() for _ in range(3))
    want = attention(q, k, v, causal=True, backend="cute")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, causal=True, backend="cute")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        assert torch.equal(attention(q, k, v, causal=True, backend="cute"), want)
    torch.cuda.synchronize()
    assert torch.equal(captured, want)


@needs_dsl
@pytest.mark.parametrize("capturing", [False, True])
def test_which_counter_a_stream_gets(monkeypatch, capturing):
    """The stream's own, always zeros between launches; a capture, never on the default stream, gets a new one."""
    from fa4_cute import launch

    stream = 0
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing and stream != 0, raising=False)
    for name in ("_stream_counter", "_reserve"):  # as in a new process; what graphs of other tests hold stays
        monkeypatch.setattr(launch, name, functools.cache(getattr(launch, name).__wrapped__))
    device, found = torch.device("cpu"), {}
    for stream in (7, 0, 7) if capturing else (0, 7):
        found[stream] = launch._counter(device), launch._counter(device)
        assert all(counter.tolist() == [0, 0] for counter in found[stream])
    reserved = {t.untyped_storage().data_ptr() for t in launch._reserve(device)._kept}
    assert found[0][0] is found[0][1]
    places = [counter.data_ptr() for counter in found[7]]
    assert (places[0] == places[1]) == (not capturing)
    assert found[0][0].data_ptr() not in places
    # Zeroed ahead, once an eager call has been: a graph has no kernel to zero them.
    assert {counter.untyped_storage().data_ptr() in reserved for counter in found[7]} == {capturing}


@pytest.mark.parametrize(("capability", "arch"), [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")])
def test_every_served_capability_has_a_kernel(monkeypatch, capability, arch):
    """Capabilities are faked: no Blackwell GPU is at hand."""
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.architecture(device) == arch
    assert kernels.missing(kinds(128), arch) == ()
    assert kernels.missing(kinds(128, dtype=torch.float32), arch) == ("dtype torch.float32",)
    assert kernels.missing(kinds(64, paged=True), arch) == ("paged KV (page_table)",)
    kernels.architecture.cache_clear()


def test_another_capability_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fa4_cute._unavailable.cache_clear()
    why = fa4_cute._unavailable(torch.device("cuda", 5))
    fa4_cute._unavailable.cache_clear()
    kernels.architecture.cache_clear()
    assert why is not None
    assert "9.0, 10.0, 10.3" in why
    assert "8.9" in why


def test_without_the_dsl_it_names_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fa4_cute._unavailable.cache_clear()
    why = fa4_cute._unavailable(torch.device("cuda", 5))
    fa4_cute._unavailable.cache_clear()
    assert why is not None
    assert "fa4-attention[cute]" in why


def test_every_head_dim_has_a_config_within_the_hardware():
    """A config refuses what does not fit, so making it is the test."""
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            chosen = sm90_config.config_for(kinds(head_dim, head_dim_v))
            assert chosen.head_dim >= head_dim
            assert chosen.head_dim_v >= head_dim_v
            if not sm100_config.missing(kinds(head_dim, head_dim_v)):
                sm100_config.config_for(kinds(head_dim, head_dim_v), (10, 0))


def test_a_config_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="bytes of shared memory"):
        sm90_config.Sm90Config(256, 256, tile_n=128)
    with pytest.raises(ValueError, match="where Q was"):
        sm90_config.Sm90Config(64, 128, tile_n=64, q_slots=1)
    with pytest.raises(ValueError, match="64 columns"):
        sm90_config.Sm90Config(192, 96, tile_n=128, q_slots=1)
    with pytest.raises(ValueError, match="multiple of 16"):
        sm90_config.Sm90Config(64, 64, tile_n=72)


class Stub:
    """In place of a compiled kernel: exports an object in the way that a kernel does, and counts."""

    def __init__(self):
        self.compiled = 0

    def __call__(self):
        self.compiled += 1
        return self

    def export_to_c(self, object_file_path, function_name):
        source = f"""
        int __tvm_ffi_{function_name}(void *handle, void *args, int n, void *result) {{ return 0; }}
        """
        command = [cache.linker(), "-x", "c", "-c", "-fPIC", "-o", object_file_path, "-"]
        subprocess.run(command, input=source, text=True, check=True)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("FA4_CACHE_DIR", str(tmp_path))
    return tmp_path


needs_compiler = pytest.mark.skipif(cache.linker() is None, reason="needs a C compiler")


@needs_dsl
@needs_compiler
def test_a_kernel_is_compiled_once_and_then_loaded(shelf):
    stub = Stub()
    for _ in range(3):
        cache.get("some kernel", stub)
    assert stub.compiled == 1
    cache.get("another kernel", stub)
    assert stub.compiled == 2
    assert len(list(shelf.glob("*.so"))) == 2


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_entry_is_built_again(shelf, damage, monkeypatch):
    stub = Stub()
    cache.get("some kernel", stub)
    (entry,) = shelf.glob("*.so")
    other = shelf / "other"  # a loaded library's path stays loaded, so the damaged one lies elsewhere
    other.mkdir()
    (other / entry.name).write_bytes(damage)
    monkeypatch.setenv("FA4_CACHE_DIR", str(other))
    cache.get("some kernel", stub)
    assert stub.compiled == 2
    assert (other / entry.name).stat().st_size > 1000


@needs_dsl
@needs_compiler
def test_threads_compile_a_kernel_once(shelf):
    stub = Stub()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.get("some kernel", stub), range(16)))
    assert stub.compiled == 1


@needs_dsl
def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FA4_CACHE_DIR", str(tmp_path / "file" / "folder"))
    stub = Stub()
    assert cache.get("some kernel", stub) is stub


@needs_dsl
@needs_compiler
def test_what_a_folder_holds_is_used_where_it_cannot_be_written(shelf):
    """An image's folder, warmed and then read-only; a lock that cannot be opened stands for it, to root, too."""
    cache.get("some kernel", Stub())
    (lock,) = shelf.glob("*.lock")
    lock.unlink()
    lock.mkdir()
    stub = Stub()
    cache.get("some kernel", stub)
    assert stub.compiled == 0


@needs_dsl
@needs_compiler
def test_a_file_system_without_locks_keeps_kernels(shelf, monkeypatch):
    """Lustre may be mounted so."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    stub = Stub()
    for _ in range(2):
        cache.get("some kernel", stub)
    assert stub.compiled == 1


@needs_dsl
@needs_compiler
def test_a_relative_folder_keeps_kernels(shelf, monkeypatch):
    """A library's bare file name is sought elsewhere."""
    monkeypatch.chdir(shelf)
    monkeypatch.setenv("FA4_CACHE_DIR", ".")
    stub = Stub()
    for _ in range(2):
        cache.get("some kernel", stub)
    assert stub.compiled == 1


@needs_dsl
def test_a_kernel_that_cannot_be_loaded_from_the_folder_runs_as_compiled(shelf, monkeypatch):
    """A home that is mounted noexec."""

    def load(entry):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(cache, "_load", load)
    stub = Stub()
    assert cache.get("some kernel", stub) is stub


@needs_dsl
def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """A container run under a number that has no account."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FA4_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.Path, "home", home)
    stub = Stub()
    assert cache.folder() is None
    assert not cache.writable()
    assert cache.get("some kernel", stub) is stub


@needs_dsl
@needs_compiler
def test_a_kept_kernel_loads_in_another_process_without_the_dsl(shelf):
    """A real kernel, compiled here for SM90: the next process has it without importing the compiler."""
    program = """
import sys
import torch
from fa4_core.problem import Kinds
from fa4_cute import kernels
kinds = Kinds(torch.float16, 64, 64, 1, *[False] * 8)
kernels.forward(kinds, None, False, "sm_90a")
print("cutlass" in sys.modules)
"""
    told = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    ]
    assert told == ["True", "False"]


@needs_dsl
@needs_compiler
def test_warm_compiles_ahead_for_a_gpu_that_is_not_there(shelf):
    command = [sys.executable, "-m", "dispatch", "warm", "--arch", "sm_90a", "--head-dim", "64", "--dtype", "float16"]
    done = subprocess.run([*command, "--page", "16"], check=True, capture_output=True, text=True)
    assert "6 kernels are in" in done.stdout
    assert len(list(shelf.glob("*.so"))) == 6


@pytest.fixture
def requested(shelf, monkeypatch):
    """The keys of kernels that are asked for; none is compiled, and the device is one of SM90."""
    from fa4_core import kvcache
    from fa4_cute import decode_launch

    keys = []
    monkeypatch.setattr(cache, "get", lambda key, compile_kernel: keys.append(key) or (lambda *arguments: None))
    monkeypatch.setattr(fa4_cute, "_unavailable", lambda device: None)
    monkeypatch.setattr(kernels, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    for module, name in ((kvcache, "_call_of"), (decode_launch, "_call_of"), (decode_launch, "_kernel")):
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))  # as in a new process
    return keys


@needs_dsl
@pytest.mark.parametrize("page", [0, 16, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_a_decode_step_finds_its_kernel_warmed(requested, group, page):
    """Of whatever sizes: another key would have the first step of a serving process wait for the compiler."""
    warm.run_warm([64, 128], ["bfloat16"], [group], [0, 16, 256], "sm_90a")
    warmed = set(requested)
    assert len(warmed) == len(requested) == 2 * 2 * (2 + 3)
    requested.clear()
    for head_dim, causal in ((64, False), (64, True), (128, False), (128, True)):
        k = torch.zeros(3, 512, 2, head_dim, dtype=torch.bfloat16)
        where = {}
        if page:
            k = k.view(-1, page, 2, head_dim)
            where["page_table"] = torch.zeros(3, 512 // page, dtype=torch.int32)
        q = torch.zeros(3, 1, 2 * group, head_dim, dtype=torch.bfloat16)
        seqlens = torch.tensor([500, 3, 0], dtype=torch.int32)
        attention_with_kvcache(q, k, k, cache_seqlens=seqlens, causal=causal, backend="cute", **where)
    assert len(set(requested)) == len(requested) == 4
    assert set(requested) <= warmed


@needs_dsl
def test_a_kernels_forms_are_made_by_its_first_call_and_warmed(requested, monkeypatch):
    """A call that is longer than those before it waits for no compiler."""
    for name in ("_prepared", "_kernels"):
        monkeypatch.setattr(launch, name, functools.cache(getattr(launch, name).__wrapped__))
    warm.run_warm([256], ["bfloat16"], [1], [], "sm_90a")
    warmed = set(requested)
    assert len(warmed) == len(requested) == 2 * 2 * 2
    requested.clear()
    q = torch.zeros(1, 1, 2, 256, dtype=torch.bfloat16)
    for keys in (5, 300, 5000, 20000):
        k = torch.zeros(1, keys, 2, 256, dtype=torch.bfloat16)
        attention(q, k, k, backend="cute")
        assert len(requested) == 2
    assert set(requested) <= warmed


@pytest.mark.parametrize(
    ("seqlen_k", "window", "long"),
    [(4095, {}, False), (4096, {}, True), (9999, {"window_left": 100}, True),
     (9999, {"window_left": 4094, "window_right": 0}, False), (9999, {"window_left": 4095, "window_right": 0}, True)],
)  # fmt: skip
def test_long_is_what_rows_may_see(seqlen_k, window, long):
    q, k = torch.zeros(2, 7, 1, 64, dtype=torch.bfloat16), torch.zeros(2, seqlen_k, 1, 64, dtype=torch.bfloat16)
    assert launch._is_long(make_problem(Inputs(q, k, k), **window)) is long


def test_packed_sequences_are_long_on_average():
    k = torch.zeros(3 * 4096, 1, 64, dtype=torch.bfloat16)
    for lengths, long in (
        ([0, 4096, 4096 * 3], True),
        ([0, 1, 2, 4096 * 3], True),
        ([0, 1, 2, 3, 4096 * 3], False),
        ([0], True),  # no sequence, only rows past the last one
    ):
        bounds = torch.tensor(lengths, dtype=torch.int32)
        inputs = Inputs(k, k, k, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        assert launch._is_long(make_problem(inputs, max_seqlen_q=4096 * 3, max_seqlen_k=4096 * 3)) is long


@needs_dsl
def test_warm_says_what_has_no_kernel(requested, capsys):
    """Head dimensions of no decode kernel, more query heads than it has rows: what is compiled is the forward."""
    warm.run_warm([80, 128], ["float16"], [17], [0, 16], "sm_90a")
    told = capsys.readouterr().out
    assert not [key for key in requested if key.startswith("decode")]
    assert len(requested) == 8
    assert "8 kernels are in" in told
    assert told.count("not decode 80, float16: lacks head_dim=80") == 1
    assert told.count("not decode 128, float16: lacks 17 query rows") == 1


@needs_dsl
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--arch", "sm_80"), "sm_90a, sm_100a"),
        (("--head-dim", "300"), "1 to 256"),
        (("--dtype", "float32"), "float16"),
        (("--page", "1"), "multiples of 8"),
    ],
)
def test_warm_names_what_it_does_not_take(option, message):
    command = [sys.executable, "-m", "dispatch", "warm", "--arch", "sm_90a", *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


@needs_dsl
def test_warm_names_a_folder_that_it_cannot_write(tmp_path):
    """It once said that the kernels were there."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "folder"
    command = [sys.executable, "-m", "dispatch", "warm", "--arch", "sm_90a", "--head-dim", "64", "--dtype", "float16"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "FA4_CACHE_DIR": str(place)}
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
