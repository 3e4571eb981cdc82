"""Swizzles, descriptors and fragments: every function is a one-to-one map, and the small ones are worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import layouts
from .layouts import InstructionDescriptor, SharedDescriptor
from .tensor_map import TensorMap, decode, encode


@given(base=st.integers(0, 1000), span=st.sampled_from([0, 32, 64, 128]))
def test_swizzle_permutes_the_chunks_of_a_kilobyte(base, span):
    """PTX ISA 5.5.7: an involution on 16-byte chunks that stays in the aligned block it starts in."""
    address = 1024 * base + 16 * np.arange(64)
    moved = layouts.swizzle(address, span)
    np.testing.assert_array_equal(np.sort(moved), address)
    np.testing.assert_array_equal(layouts.swizzle(moved, span), address)
    assert (moved // max(span, 16) == address // max(span, 16)).all()


def test_swizzle_128_by_hand():
    """Row r of 128 bytes: chunk c moves to c xor r."""
    for row in range(8):
        for chunk in range(8):
            assert layouts.swizzle(128 * row + 16 * chunk, 128) == 128 * row + 16 * (chunk ^ row)
    assert layouts.swizzle(0x180, 32) == 0x190
    assert layouts.swizzle(0x180, 64) == 0x1B0


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_descriptor_offsets_are_distinct_and_element_aligned(mn_major, span, size):
    depth = 32 // size
    leading, stride = (1024, 128) if span == 0 else (8 * span * 8, 8 * span)
    offsets = SharedDescriptor(0, leading, stride, span).offsets(64, depth, size, mn_major)
    assert offsets.shape == (64, depth)
    assert len(np.unique(offsets)) == offsets.size
    assert (offsets % size == 0).all()


def test_shared_descriptor_fields():
    """PTX ISA 9.7.16.4.1: start, leading and stride in 16-byte units, swizzle in bits 61-63 (62-63 for wgmma)."""
    bits = (0x1400 >> 4) | (0x40 >> 4) << 16 | (0x400 >> 4) << 32
    assert SharedDescriptor.decode_sm100(bits | 2 << 61) == SharedDescriptor(0x1400, 0x40, 0x400, 128)
    assert SharedDescriptor.decode_sm100(bits | 6 << 61) == SharedDescriptor(0x1400, 0x40, 0x400, 32)
    assert SharedDescriptor.decode_sm90(bits | 2 << 62) == SharedDescriptor(0x1400, 0x40, 0x400, 64)


def test_instruction_descriptor_fields():
    """PTX ISA 9.7.16.4.2."""
    bits = 1 << 4 | 1 << 7 | 1 << 10 | 1 << 14 | 1 << 16 | (96 // 8) << 17 | (128 // 16) << 24
    got = InstructionDescriptor.decode(bits)
    assert got == InstructionDescriptor(128, 96, 1, 1, 1, False, True, False, True)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("k", [8, 16, 32])
def test_fragments_cover_each_element_once(size, k):
    """PTX ISA 9.7.14.5: A is 16 x k, B is k x 8, C is 16 x 8."""
    if k * size < 16:
        pytest.skip("no such shape")
    for (row, column), shape in ((layouts.fragment_a(k, size), (16, k)), (layouts.fragment_b(k, size), (k, 8))):
        flat = np.ravel_multi_index((row.ravel(), np.broadcast_to(column, row.shape).ravel()), shape)
        assert sorted(flat) == list(range(shape[0] * shape[1]))
    row, column = layouts.fragment_c(8)
    assert sorted((row * 8 + column).ravel()) == list(range(128))


@pytest.mark.parametrize(("shape", "per_column"), [("32x32b", 1), ("16x64b", 0.5), ("16x128b", 0.5), ("16x256b", 0.5)])
def test_tmem_shapes_cover_a_rectangle_once(shape, per_column):
    """PTX ISA 9.7.16.8: 32 threads x registers tile 32 or 16 lanes without overlap."""
    lanes, columns = layouts.tmem_cells(shape, 8, 32, 64)
    cells = set(zip(lanes.ravel().tolist(), columns.ravel().tolist()))
    height = 32 if shape == "32x32b" else 16
    assert cells == {(32 + n, 64 + c) for n in range(height) for c in range(8 * 32 // height)}


def test_accumulator_rows():
    """PTX ISA 9.7.16.10.5: M=64 uses 16 lanes of each quarter."""
    assert layouts.accumulator_lanes(64, False, 0).tolist() == [32 * (r // 16) + r % 16 for r in range(64)]
    assert layouts.accumulator_lanes(128, False, 0).tolist() == list(range(128))
    assert layouts.accumulator_lanes(256, True, 0).tolist() == list(range(128))
    assert layouts.accumulator_lanes(128, True, 0).tolist() == list(range(64))


def test_tensor_map_windows_clip_and_maps_are_checked():
    tmap = TensorMap(0x1000, (10, 5), (32,), (8, 4), 0, "bf16")
    slices, first, shape, strides = tmap.window([-2, 3])
    assert (slices, first, shape, strides) == ((slice(0, 2), slice(2, 8)), 0x1000 + 3 * 32, (2, 6), (32, 2))
    assert tmap.window([10, 0]) is None
    assert decode(encode(7)) == 7
    assert decode(bytes(128)) is None
    with pytest.raises(ValueError, match="multiples of 16"):
        TensorMap(0x1008, (10, 5), (32,), (8, 4), 0, "bf16")
    with pytest.raises(ValueError, match="exceeds the swizzle"):
        TensorMap(0x1000, (64, 5), (128,), (64, 4), 64, "bf16")
