"""The order in which the CuTe kernels work on query tiles, executed, against a model of it in plain Python."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="needs the package nvidia-cutlass-dsl"
)

from .cute_backend import run  # noqa: E402
from .cute_compile import Request  # noqa: E402

NUMBERED = 2**30 - 1
"""Items that a call may have."""
LAST_SECTION = 2
"""How much larger the last section of heads is than the others."""


class Order(NamedTuple):
    """What of an order is fixed when a kernel is compiled: the probe's arguments, see there."""

    tile_m: int
    longest_first: bool
    packed: bool = False
    used: bool = False
    drawn: bool = False


@dataclass
class Call:
    """Lengths as the kernel gets them, index tensors as lists."""

    heads: int
    total_q: int
    total_k: int
    cu_q: list[int]
    cu_k: list[int]
    used_k: list[int] | None = None

    def sequences(self):
        """(rows of q, keys) of each sequence, clamped into the tensors."""

        def rows(cu, b, total):
            begin = min(max(cu[b], 0), total)
            return min(max(cu[b + 1], begin), total) - begin

        for b in range(len(self.cu_q) - 1):
            keys = rows(self.cu_k, b, self.total_k)
            if self.used_k is not None:
                keys = min(max(self.used_k[b], 0), keys)
            yield rows(self.cu_q, b, self.total_q), keys


