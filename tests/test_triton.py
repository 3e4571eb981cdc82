"""The Triton backend's own promises: what is visited and skipped, what compiles where, and the usual ways to crash."""

import itertools
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from host_threads import check_compiled_and_loaded_once
from simulation import simulated_skips, visited_tiles

import fa4_triton
from dispatch import attention
from fa4_core.checks import check_backward
from fa4_core.problem import Inputs, make_problem
from fa4_core.strategies import Case

triton = pytest.importorskip("triton", reason="Triton is not installed")

from emulator.launcher import TRITON_TOLERATES  # noqa: E402
from emulator.triton_backend import emulated_triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fa4_triton import launch, tiles  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]
needs_gpu = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731
RUNS = [
    pytest.param(
        "cpu", marks=[pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="interpreter only")]
    ),
    pytest.param("cuda", marks=on_gpu),
]


def count(q, k, v, **options):
    """(visits, skips) of every row, (B, H, Sq) each, from the kernel's debug counters."""
    inputs = Inputs(q, k, v)
    problem = make_problem(inputs, **options)
    counts = torch.zeros(*problem.lse_shape, 2, dtype=torch.int32, device=q.device)
    launch.forward(problem, inputs, counts)
    return counts.cpu().unbind(-1)


def tile_of(q):
    inputs = Inputs(q, q, q)
    return launch._plan("forward", make_problem(inputs).kinds, q.device).tile


