"""Register arithmetic against numpy, one instruction at a time, on edge values and random ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import lanes
from .kernels import elementwise, kernel
from .launcher import launch

N = 64
RNG = np.random.default_rng(7)
F4 = np.float32


def floats(n=N):
    edges = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 1e-38, 0.5, 2.5, -2.5], F4)
    return np.concatenate((edges, RNG.standard_normal(n - len(edges)).astype(F4) * F4(8)))


def ints(dtype, n=N):
    info = np.iinfo(dtype)
    edges = np.array([0, 1, 2, 31, 32, 33, info.max, info.min, info.max - 1, info.min + 1], dtype)
    return np.concatenate((edges, RNG.integers(info.min, info.max, n - len(edges), dtype, endpoint=True)))


def flushed(values):
    return np.where(np.abs(values) < np.finfo(F4).tiny, np.copysign(F4(0), values), values)


def run(instruction, types, output, *inputs):
    bits = [np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in inputs]
    return elementwise(instruction, types, output, bits)


def same_floats(got, want):
    np.testing.assert_array_equal(got.view(want.dtype), want)


a, b, c = floats(), np.roll(floats(), 5), np.roll(floats(), 11)
i, j, k = ints(np.int32), np.roll(ints(np.int32), 7), np.roll(ints(np.int32), 3)
u, w = i.view(np.uint32), j.view(np.uint32)
x, y = ints(np.int64), np.roll(ints(np.int64), 7)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.rn.f32 {d}, {0}, {1};", a + b),
        ("sub.f32 {d}, {0}, {1};", a - b),
        ("mul.f32 {d}, {0}, {1};", a * b),
        ("fma.rn.f32 {d}, {0}, {1}, {2};", (a.astype(np.float64) * b + c).astype(F4)),
        ("max.f32 {d}, {0}, {1};", np.fmax(a, b)),
        ("max.NaN.f32 {d}, {0}, {1};", np.maximum(a, b)),
        ("min.f32 {d}, {0}, {1};", np.fmin(a, b)),
        ("max.f32 {d}, {0}, {1}, {2};", np.fmax(np.fmax(a, b), c)),
        ("neg.f32 {d}, {0};", -a),
        ("abs.f32 {d}, {0};", np.abs(a)),
        ("div.full.f32 {d}, {0}, {1};", a / b),
        ("rcp.approx.ftz.f32 {d}, {0};", flushed(F4(1) / flushed(a))),
        ("add.ftz.f32 {d}, {0}, {1};", flushed(flushed(a) + flushed(b))),
        ("sqrt.approx.f32 {d}, {0};", np.sqrt(a)),
        ("copysign.f32 {d}, {0}, {1};", np.copysign(b, a)),
    ],
)
def test_float32_arithmetic_is_ieee(instruction, want):
    """PTX ISA 9.7.3: NaN, infinity, signed zero and subnormals included."""
    same_floats(run(instruction, ["f32"] * 3, "f32", *(a, b, c)[: instruction.count("{") - 1]), want)


@pytest.mark.parametrize("instruction", ["ex2.approx.f32", "ex2.approx.ftz.f32", "lg2.approx.f32", "tanh.approx.f32"])
def test_special_functions_are_within_the_error_that_ptx_allows(instruction):
    """PTX ISA 9.7.3.19-22: 2 ulp or so; here against float64."""
    function = {"ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh}[instruction[:3].replace("tan", "tanh")]
    finite = np.abs(a[np.isfinite(a)])
    got = run(f"{instruction} {{d}}, {{0}};", ["f32"], "f32", finite).view(F4)
    want = function(
        np.where(finite < 1.2e-38, 0, finite).astype(np.float64) if "ftz" in instruction else finite.astype(np.float64)
    )
    big = want > 3.4e38
    assert np.isinf(got[big]).all()
    np.testing.assert_allclose(got[~big], want[~big], rtol=3e-7, atol=1e-38)


def test_add_rounding_down_never_exceeds_the_exact_sum():
    """PTX ISA 9.7.3.3, `.rm`: the software exp2 relies on it."""
    p, q = (RNG.standard_normal(N).astype(F4) * F4(100) for _ in range(2))
    got = run("add.rm.f32 {d}, {0}, {1};", ["f32", "f32"], "f32", p, q).view(F4)
    exact = p.astype(np.float64) + q
    assert (got <= exact).all()
    assert (np.nextafter(got, F4(np.inf)) > exact).all()


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.s32 {d}, {0}, {1};", i + j),
        ("sub.s32 {d}, {0}, {1};", i - j),
        ("mul.lo.s32 {d}, {0}, {1};", i * j),
        ("mul.hi.s32 {d}, {0}, {1};", ((i.astype(np.int64) * j) >> 32).astype(np.int32)),
        ("mad.lo.s32 {d}, {0}, {1}, {2};", i * j + k),
        (
            "div.s32 {d}, {0}, {1};",
            np.where(j == 0, -1, np.trunc(i / np.where(j == 0, 1, j).astype(np.float64)))
            .astype(np.int64)
            .astype(np.int32),
        ),
        (
            "rem.s32 {d}, {0}, {1};",
            np.where(j == 0, i, np.fmod(i.astype(np.int64), np.where(j == 0, 1, j))).astype(np.int32),
        ),
        ("max.s32 {d}, {0}, {1};", np.maximum(i, j)),
        ("min.relu.s32 {d}, {0}, {1};", np.maximum(np.minimum(i, j), 0)),
        ("and.b32 {d}, {0}, {1};", i & j),
        ("xor.b32 {d}, {0}, {1};", i ^ j),
        ("not.b32 {d}, {0};", ~i),
        ("neg.s32 {d}, {0};", -i),
        ("abs.s32 {d}, {0};", np.abs(i)),
        ("shr.s32 {d}, {0}, 31;", i >> 31),
        ("shr.s32 {d}, {0}, 40;", i >> 31),
        ("shl.b32 {d}, {0}, {1};", np.where(w < 32, i << np.minimum(w, 31).astype(np.int32), 0)),
        ("shr.s32 {d}, {0}, {1};", i >> np.minimum(w, 31).astype(np.int32)),
    ],
)
def test_int32_arithmetic_wraps_and_shifts_clamp(instruction, want):
    """PTX ISA 9.7.1 and 9.7.8; a zero divisor gives all ones."""
    got = run(instruction, ["s32"] * 3, "s32", *(i, j, k)[: instruction.count("{") - 1])
    np.testing.assert_array_equal(got.view(np.int32), want.astype(np.int32))


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("mul.hi.u32 {d}, {0}, {1};", ((u.astype(np.uint64) * w) >> np.uint64(32)).astype(np.uint32)),
        ("div.u32 {d}, {0}, {1};", np.where(w == 0, 0xFFFFFFFF, u // np.where(w == 0, 1, w)).astype(np.uint32)),
        ("shr.u32 {d}, {0}, {1};", np.where(w < 32, u >> np.minimum(w, 31), 0).astype(np.uint32)),
        ("shr.b32 {d}, {0}, 4;", u >> np.uint32(4)),
        ("max.u32 {d}, {0}, {1};", np.maximum(u, w)),
    ],
)
def test_uint32_arithmetic(instruction, want):
    np.testing.assert_array_equal(run(instruction, ["u32"] * 2, "u32", *(u, w)[: instruction.count("{") - 1]), want)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.s64 {d}, {0}, {1};", x + y),
        ("mul.lo.s64 {d}, {0}, {1};", x * y),
        ("mul.hi.s64 {d}, {0}, {1};", np.array([(int(p) * int(q)) >> 64 for p, q in zip(x, y)], np.int64)),
        (
            "mul.hi.u64 {d}, {0}, {1};",
            np.array([(int(p) * int(q)) >> 64 for p, q in zip(x.view(np.uint64), y.view(np.uint64))], np.uint64).view(
                np.int64
            ),
        ),
        ("shr.u64 {d}, {0}, 33;", (x.view(np.uint64) >> np.uint64(33)).view(np.int64)),
        ("or.b64 {d}, {0}, {1};", x | y),
    ],
)
def test_int64_arithmetic(instruction, want):
    got = run(instruction, ["s64"] * 2, "s64", *(x, y)[: instruction.count("{") - 1])
    np.testing.assert_array_equal(got.view(np.int64), want)


def test_wide_products_keep_every_bit():
    """PTX ISA 9.7.1.3-4."""
    got = run("mul.wide.s32 {d}, {0}, {1};", ["s32", "s32"], "s64", i, j)
    np.testing.assert_array_equal(got.view(np.int64), i.astype(np.int64) * j)
    got = run("mad.wide.u32 {d}, {0}, {1}, {2};", ["u32", "u32", "u64"], "u64", u, w, x.view(np.uint64))
    np.testing.assert_array_equal(got, u.astype(np.uint64) * w + x.view(np.uint64))


def _bit_field(value, position, length, signed):
    position, length = position & 255, length & 255
    bits = [
        (value >> (position + n)) & 1 if position + n < 32 else (value >> 31 if signed else 0) & 1
        for n in range(min(length, 32))
    ]
    if signed:
        fill = (value >> min(position + length - 1, 31)) & 1 if length else 0
        bits += [fill] * (32 - len(bits))
    return sum(bit << n for n, bit in enumerate(bits)) & 0xFFFFFFFF


@pytest.mark.parametrize("signed", [False, True])
def test_bfe_extracts_and_extends_fields(signed):
    """PTX ISA 9.7.1.19, by its pseudocode."""
    position, length = RNG.integers(0, 40, N).astype(np.uint32), RNG.integers(0, 40, N).astype(np.uint32)
    name = "s32" if signed else "u32"
    got = run(f"bfe.{name} {{d}}, {{0}}, {{1}}, {{2}};", [name, "u32", "u32"], name, u, position, length)
    want = [_bit_field(int(v), int(p), int(n), signed) for v, p, n in zip(u, position, length)]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@given(table=st.integers(0, 255), seed=st.integers(0, 2**32 - 1))
def test_lop3_is_its_truth_table(table, seed):
    """PTX ISA 9.7.8.6: the table is the function applied to 0xF0, 0xCC, 0xAA."""
    p, q, r = np.random.default_rng(seed).integers(0, 2**32, (3, 8), dtype=np.uint32)
    want = np.zeros(8, np.uint32)
    for bit in range(32):
        index = (p >> bit & 1) * 4 + (q >> bit & 1) * 2 + (r >> bit & 1)
        want |= (np.uint32(table) >> index & np.uint32(1)) << np.uint32(bit)
    np.testing.assert_array_equal(lanes.lop3(p, q, r, table), want)


@given(seed=st.integers(0, 2**32 - 1))
def test_prmt_picks_bytes_and_replicates_signs(seed):
    """PTX ISA 9.7.9.7, default mode."""
    p, q, selector = np.random.default_rng(seed).integers(0, 2**32, (3, 8), dtype=np.uint32)
    for lane, (first, second, s) in enumerate(zip(p, q, selector)):
        octets = [(int(first) | int(second) << 32) >> 8 * n & 0xFF for n in range(8)]
        want = 0
        for n in range(4):
            nibble = int(s) >> 4 * n & 15
            octet = octets[nibble & 7]
            want |= (0xFF * (octet >> 7) if nibble & 8 else octet) << 8 * n
        assert lanes.permute(p, q, selector)[lane] == want


def test_bit_counting_and_reversal():
    """PTX ISA 9.7.1.14-17."""
    values = np.concatenate((u, np.uint32(1) << np.arange(32, dtype=np.uint32)))
    texts = [f"{int(v):032b}" for v in values]
    for name, want in (
        ("popc.b32", [t.count("1") for t in texts]),
        ("clz.b32", [len(t) - len(t.lstrip("0")) for t in texts]),
        ("brev.b32", [int(t[::-1], 2) for t in texts]),
        ("bfind.u32", [31 - (len(t) - len(t.lstrip("0"))) if "1" in t else 0xFFFFFFFF for t in texts]),
    ):
        np.testing.assert_array_equal(run(f"{name} {{d}}, {{0}};", ["b32"], "b32", values), np.array(want, np.uint32))


def test_funnel_shifts_join_two_words():
    """PTX ISA 9.7.8.5."""
    count = RNG.integers(0, 70, N).astype(np.uint32)
    joined = (w.astype(object) << 32) | u.astype(object)
    got = run("shf.r.wrap.b32 {d}, {0}, {1}, {2};", ["b32"] * 3, "b32", u, w, count)
    np.testing.assert_array_equal(got, [int(v) >> int(n % 32) & 0xFFFFFFFF for v, n in zip(joined, count)])
    got = run("shf.l.clamp.b32 {d}, {0}, {1}, {2};", ["b32"] * 3, "b32", u, w, count)
    np.testing.assert_array_equal(got, [(int(v) << int(min(n, 32))) >> 32 & 0xFFFFFFFF for v, n in zip(joined, count)])


@pytest.mark.parametrize(
    ("comparison", "want"),
    [("lt", a < b), ("ge", a >= b), ("eq", a == b), ("ne", (a < b) | (a > b)), ("neu", a != b), ("ltu", ~(a >= b)),
     ("equ", ~((a < b) | (a > b))), ("num", (a == a) & (b == b)), ("nan", (a != a) | (b != b))],
)  # fmt: skip
def test_float_comparisons_with_nan(comparison, want):
    """PTX ISA 9.7.6.2: ordered forms are false for NaN, unordered ones true."""
    got = run(f"setp.{comparison}.f32 {{d}}, {{0}}, {{1}};", ["f32", "f32"], "pred", a, b)
    np.testing.assert_array_equal(got.astype(bool), want)


def test_setp_combines_and_negates():
    got = run("setp.gt.s32 %p2, {0}, 0; setp.lt.and.s32 {d}|%p3, {0}, {1}, %p2;", ["s32", "s32"], "pred", i, j)
    np.testing.assert_array_equal(got.astype(bool), (i < j) & (i > 0))
    got = run("setp.gt.s32 %p2, {0}, 0; setp.lt.or.s32 %p3|{d}, {0}, {1}, !%p2;", ["s32", "s32"], "pred", i, j)
    np.testing.assert_array_equal(got.astype(bool), ~(i < j) | ~(i > 0))


def _bf16_by_hand(value):
    import torch

    return torch.tensor(value).bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_bf16_conversion_rounds_to_nearest_even_as_torch_does():
    """PTX ISA 9.7.9.21; `cvt.rn.bf16x2` puts its first source into the high half."""
    finite = np.where(np.isnan(a), F4(1), a)
    other = np.roll(finite, 1)
    got = run("cvt.rn.bf16x2.f32 {d}, {0}, {1};", ["f32", "f32"], "b32", finite, other)
    np.testing.assert_array_equal(got & 0xFFFF, _bf16_by_hand(other))
    np.testing.assert_array_equal(got >> 16, _bf16_by_hand(finite))
    ties = (np.arange(N, dtype=np.uint32) * 0x8000 + 0x3F800000).view(F4)
    np.testing.assert_array_equal(run("cvt.rn.bf16.f32 {d}, {0};", ["f32"], "b16", ties), _bf16_by_hand(ties))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_conversion_matches_torch_and_saturates(kind):
    import torch

    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    largest = 448.0 if kind == "e4m3" else 57344.0
    values = np.concatenate(
        (
            RNG.standard_normal(48).astype(F4) * F4(3),
            np.array([0, 1e-9, 2**-9, 2**-10, 1e6, -1e6, 464.0, 61440.0] * 2, F4),
        )
    )
    got = run(f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{0}}, {{1}};", ["f32", "f32"], "b16", values, values)
    want = torch.tensor(values).clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got & 0xFF, want)
    np.testing.assert_array_equal(got >> 8, want)
    np.testing.assert_array_equal(lanes.FP8_VALUE[kind][want], torch.tensor(want).view(dtype).float().numpy())


@pytest.mark.parametrize(
    ("instruction", "types", "output", "value", "want"),
    [
        (
            "cvt.rzi.s32.f32",
            ["f32"],
            "s32",
            a,
            np.where(np.isnan(a), 0, np.clip(np.trunc(a.astype(np.float64)), -(2**31), 2**31 - 1))
            .astype(np.int64)
            .astype(np.int32),
        ),
        ("cvt.rmi.f32.f32", ["f32"], "f32", a, np.floor(a)),
        ("cvt.rn.f32.s32", ["s32"], "f32", i, i.astype(F4)),
        ("cvt.rn.f32.u32", ["u32"], "f32", u, u.astype(F4)),
        ("cvt.rn.f16.f32", ["f32"], "b16", a, a.astype(np.float16)),
        ("cvt.f32.f16", ["f16"], "f32", a.astype(np.float16), a.astype(np.float16).astype(F4)),
        ("cvt.s64.s32", ["s32"], "s64", i, i.astype(np.int64)),
        ("cvt.u64.u32", ["u32"], "u64", u, u.astype(np.uint64)),
        ("cvt.u32.u64", ["u64"], "u32", x, x.view(np.uint64).astype(np.uint32)),
        ("cvt.u16.u32", ["u32"], "u16", u, u.astype(np.uint16)),
        ("cvt.s32.s8", ["b32"], "s32", u, u.astype(np.uint8).view(np.int8).astype(np.int32)),
    ],
)
def test_conversions(instruction, types, output, value, want):
    """PTX ISA 9.7.9.21: saturation, NaN to 0, sign and zero extension."""
    got = run(f"{instruction} {{d}}, {{0}};", types, output, value)
    np.testing.assert_array_equal(got.view(want.dtype), want)


def test_packed_float_pairs_compute_both_halves():
    """PTX ISA 9.7.3.3-6, `.f32x2`."""
    p, q, r = (RNG.standard_normal((32, 2)).astype(F4) for _ in range(3))
    words = [v.reshape(-1).view(np.uint64) for v in (p, q, r)]
    for name, want in (("add.rn.f32x2", p + q), ("sub.f32x2", p - q), ("mul.f32x2", p * q)):
        got = elementwise(f"{name} {{d}}, {{0}}, {{1}};", ["f32x2"] * 2, "f32x2", words[:2])
        np.testing.assert_array_equal(got.view(F4).reshape(-1, 2), want)
    got = elementwise("fma.rn.f32x2 {d}, {0}, {1}, {2};", ["f32x2"] * 3, "f32x2", words)
    np.testing.assert_array_equal(got.view(F4).reshape(-1, 2), (p.astype(np.float64) * q + r).astype(F4))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves_round_once(kind):
    """PTX ISA 9.7.4.1-4."""
    import torch

    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    p, q = (torch.randn(32, 2, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))
    words = [v.contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint32) for v in (p, q)]
    for name, want in (("add", p + q), ("mul", p * q), ("max", torch.maximum(p, q))):
        got = elementwise(f"{name}.{kind} {{d}}, {{0}}, {{1}};", [kind] * 2, kind, words)
        np.testing.assert_array_equal(got.view(np.int16).reshape(-1, 2), want.view(torch.int16).numpy())


def test_selection_and_vector_moves():
    """PTX ISA 9.7.6.3, 9.7.9.3."""
    got = run("setp.lt.s32 %p2, {0}, {1}; selp.b32 {d}, {0}, {1}, %p2;", ["s32", "s32"], "s32", i, j)
    np.testing.assert_array_equal(got.view(np.int32), np.minimum(i, j))
    got = run("mov.b64 {%r1, %r2}, {0}; mov.b64 {d}, {%r2, %r1};", ["b64"], "b64", x)
    np.testing.assert_array_equal(got, (x.view(np.uint64) >> np.uint64(32)) | (x.view(np.uint64) << np.uint64(32)))
    got = run("mov.b32 {%h1, %h2}, {0}; mov.b32 {d}, {%h2, %h1};", ["b32"], "b32", u)
    np.testing.assert_array_equal(got, (u >> np.uint32(16)) | (u << np.uint32(16)))


def test_predicated_code_writes_only_chosen_lanes():
    got = run(
        "setp.lt.s32 %p2, {0}, 0; mov.b32 {d}, 1; @%p2 add.s32 {d}, {d}, 4; @!%p2 mul.lo.s32 {d}, {d}, 3;",
        ["s32"],
        "s32",
        i,
    )
    np.testing.assert_array_equal(got, np.where(i < 0, 5, 3))


@pytest.mark.parametrize(
    "way",
    [
        "mov.b64 %d2, p1; ld.param.b64 %d3, [%d2];",
        "mov.b64 %d2, p1; cvta.param.u64 %d2, %d2; ld.b64 %d3, [%d2];",
        "mov.b32 %r1, p1; cvt.u64.u32 %d2, %r1; cvta.param.u64 %d2, %d2; ld.b64 %d3, [%d2];",
        "mov.b32 %r1, p1; ld.param.b64 %d3, [%r1];",
        "cvta.param.u64 %d2, p1; cvta.to.param.u64 %d2, %d2; ld.param.b64 %d3, [%d2];",
    ],
)
def test_a_parameters_address_is_generic_or_in_its_space_of_32_bits(way):
    """PTX ISA 9.7.9.20 (cvta). Triton 3.9 takes the address of a tensor map in 32 bits."""
    out = np.zeros(1, np.uint64)
    launch(kernel(2, f"{way} ld.param.b64 %d1, [p0]; st.global.b64 [%d1], %d3;"), 1, 32, [out, 2**40 + 7])
    assert out[0] == 2**40 + 7


def test_long_unrolled_code_is_not_reordered_across_dependences():
    """The run compiler groups by level; a register reused as in a loop body must not let a later write pass a read."""
    lines = ["mov.b32 %r1, {0}; mov.b32 {d}, 0;"]
    for n in range(40):
        lines += [f"add.s32 %r2, %r1, {n};", "add.s32 {d}, {d}, %r2;", "xor.b32 %r1, %r1, {d};"]
    value, total = i.copy(), np.zeros_like(i)
    for n in range(40):
        total = total + (value + np.int32(n))
        value = value ^ total
    np.testing.assert_array_equal(run(" ".join(lines), ["s32"], "s32", i).view(np.int32), total)