def walk(call: Call, tile_m: int):
    """Sequences and their tiles in order: in passes, each of those with more than half of the most keys left."""
    left = [(b, -(-rows // tile_m), keys) for b, (rows, keys) in enumerate(call.sequences()) if rows > 0]
    while left:
        most = max(keys for _, _, keys in left)
        later = most // 2 if most > 256 else -1
        yield from ((b, tiles) for b, tiles, keys in left if keys > later)
        left = [each for each in left if each[2] <= later]


def item_at(index: int, call: Call, order: Order):
    """(batch, head, tile), or None behind the last item."""
    first = 0
    for b, tiles in walk(call, order.tile_m):
        items = min(tiles * call.heads, NUMBERED - first)
        if first <= index < first + items:
            tiles, rest = -(-items // call.heads), index - first
            if order.longest_first:
                return b, rest % call.heads, tiles - 1 - rest // call.heads
            return b, rest // tiles, rest % tiles
        first += items
    return None


def walked(order: Order, blocks: list[list[int]], most: int, tensors, numbers):
    """The items that each block came to. blocks: the indices that each draws; without, as many take equal shares."""
    items = torch.full((len(blocks), most + 1, 3), -1, dtype=torch.int32)
    indices = None
    if order.drawn:
        indices = torch.full((len(blocks), most + 1), 2**31 - 1, dtype=torch.int32)
        for row, each in zip(indices, blocks):
            row[: len(each)] = torch.tensor(each, dtype=torch.int32)
    tensors = [None if each is None else torch.tensor(each, dtype=torch.int32) for each in tensors]
    request = Request("sm_90a", "tests.emulator.cute_schedule:ScheduleProbe", tuple(order))
    run(request, [items, indices, *tensors, *numbers], dynamic_shared=0)
    return [[tuple(item) for item in block if item[0] >= 0] for block in items.tolist()]


def walked_packed(order: Order, call: Call, blocks: list[list[int]], most: int):
    used = call.used_k if order.used else None
    tensors = (call.cu_q, call.cu_k, used, used)
    return walked(order, blocks, most, tensors, (len(call.cu_q) - 1, call.heads, call.total_q, call.total_k, 1))


@st.composite
def calls(draw, used: bool):
    """Sequences around the 32 of a chunk and the 128 of a first read, of lengths that spread over several passes."""
    n = draw(st.sampled_from((0, 1, 2, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129)) | st.integers(0, 140))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from((40, 300, 3000))) if n <= 5 else draw(st.sampled_from((40, 150)))
    rows, keys = rng.exponential(scale, (2, n)).astype(int)
    if draw(st.booleans()):
        keys = rows.copy()
    keys *= draw(st.sampled_from((1, 1, 40)))
    for lengths in (rows, keys):
        lengths[rng.random(n) < draw(st.sampled_from((0, 0.3)))] = 0
    cu_q, cu_k = ([0, *np.cumsum(lengths).tolist()] for lengths in (rows, keys))
    total_q, total_k = (cu[-1] + draw(st.sampled_from((0, 100))) for cu in (cu_q, cu_k))
    if draw(st.integers(0, 3)) == 0:  # whatever the index tensors hold
        total_q = min(total_q, 700)
        cu_q, cu_k = (
            rng.integers(-total - 5, 2 * total + 5, n + 1).tolist() for total in (min(total_q, 2**29), total_k)
        )
    used_k = rng.integers(-3, max(total_k, 1) + 9, n).tolist() if used else None
    return Call(draw(st.integers(1, 3)), total_q, total_k, cu_q, cu_k, used_k)


ORDERS = {
    "causal, drawn": Order(128, longest_first=True, packed=True, drawn=True),
    "full, drawn": Order(192, longest_first=False, packed=True, drawn=True),
    "causal, used, shares": Order(64, longest_first=True, packed=True, used=True),
    "full, used, shares": Order(256, longest_first=False, packed=True, used=True),
}
"""One compilation each."""


def lengths_of(*lengths):
    cu = [0, *np.cumsum(lengths).tolist()]
    return Call(2, cu[-1], cu[-1], cu, cu, list(lengths))


# No shrinking: an example may take a second, and its seed replays it.
@pytest.mark.parametrize("name", ORDERS)
@settings(phases=(Phase.explicit, Phase.generate))
@given(data=st.data(), programs=st.sampled_from((1, 2, 3, 7)), seed=st.integers(0, 2**20))
def test_packed_items_come_once_and_in_the_models_order(name, data, programs, seed):
    order = ORDERS[name]
    call = data.draw(calls(order.used))
    total = sum(tiles for _, tiles in walk(call, order.tile_m)) * call.heads
    want = [item_at(index, call, order) for index in range(total)]
    tiles = {b: -(-rows // order.tile_m) for b, (rows, _) in enumerate(call.sequences())}
    assert sorted(want) == [(b, h, t) for b in tiles for h in range(call.heads) for t in range(tiles[b])]
    of = np.arange(total) % programs if not order.drawn else np.random.default_rng(seed).integers(0, programs, total)
    blocks = [np.flatnonzero(of == program).tolist() for program in range(programs)]
    assert walked_packed(order, call, blocks, total) == [[want[index] for index in block] for block in blocks]


def test_long_sequences_come_first():
    """By hand: in passes of more than 2500, 1250, 350 and 150 keys, then all that is too short to tell apart."""
    order = ORDERS["full, drawn"]
    call = lengths_of(100, 5000, 300, 3000, 700, 2000, 0, 2500, 256, 1)
    total = sum(tiles for _, tiles in walk(call, order.tile_m)) * call.heads
    (items,) = walked_packed(order, call, [list(range(total))], total)
    assert list(dict.fromkeys(batch for batch, _, _ in items)) == [1, 3, 5, 7, 4, 2, 8, 0, 9]


@settings(phases=(Phase.explicit, Phase.generate))
@given(seed=st.integers(0, 2**20), sequences=st.integers(1, 70), heads=st.integers(1, 128), overlap=st.booleans())
@example(seed=0, sequences=70, heads=128, overlap=True)
def test_packed_items_are_right_up_to_the_largest_number(seed, sequences, heads, overlap):
    """Hundreds of millions of items, some of which blocks draw; sequences that overlap would have more than 2^31."""
    order, rng = ORDERS["causal, drawn"], np.random.default_rng(seed)
    total = min(order.tile_m * (NUMBERED // heads - sequences), NUMBERED)
    if overlap:
        cu = [0, total] * (sequences // 2 + 1)
    else:
        cu = [0, *np.sort(rng.integers(0, total + 1, sequences - 1)).tolist(), total]
    call = Call(heads, total, total, cu, cu)
    items = sum(tiles for _, tiles in walk(call, order.tile_m)) * heads
    assert overlap or items <= NUMBERED
    last = min(items, NUMBERED) - 1
    drawn = sorted({0, 1, last, last + 1, *rng.integers(0, last + 1, 20).tolist()})
    want = [item_at(index, call, order) for index in drawn]
    assert want[-1] is None
    assert walked_packed(order, call, [drawn], len(drawn)) == [want[:-1]]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("longest_first", [False, True])
@settings(phases=(Phase.explicit, Phase.generate))
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 5),
    seqlen_q=st.integers(1, 700),
    section=st.integers(1, 9),
    programs=st.sampled_from((1, 2, 7)),
)
def test_dense_items_come_section_by_section(longest_first, drawn, batch, heads, seqlen_q, section, programs):
    """Longest tiles first within a section of heads, a part of one first, a larger one last; else head by head."""
    order = Order(128, longest_first, drawn=drawn)
    pairs = [divmod(pair, heads) for pair in range(batch * heads)]
    section, tiles = min(section, len(pairs)), range(-(-seqlen_q // order.tile_m))
    want = [(*pair, tile) for pair in pairs for tile in tiles]
    if longest_first:
        last = max(len(pairs) - LAST_SECTION * section, 0)
        sections = [pairs[max(end - section, 0) : end] for end in reversed(range(last, 0, -section))] + [pairs[last:]]
        want = [(*pair, tile) for part in sections for tile in reversed(tiles) for pair in part]
    blocks = [list(range(program, len(want), programs)) for program in range(programs)]
    got = walked(order, blocks, len(want), (None,) * 4, (batch, heads, seqlen_q, seqlen_q, section))
    assert got == [[want[index] for index in block] for block in blocks]
