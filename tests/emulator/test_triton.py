"""Triton kernels as compiled for each architecture: small ones of our own, then the project's, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="needs the package triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from .launcher import launch_triton  # noqa: E402

CAPABILITIES = (80, 89, 90, 100, 120)
_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


def compile_for(capability, kernel, args, constants, warps=4, stages=2):
    """Compiles for a target, types from the arguments; pointers and descriptors are 16-byte aligned."""
    signature, attributes = {}, {}
    for at, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPE[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPE[value.base.dtype]}{list(value.block_shape)}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    signature.update(dict.fromkeys(constants, "constexpr"))
    options = {"num_warps": warps, "num_stages": stages}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(tensor, rows, columns):
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def gemm(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        inside = (start + depth) < k
        left = tl.load(a + rows[:, None] * k + (start + depth)[None, :], (rows[:, None] < m) & inside[None, :], 0.0)
        right = tl.load(
            b + (start + depth)[:, None] * n + columns[None, :], inside[:, None] & (columns[None, :] < n), 0.0
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + rows[:, None] * n + columns[None, :], acc, (rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def gemm_descriptors(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        acc = tl.dot(a.load([row, start]), b.load([start, column]), acc)
    c.store([row, column], acc)


@triton.jit
def softmax(x, y, n, N: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, N)
    values = tl.load(x + row * n + at, at < n, -float("inf"))
    e = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * n + at, e / tl.sum(e, 0), at < n)


@triton.jit
def histogram(x, counts, sums, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at, at < n, 0)
    tl.atomic_add(counts + value % 8, 1, at < n)
    tl.atomic_add(sums + value % 8, value.to(tl.float32), at < n)


@triton.jit
def ordered_sum(x, total, turn, N: tl.constexpr):
    """Programs add in order: each waits for its turn on a semaphore in global memory."""
    pid = tl.program_id(0)
    while tl.atomic_cas(turn, pid, pid) != pid:
        pass
    before = tl.load(total, volatile=True)
    tl.store(total, before * 0.5 + tl.load(x + pid))
    tl.debug_barrier()
    tl.atomic_xchg(turn, pid + 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32")]
)
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(m=st.integers(1, 130), n=st.integers(1, 100), k=st.integers(1, 100), seed=st.integers(0, 31))
def test_gemm_matches_float64(capability, dtype, precision, m, n, k, seed):
    """cp.async or plain loads, ldmatrix, then mma.sync (80, 89, 120), wgmma (90) or tcgen05 (100)."""
    a, b, c = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1), torch.full((m, n), float("nan"))
    constants = {"M": 64, "N": 64, "K": 32, "PRECISION": precision}
    compiled = compile_for(capability, gemm, [a, b, c, m, n, k], constants)
    launch_triton(compiled, (-(-m // 64), -(-n // 64)), [a, b, c, m, n, k], seed=seed)
    want = a.double() @ b.double()
    bound = (2e-6 if dtype != torch.float32 else 2e-3) * (a.double().abs() @ b.double().abs()) + 1e-6
    assert ((c - want).abs() <= bound).all()


@pytest.mark.parametrize("capability", [90, 100, 120])
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(m=st.integers(1, 130), n=st.sampled_from([8, 64, 104]), k=st.sampled_from([8, 64, 120]), seed=st.integers(0, 31))
def test_gemm_through_tensor_maps_matches_float64(capability, m, n, k, seed):
    """TMA loads with zero fill past the edge, swizzled operands, TMA store clipped at the edge."""
    a, b = randn(m, k, dtype=torch.bfloat16), randn(k, n, dtype=torch.bfloat16, seed=1)
    c = torch.full((m, n), float("nan"))
    args = [described(a, 64, 64), described(b, 64, 64), described(c, 64, 64), k]
    compiled = compile_for(capability, gemm_descriptors, args, {"M": 64, "N": 64, "K": 64})
    launch_triton(compiled, (-(-m // 64), -(-n // 64)), args, seed=seed)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("capability", CAPABILITIES)
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(rows=st.integers(1, 6), n=st.integers(1, 256), seed=st.integers(0, 31))
def test_softmax_reduces_across_warps(capability, rows, n, seed):
    x, y = randn(rows, n, dtype=torch.float32), torch.full((rows, n), float("nan"))
    launch_triton(compile_for(capability, softmax, [x, y, n], {"N": 256}), (rows,), [x, y, n], seed=seed)
    torch.testing.assert_close(y, torch.softmax(x.double(), 1).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("capability", CAPABILITIES)
@settings(max_examples=3, phases=(Phase.explicit, Phase.generate))
@given(n=st.integers(1, 500), seed=st.integers(0, 31))
def test_global_atomics_add_every_lane(capability, n, seed):
    x = torch.arange(n, dtype=torch.int32) * 7
    counts, sums = torch.zeros(8, dtype=torch.int32), torch.zeros(8)
    compiled = compile_for(capability, histogram, [x, counts, sums, n], {"N": 128})
    launch_triton(compiled, (-(-n // 128),), [x, counts, sums, n], seed=seed)
    np.testing.assert_array_equal(counts.numpy(), np.bincount(x.numpy() % 8, minlength=8))
    np.testing.assert_array_equal(sums.numpy(), np.bincount(x.numpy() % 8, x.numpy(), minlength=8))


@pytest.mark.parametrize("seed", range(4))
def test_programs_in_flight_together_can_hand_over_a_semaphore(seed):
    """A later program spins until an earlier one has finished: needs several clusters resident at once."""
    x, total, turn = torch.arange(1.0, 7.0), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    compiled = compile_for(90, ordered_sum, [x, total, turn], {"N": 1}, warps=1)
    launch_triton(compiled, (6,), [x, total, turn], seed=seed)
    want = 0.0
    for value in x.tolist():
        want = want * 0.5 + value
    assert total.item() == want
