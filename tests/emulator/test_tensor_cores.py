"""Tensor cores against numpy: a TMA load followed by an MMA is a matrix product for every swizzle, major-ness and
tile.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .errors import RaceError
from .kernels import (
    ELEMENT,
    kernel,
    tensor_memory_product,
    tile_product,
    two_tiles_one_buffer,
    wgmma_from_registers,
)
from .launcher import launch
from .layouts import fragment_a, fragment_b, fragment_c
from .tensor_map import TensorMap

TORCH = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
MAP = {"bf16": "bf16", "f16": "f16", "tf32": "tf32", "e4m3": "u8", "e5m2": "u8"}


def small_integers(shape, kind, seed):
    """Values that every format holds exactly, and whose products float32 sums exactly."""
    values = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()
    return values.to(TORCH[kind])


def run_tile(kind, m, n, k, span, a_mn, b_mn, sm90, seed):
    text, a, b, shared = tile_product(kind, m, n, k, span, a_mn, b_mn, sm90=sm90)
    left, right = small_integers((m, k), kind, seed), small_integers((n, k), kind, seed + 1)
    args = []
    for operand, matrix in ((a, left), (b, right)):
        stored = (matrix.T if operand.mn_major else matrix).contiguous()
        inner, outer = stored.shape[1], stored.shape[0]
        raw = stored.view(torch.uint8)
        args.append(
            (raw, TensorMap(raw.data_ptr(), (inner, outer), (inner * ELEMENT[kind],), operand.box, span, MAP[kind]))
        )
    out = np.full((m, n), np.nan, np.float32)
    launch(
        text,
        1,
        128,
        [args[0][1], args[1][1], out],
        memory=[args[0][0], args[1][0]],
        dynamic_shared=shared,
        seed=seed,
        tolerate=("uninitialised read",) if m == 64 and not sm90 else (),
    )  # 16 of the 32 lanes a warp loads hold no row
    np.testing.assert_array_equal(out, (left.float() @ right.float().T).numpy())


SPANS = st.sampled_from([0, 32, 64, 128])


@settings(max_examples=40, phases=(Phase.explicit, Phase.generate))
@given(
    span=SPANS,
    a_mn=st.booleans(),
    b_mn=st.booleans(),
    m=st.sampled_from([64, 128]),
    n=st.sampled_from([64, 128, 192]),
    k=st.sampled_from([64, 128]),
    kind=st.sampled_from(["bf16", "f16"]),
    seed=st.integers(0, 63),
)
def test_tcgen05_on_tma_tiles_is_a_matrix_product(span, a_mn, b_mn, m, n, k, kind, seed):
    """PTX ISA 9.7.16.4-5, 5.5.7: 16-bit types in both majors."""
    run_tile(kind, m, n, k, span, a_mn, b_mn, False, seed)


@settings(max_examples=16, phases=(Phase.explicit, Phase.generate))
@given(span=SPANS, m=st.sampled_from([64, 128]), n=st.sampled_from([16, 64, 256]),
       kind=st.sampled_from(["tf32", "e4m3", "e5m2"]), seed=st.integers(0, 63))  # fmt: skip
def test_tcgen05_on_other_types_is_a_matrix_product(span, m, n, kind, seed):
    """kind::tf32 and kind::f8f6f4, K-major."""
    if m == 128 and n % 16:
        n = 16
    run_tile(kind, m, n, 128, span, False, False, False, seed)


@settings(max_examples=30, phases=(Phase.explicit, Phase.generate))
@given(span=SPANS, a_mn=st.booleans(), b_mn=st.booleans(), n=st.sampled_from([64, 128]), k=st.sampled_from([64, 128]),
       kind=st.sampled_from(["bf16", "f16"]), seed=st.integers(0, 63))  # fmt: skip
def test_wgmma_on_tma_tiles_is_a_matrix_product(span, a_mn, b_mn, n, k, kind, seed):
    """PTX ISA 9.7.15.5.1."""
    run_tile(kind, 64, n, k, span, a_mn, b_mn, True, seed)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(span=SPANS, kind=st.sampled_from(["tf32", "e4m3", "e5m2"]), seed=st.integers(0, 63))
def test_wgmma_on_other_types_is_a_matrix_product(span, kind, seed):
    run_tile(kind, 64, 64, 128, span, False, False, True, seed)


@dataclass
class RegisterProduct:
    """Inputs of `wgmma_from_registers` and its exact result."""

    kind: str
    n: int
    accumulator: str
    seed: int = 0

    def __post_init__(self) -> None:
        size, dtype = ELEMENT[self.kind], np.float32 if self.accumulator == "f32" else np.float16
        word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        depth = 32 // size
        a, b = small_integers((64, depth), self.kind, self.seed), small_integers((self.n, depth), self.kind, 7)
        c = np.random.default_rng(self.seed).integers(-9, 9, (64, self.n)).astype(np.float32)
        self.a, self.b, self.c = a.float().numpy(), b.float().numpy(), c
        rows, columns = fragment_a(depth, size)
        bits = a.view(word).numpy().reshape(4, 16, depth)
        a_words = [np.ascontiguousarray(w[rows, columns]).view(np.uint32)[..., 0].T for w in bits]
        self.a_words = np.ascontiguousarray(np.concatenate(a_words))
        chunks = b.view(torch.uint8).numpy().reshape(self.n, 2, 16)
        self.b_words = np.ascontiguousarray(chunks.transpose(1, 0, 2))
        self.c_words = self.fragments(c).astype(dtype)
        self.d_words = np.full_like(self.c_words, np.nan)

    def fragments(self, matrix: np.ndarray) -> np.ndarray:
        """(threads, elements a thread) of a 64 x n matrix: PTX ISA 9.7.15.5.1.1.2, written out here by hand."""
        thread, element = np.meshgrid(np.arange(128), np.arange(self.n // 2), indexing="ij")
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (element // 2 % 2)
        return np.ascontiguousarray(matrix[row, 8 * (element // 4) + thread % 4 * 2 + element % 2])

    def run(self, seed: int = 0, scale_a: int = 1, program=None, **text) -> None:
        program = program or wgmma_from_registers(self.kind, self.n, self.accumulator, scale_a=scale_a, **text)
        launch(program, 1, 128, [self.a_words, self.b_words, self.c_words, self.d_words], dynamic_shared=32 * self.n,
               seed=seed)  # fmt: skip
        np.testing.assert_array_equal(self.d_words, self.fragments(scale_a * (self.a @ self.b.T) + self.c))


@settings(max_examples=30, phases=(Phase.explicit, Phase.generate))
@given(kind=st.sampled_from(list(ELEMENT)), n=st.sampled_from([8, 24, 64, 256]),
       accumulator=st.sampled_from(["f32", "f16"]), scale_a=st.sampled_from([1, -1]),
       seed=st.integers(0, 63))  # fmt: skip
def test_wgmma_takes_a_from_registers_and_adds_in_either_precision(kind, n, accumulator, scale_a, seed):
    """PTX ISA 9.7.15.5.1.1 (fragments), 9.7.15.5.2: every type; f16 accumulators where the type allows them."""
    if kind in ("bf16", "tf32"):
        accumulator = "f32"
    RegisterProduct(kind, n, accumulator, seed).run(seed, scale_a)


@settings(max_examples=24, phases=(Phase.explicit, Phase.generate))
@given(pair=st.booleans(), a_in_tmem=st.booleans(), n=st.sampled_from([32, 64, 128]), seed=st.integers(0, 63))
def test_tcgen05_with_a_in_either_memory_alone_or_in_a_pair(pair, a_in_tmem, n, seed):
    """PTX ISA 9.7.16.10: SS and TS forms; cta_group::2 takes its rows of A and half the rows of B from each CTA."""
    ctas = 2 if pair else 1
    a, b = small_integers((128 * ctas, 16), "bf16", seed), small_integers((n, 16), "bf16", seed + 1)

    def image(rows: torch.Tensor) -> np.ndarray:
        """The CTAs' parts, each as columns of 16 bytes."""
        chunks = rows.view(torch.uint8).numpy().reshape(ctas, -1, 2, 16)
        return np.ascontiguousarray(chunks.transpose(0, 2, 1, 3))

    out = np.full((128 * ctas, n), np.nan, np.float32)
    in_rows = np.ascontiguousarray(a.view(torch.uint8).numpy())
    launch(tensor_memory_product(pair, a_in_tmem, n), ctas, 128, [image(a), image(b), in_rows, out],
           cluster=(ctas, 1, 1), dynamic_shared=16384, seed=seed)  # fmt: skip
    np.testing.assert_array_equal(out, (a.float() @ b.float().T).numpy())