@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("threshold", [0.0, 8.0])
@pytest.mark.parametrize("scores", ["normal", "q x 16", "rising keys"])
def test_skips_are_counted_as_a_numpy_simulation_counts_them(device, scores, threshold):
    """A pivot followed where it should be kept costs speed that no result shows; kept too long, it overflows fp16."""
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 70, 2, 64, generator=g) for _ in range(2))
    k = torch.cat([k, torch.randn(1, 250, 2, 64, generator=g)], 1)
    if scores == "q x 16":
        q *= 16
    elif scores == "rising keys":
        # Rising towards the left, since tiles are walked from the right.
        k = q.mean(1, keepdim=True) * torch.linspace(900, 0, k.shape[1])[None, :, None, None]
        q = q.mean(1, keepdim=True) + 0.01 * q
    q, k = q.to(device), k.to(device)
    _, skips = count(q, k, k, rescale_threshold=threshold)
    want = simulated_skips(q, k, tile_of(q).n, threshold)
    # float32 and float64 may fall on different sides of the threshold in a rare row.
    assert (skips.numpy() != want).mean() <= 0.01
    share = skips.sum() / max(1, (skips.numel() * ((k.shape[1] - 1) // tile_of(q).n)))
    if threshold == 8.0:
        assert share > 0.99 if scores == "normal" else share < 0.35 if scores == "rising keys" else True


@pytest.mark.parametrize("device", RUNS)
def test_hidden_tiles_are_never_visited(device):
    """Counted against brute force over random masks: visited is a tile where a row of the query tile sees a key."""
    rng = np.random.default_rng(0)
    for _ in range(12 if device == "cpu" else 60):
        len_q, len_k = (int(n) for n in rng.integers(1, 400, 2))
        left, right = (int(rng.integers(0, 200)) if rng.random() < 0.6 else -1 for _ in range(2))
        q, k = torch.randn(1, len_q, 1, 16).to(device), torch.randn(1, len_k, 1, 16).to(device)
        visits, _ = count(q, k, k, window_left=left, window_right=right)
        tile = tile_of(q)
        want = visited_tiles(len_q, len_k, left, right, tile.m, tile.n)
        assert (visits[0, 0].numpy() == want).all(), (len_q, len_k, left, right)


ARCHITECTURES = [GPUTarget("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 103, 120)]
ARCHITECTURES += [GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")]
HOPPER = GPUTarget("cuda", 90, 32)
DIMS = (64, 128, 256)
STACK_BYTES = {
    ("80", 64, "attention_forward"): 24,
    ("80", 128, "attention_forward"): 104,
    ("80", 256, "row_slopes"): 8,
    ("86", 256, "attention_backward_q"): 8,
    ("89", 256, "attention_backward_q"): 8,
    ("90", 64, "attention_backward_kv"): 264,
    ("90", 64, "attention_backward_q"): 72,
    ("90", 128, "attention_backward_kv"): 216,
    ("90", 256, "attention_forward"): 64,
    ("90", 256, "attention_backward_kv"): 440,
    ("90", 256, "attention_backward_q"): 80,
    ("100", 64, "attention_backward_q"): 16,
    ("100", 256, "attention_backward_q"): 8,
    ("103", 64, "attention_backward_q"): 16,
    ("103", 256, "attention_backward_q"): 8,
    ("120", 256, "attention_backward_q"): 8,
}
"""By (architecture, head_dim, kernel): the most bytes of stack, which is where spilled registers go, that the causal
bfloat16 kernels took under Triton 3.7.1, and on 80, 90 and 100 also under 3.6.0, 3.8.0 and 3.9.0 (2026-11-23); 0 where
there is no entry. On Hopper the caps on registers at D=64 buy a further program with it."""
ASSEMBLERS = ("ptxas", "ptxas-blackwell")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def compiled(target, dim, dtype, monkeypatch, **options):
    """What `forward` and `backward` of a large call would compile for `target`: {kernel: CompiledKernel}."""
    found = {}

    def compile_only(kernel, plan, device, grid, arguments, layout):
        found[kernel.__name__] = launch.compile_planned(kernel, plan, arguments(False), target, layout)

    monkeypatch.setattr(launch, "target_of", lambda device: target)
    monkeypatch.setattr(launch, "_launch", compile_only)
    launch.forget()
    q = torch.empty(1, 4096, 8, dim, dtype=dtype)
    inputs = Inputs(q, q, q)
    problem = make_problem(inputs, **options)
    out, lse = launch.forward(problem, inputs)
    launch.backward(problem, inputs, out, lse, q, None)
    launch.forget()
    return found


def stack_bytes(kernel, tmp_path):
    """Bytes of stack that a thread of a compiled kernel takes."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"ScratchSize: (\d+)", kernel.asm["amdgcn"]).group(1))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage.stdout))


@compiles
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda t: str(t.arch))
def test_every_kernel_compiles_within_memory_and_stack_of_every_architecture(architecture, dim, monkeypatch, tmp_path):
    """A launch would fail with "out of resources" on a GPU that nobody here has, or spill registers unseen."""
    limit = tiles.SHARED_MEMORY[tiles.family_of(architecture)]
    for name, kernel in compiled(architecture, dim, torch.bfloat16, monkeypatch, window_right=0).items():
        assert kernel.metadata.shared <= limit * 1024, f"{name}: {kernel.metadata.shared} bytes of {limit} KiB"
        budget = STACK_BYTES.get((str(architecture.arch), dim, name), 0)
        assert stack_bytes(kernel, tmp_path) <= budget, f"{name}: over {budget} bytes of stack"


@compiles
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_no_wgmma_of_a_large_call_is_serialised_on_hopper(dim, causal, monkeypatch, tmp_path):
    """ptxas then waits after each one, all over the kernel, and says so in a note only (C7510 to C7515)."""
    options = {"window_right": 0} if causal else {}
    for name, kernel in compiled(HOPPER, dim, torch.bfloat16, monkeypatch, **options).items():
        source = tmp_path / f"{name}.ptx"
        source.write_text(kernel.asm["ptx"])
        arguments = ["-arch=sm_90a", "-v", source, "-o", tmp_path / "unused.cubin"]
        # Triton 3.9 writes a version of PTX that only the second one reads.
        runs = (subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True) for tool in ASSEMBLERS)
        said = next(run.stderr for run in runs if run.returncode == 0)
        assert "wgmma.mma_async instructions are serialized" not in said, f"{name}: {said}"


def specialise(monkeypatch):
    """Lets the installed Triton specialise the forward, though no GPU has shown it right."""
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        pytest.skip("the barriers that the forward invalidates are those of Triton 3.6 and 3.7")
    monkeypatch.setattr(tiles, "SPECIALISING", (triton.__version__.split("+")[0],))


WINDOWS = {"full": {}, "causal": {"window_right": 0}, "window": {"window_left": 500, "window_right": 60}}


@compiles
@pytest.mark.parametrize("window", WINDOWS)
def test_a_specialised_forward_loads_in_one_warpgroup_and_invalidates_the_barriers_under_its_tiles(
    window, monkeypatch, tmp_path
):
    """Triton does not say when it does not specialise. It puts K and V where it initialised barriers that nothing uses;
    one that is not invalidated turned up in the tile, on an H100, as NaN."""
    specialise(monkeypatch)
    kernel = compiled(HOPPER, 128, torch.bfloat16, monkeypatch, **WINDOWS[window])["attention_forward"]
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.num_warps == 12
    assert len(re.findall(r"setmaxnreg\.dec\S*\s+40;", ptx)) == 1
    assert stack_bytes(kernel, tmp_path) <= 48
    places = dict.fromkeys(re.findall(r"mov\.b32 \t(%r\d+), global_smem;", ptx), 0)
    for name, base, offset in re.findall(r"add\.s32 \t(%r\d+), (%r\d+), (\d+);", ptx):
        if base in places:
            places[name] = places[base] + int(offset)
    initialised = {places[name] for name in re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx)}
    invalidated = {int(offset or 0) for offset in re.findall(r"mbarrier\.inval\S* \[global_smem\+?(\d*)\]", ptx)}
    assert {place for place in initialised if place < 2 * 2 * 128 * 128 * 2} == invalidated


@compiles
@pytest.mark.parametrize("lengths", [(130, 259), (259, 130), (70, 1)])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_specialised_forward_is_right_and_gives_the_bits_of_pointers_and_of_packed_sequences(
    window, lengths, monkeypatch
):
    """In the emulator. Past the keys lies NaN; the masked scores are a branch in assembly, which only edges take."""
    specialise(monkeypatch)
    len_q, len_k = lengths
    g = torch.Generator().manual_seed(len_q)
    q = torch.randn(1, len_q, 4, 128, generator=g).bfloat16()
    k, v = torch.full((2, 1, len_k + 40, 2, 128), float("nan")).bfloat16()
    for t in (k, v):
        t[:, :len_k] = torch.randn(1, len_k, 2, 128, generator=g)
    k, v = k[:, :len_k], v[:, :len_k]
    inputs = Inputs(q, k, v, torch.randn(4, generator=g))
    problem = make_problem(inputs, **WINDOWS[window])
    kernels, results = [], []
    for least, seed in ((0, 1), (0, 2), (float("inf"), 3)):
        monkeypatch.setattr(launch, "MIN_TMA_FLOPS", least)
        with emulated_triton(
            90, seed=seed, check=least == 0, tolerate=TRITON_TOLERATES, observe=lambda _, ran: kernels.append(ran)
        ):
            results.append(launch.forward(problem, inputs))
    left, right = WINDOWS[window].get("window_left"), WINDOWS[window].get("window_right")
    want = attention(*(t.float() for t in inputs[:3]), sink=inputs.sink, window=(left, right), backend="reference")
    assert torch.allclose(results[0][0].float(), want, atol=2e-2, rtol=2e-2)
    # The same rows as the second of two packed sequences, whose kernel is not specialised.
    cu_q, cu_k = (torch.tensor([0, 0, n], dtype=torch.int32) for n in lengths)
    packed = Inputs(q[0], k[0], v[0], inputs.sink, cu_q, cu_k)
    with emulated_triton(90, seed=4, tolerate=TRITON_TOLERATES):
        monkeypatch.setattr(launch, "MIN_TMA_FLOPS", 0)
        out, lse = launch.forward(make_problem(packed, **WINDOWS[window]), packed)
    results.append((out[None], lse[None]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_products_of_float32_keep_their_budget(capability):
    """In the emulator; one TF32 product in place of three is 100 budgets off."""
    call = Case(dtype=torch.float32, head_dim=16, head_dim_v=16, lengths=((20, 40),), causal=True, seed=3).build("cpu")
    with emulated_triton(capability, tolerate=TRITON_TOLERATES):
        report = check_backward(
            attention, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, backend="triton", **call.options
        )
    report.require()


def test_threads_that_launch_a_kernel_first_at_once_compile_it_once_and_find_it_loaded(monkeypatch):
    plan = launch._Plan(tiles.Tile(64, 64, 4, 1), {}, {})

    def first():
        launch._launch(None, plan, torch.device("cuda", 0), 1, lambda as_addresses: (), ("aligned",))

    check_compiled_and_loaded_once(monkeypatch, launch, first)


def test_rocm_is_not_taken_for_hopper():
    """A gfx942 reports capability (9, 4)."""
    assert tiles.family_of(GPUTarget("hip", "gfx942", 64)) == "amd"


def cuda(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def assert_as_reference(q, k, v, **options):
    got = attention(q, k, v, backend="triton", **options).float()
    want = attention(q.float(), k.float(), v.float(), backend="reference", **options)
    assert torch.allclose(got, want, atol=2e-2, rtol=2e-2)


@needs_gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_descriptors_and_pointers_give_the_same_bits(dim, causal, heads_first, monkeypatch):
    """Whether tiles come through TMA depends on the amount of work, which must not show in any result."""
    shape = (2, 3, 300, dim) if heads_first else (2, 300, 3, dim)
    q, k, v, do = (cuda(*shape) for _ in range(4))
    if heads_first:
        q, k, v, do = (t.transpose(1, 2) for t in (q, k, v, do))
    results = []
    for least in (0, float("inf")):
        monkeypatch.setattr(launch, "MIN_TMA_FLOPS", least)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = attention(*leaves, causal=causal, backend="triton", return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out, leaves, do)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert_as_reference(q, k, v, causal=causal)


def test_no_descriptor_is_made_over_rows_that_overlap():
    """One key seen at every position has a row stride of 0, which the driver's call for a descriptor refuses."""
    rows = torch.zeros(1, 1, 2, 64).expand(1, 4096, 2, 64)
    assert launch._operand(rows.shape, rows.stride(), 64, True).box is None
    assert launch._operand(rows.shape, rows.contiguous().stride(), 64, True).box is not None
    assert not launch._has_descriptor(rows.shape, rows.stride())
    assert launch._has_descriptor(rows.shape, rows.contiguous().stride())


@needs_gpu
def test_descriptors_do_not_leak_the_next_sequence(monkeypatch):
    """A descriptor sees the whole tensor: rows past a sequence are its neighbour's, here NaN."""
    monkeypatch.setattr(launch, "MIN_TMA_FLOPS", 0)
    q, k, v = (cuda(600, 2, 64) for _ in range(3))
    lone = [t[:130].clone().requires_grad_() for t in (q, k, v)]
    for t in (q, k, v):
        t[130:] = float("nan")
    both = [t.requires_grad_() for t in (q, k, v)]
    one, two = (torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in ([0, 130], [0, 130, 600]))
    alone = attention(*lone, cu_seqlens_q=one, cu_seqlens_k=one, causal=True, backend="triton")
    beside = attention(*both, cu_seqlens_q=two, cu_seqlens_k=two, causal=True, backend="triton")
    assert torch.equal(alone, beside[:130])
    do = cuda(130, 2, 64)
    padded = torch.cat([do, torch.full((470, 2, 64), float("nan"), device="cuda", dtype=do.dtype)])
    for a, b in zip(torch.autograd.grad(alone, lone, do), torch.autograd.grad(beside, both, padded)):
        assert torch.equal(a, b[:130])


@needs_gpu
def test_on_a_side_stream():
    """Launched on another stream than the current one, the kernel would read inputs that are not there yet."""
    q = cuda(2, 2000, 8, 64)
    want = attention(q * 2, q, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = attention(q * 2, q, q)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_current():
    q = torch.randn(1, 300, 4, 64, device="cuda:1", dtype=torch.float16)
    assert torch.cuda.current_device() == 0
    assert_as_reference(q, q, q, causal=True)


@needs_gpu
def test_more_heads_than_a_grid_dimension_holds():
    """65,535 is the limit of a grid's second and third dimension."""
    q = cuda(700, 5, 100, 16)
    got = attention(q, q, q, backend="triton")
    assert torch.equal(got[-1:], attention(q[-1:], q[-1:], q[-1:], backend="triton"))
    assert_as_reference(q[:2], q[:2], q[:2])


@needs_gpu
def test_a_tensor_beyond_2_to_the_31_elements():
    """32-bit offsets wrap around there."""
    total = 2**31 // (32 * 128) + 1000
    kv = torch.zeros(total, 32, 128, device="cuda", dtype=torch.bfloat16)
    tail = cuda(900, 32, 128)
    kv[-900:] = tail
    ends = torch.tensor([0, total - 900, total], dtype=torch.int32, device="cuda")
    q_ends = torch.tensor([0, 0, 900], dtype=torch.int32, device="cuda")
    got = attention(tail, kv, kv, cu_seqlens_q=q_ends, cu_seqlens_k=ends, causal=True, backend="triton")
    assert torch.equal(got[None], attention(tail[None], tail[None], tail[None], causal=True, backend="triton"))


@needs_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_strided_and_broadcast_keys_and_values(dim):
    qkv = cuda(2, 300, 3, 4, dim)
    q, k, v = qkv.unbind(2)
    assert_as_reference(q, k, v, causal=True)
    assert_as_reference(q, k[:, :, :1].expand(-1, -1, 4, -1), v[:1].expand(2, -1, -1, -1))
    assert_as_reference(q[..., 1:33], k[..., 1:33], v[..., 3:])


def test_the_backend_says_what_it_lacks():
    kinds = make_problem(Inputs(*[torch.zeros(1, 4, 2, 8, dtype=torch.float64)] * 3)).kinds
    assert fa4_triton.BACKEND.missing(kinds, torch.device("cpu")) == ("dtype torch.float64",)


def test_tiles_exist_for_every_head_dim_dtype_and_family():
    for target, dim, dtype in itertools.product(ARCHITECTURES, (1, 16, 72, 96, 192, 256), (torch.half, torch.float32)):
        kinds = make_problem(Inputs(*[torch.zeros(1, 4, 2, dim, dtype=dtype)] * 3)).kinds
        for kernel in ("forward", "backward_kv", "backward_q"):
            tile = tiles.tile_for(kernel, kinds, target)
            assert min(tile.m, tile.n) >= 16, (target, dim, dtype, kernel)


@pytest.mark.parametrize("released", [False, True])
def test_how_sequences_lie_changes_no_tile(monkeypatch, released):
    """Packed sequences have the bits of dense ones: those of tiles of the same size, however a program visits them."""
    monkeypatch.setattr(tiles, "SPECIALISING", (triton.__version__.split("+")[0],) * released)
    q = torch.zeros(1, 4, 2, 8, dtype=torch.half)
    plain = make_problem(Inputs(q, q, q)).kinds
    masks = ({}, {"window_right": True}, {"window_left": True}, {"window_left": True, "window_right": True})
    for target, dim, mask, softcap in itertools.product(ARCHITECTURES, (64, 128, 256), masks, (False, True)):
        dense = replace(plain, head_dim=dim, head_dim_v=dim, softcap=softcap, **mask)
        for layout in ({"varlen": True}, {"seqused_k": True}, {"varlen": True, "seqused_q": True, "seqused_k": True}):
            one, other = (tiles.tile_for("forward", kinds, target) for kinds in (dense, replace(dense, **layout)))
            assert (one.m, one.n) == (other.m, other.n), (target, dim, mask, softcap, layout)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_tuner_compiles_its_candidates(monkeypatch):
    """The tuner reaches into the launcher; a change there would show only on a GPU."""
    from benchmarks import tune

    monkeypatch.setattr(tune, "TOKENS", 256)
    monkeypatch.setattr(tune, "TARGET", GPUTarget("cuda", 90, 32))
    for name in ("target_of", "tile_for", "_launch"):
        monkeypatch.setattr(launch, name, getattr(launch, name))
    found = tune.jobs(list(tune.KERNELS), [64])
    for kernel in tune.KERNELS:
        assert tune.compile_ahead(next(job for job in found if job.kernel == kernel)) is None
    launch.forget()