SHAPES = [("bf16", 8), ("bf16", 16), ("f16", 16), ("tf32", 4), ("tf32", 8), ("e4m3", 32), ("e5m2", 32)]


@pytest.mark.parametrize(("kind", "k"), SHAPES)
def test_mma_sync_multiplies_fragments(kind, k):
    """PTX ISA 9.7.14.5: fragments are packed by hand here, lane by lane, in two warps with different data."""
    size = ELEMENT[kind]
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[size]
    a_at, b_at, c_at = fragment_a(k, size), fragment_b(k, size), fragment_c(8)
    n_a, n_b = len(a_at[0]), len(b_at[0])
    left, right = small_integers((2, 16, k), kind, 1), small_integers((2, k, 8), kind, 2)
    c = np.random.default_rng(0).integers(-9, 9, (2, 16, 8)).astype(np.float32)
    bits = [
        x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).numpy().view(word)
        for x in (left, right)
    ]
    words = np.empty((64, n_a + n_b + 4), np.uint32)
    for w in range(2):
        a_words = np.ascontiguousarray(bits[0][w][a_at]).view(np.uint32)[..., 0]
        b_words = np.ascontiguousarray(bits[1][w][b_at]).view(np.uint32)[..., 0]
        words[32 * w : 32 * w + 32] = np.concatenate((a_words, b_words, c[w][c_at].view(np.uint32))).T
    count = words.shape[1]
    body = [f"ld.param.b64 %d1, [p0]; mad.wide.u32 %d1, %t, {4 * count}, %d1;"]
    body += [f"ld.global.b32 %r{n}, [%d1+{4 * n}];" for n in range(count)]

    def registers(start, n):
        return "{" + ",".join(f"%r{r}" for r in range(start, start + n)) + "}"

    body.append(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {registers(50, 4)}, {registers(0, n_a)}, "
                f"{registers(n_a, n_b)}, {registers(n_a + n_b, 4)};")  # fmt: skip
    body.append(f"ld.param.b64 %d2, [p1]; mad.wide.u32 %d2, %t, 16, %d2; st.global.v4.b32 [%d2], {registers(50, 4)};")
    out = np.zeros((64, 4), np.float32)
    launch(kernel(2, "\n".join(body), threads=64), 1, 64, [words, out])
    want = left.float().numpy() @ right.float().numpy() + c
    for w in range(2):
        np.testing.assert_array_equal(out[32 * w : 32 * w + 32].T, want[w][c_at])


@pytest.mark.parametrize("transpose", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix_are_inverse_and_place_rows(count, transpose):
    """PTX ISA 9.7.14.5.15-16: lane 8j + r gives the address of row r of matrix j; thread t gets row t/4."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    names = "{" + ",".join(f"%r{10 + n}" for n in range(count)) + "}"
    body = [
        "mov.b32 %r1, smem; ld.param.b64 %d1, [p0]; mad.wide.u32 %d2, %t, 16, %d1; "
        "shl.b32 %r2, %t, 4; add.s32 %r2, %r2, %r1;",
        f"setp.lt.u32 %p1, %t, {8 * count};",
        "@%p1 ld.global.v4.b32 {%r4,%r5,%r6,%r7}, [%d2]; @%p1 st.shared.v4.b32 [%r2], {%r4,%r5,%r6,%r7};",
        f"bar.warp.sync -1; rem.u32 %r3, %t, {8 * count}; shl.b32 %r3, %r3, 4; add.s32 %r3, %r3, %r1;",
        f"ldmatrix.sync.aligned.m8n8.x{count}{transpose}.shared.b16 {names}, [%r3];",
        f"ld.param.b64 %d3, [p1]; mad.wide.u32 %d3, %t, {4 * count}, %d3;",
        *[f"st.global.b32 [%d3+{4 * n}], %r{10 + n};" for n in range(count)],
        f"add.s32 %r3, %r3, 1024; "
        f"stmatrix.sync.aligned.m8n8.x{count}{transpose}.shared.b16 [%r3], {names}; bar.warp.sync -1;",
        "ld.param.b64 %d4, [p2]; mad.wide.u32 %d4, %t, 16, %d4;",
        "@%p1 ld.shared.v4.b32 {%r4,%r5,%r6,%r7}, [%r2+1024]; @%p1 st.global.v4.b32 [%d4], {%r4,%r5,%r6,%r7};",
    ]
    loaded, copied = np.zeros((32, count), np.uint32), np.zeros_like(matrices)
    launch(kernel(3, "\n".join(body)), 1, 32, [matrices, loaded, copied], dynamic_shared=2048)
    np.testing.assert_array_equal(copied, matrices)
    source = matrices.transpose(0, 2, 1) if transpose else matrices
    np.testing.assert_array_equal(
        loaded.T.reshape(count, -1), np.ascontiguousarray(source).reshape(count, -1).view(np.uint32)
    )


@pytest.mark.parametrize("seed", range(6))
def test_refilling_a_buffer_that_an_mma_may_still_read_is_flagged_on_every_schedule(seed):
    """The race of a published example (CUTLASS 1cta_mma_basic with more than one K tile); with the wait it is gone."""
    for waits in (True, False):
        text, a, b, shared = two_tiles_one_buffer(waits)
        left, right = small_integers((128, 128), "bf16", seed), small_integers((64, 128), "bf16", seed + 1)
        raw = [x.view(torch.uint8) for x in (left, right)]
        maps = [
            TensorMap(r.data_ptr(), (128, rows), (256,), operand.box, 128, "bf16")
            for r, rows, operand in zip(raw, (128, 64), (a, b))
        ]
        out = np.full((128, 64), np.nan, np.float32)
        if waits:
            launch(text, 1, 128, [*maps, out], memory=raw, dynamic_shared=shared, seed=seed)
            np.testing.assert_array_equal(out, (left.float() @ right.float().T).numpy())
        else:
            with pytest.raises(RaceError, match=r"write-after-read race.*TMA load"):
                launch(text, 1, 128, [*maps, out], memory=raw, dynamic_shared=shared, seed=seed)
