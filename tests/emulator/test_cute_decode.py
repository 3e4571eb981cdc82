"""The CuTe DSL decode kernel as compiled for Hopper and Blackwell: layouts, splits, and what it must not depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("cutlass", reason="needs the package nvidia-cutlass-dsl")
dispatch = pytest.importorskip("dispatch", reason="run from the repository's root")

from fa4_core import kvcache  # noqa: E402
from fa4_core.checks import compare, expected  # noqa: E402
from fa4_cute.decode_shares import DRAWN  # noqa: E402

from .cute_backend import emulated_cute_decode  # noqa: E402
from .cute_backend import run as run_kernel  # noqa: E402
from .cute_compile import Request  # noqa: E402
from .test_decode import draw, paged, require, wild_places  # noqa: E402

INT32 = torch.int32
# Compile-time axes, covered rather than crossed. page 0: contiguous; indexed, padded: cache_batch_idx, cache_leftpad.
KINDS = {
    "plain-128-gqa": {"dim": 128, "group": 4},
    "page-16-64-causal-sink": {"page": 16, "causal": True, "group": 2, "sink": True},
    "page-24-window": {"page": 24, "window": (100, 5), "group": 5},
    "indexed-128x64-left": {"dim": 128, "dim_v": 64, "window": (90, None), "indexed": True, "group": 3},
    "padded-softcap": {"padded": True, "softcap": 5.0, "causal": True, "group": 8},
    "192-of-few-rows": {"dim": 192, "group": 2},
    "256-half": {"dim": 256, "group": 1, "causal": True, "dtype": torch.float16},
}


def call_of(kinds, lengths, seqlen_q, seed, room=40):
    """(q, caches, options of the call) and the same problem as dense tensors; NaN wherever no valid key is."""
    dim, dim_v, group = kinds.get("dim", 64), kinds.get("dim_v", kinds.get("dim", 64)), kinds["group"]
    dtype, batch, longest = kinds.get("dtype", torch.bfloat16), len(lengths), max(lengths) + room
    q = draw(batch, seqlen_q, 2 * group, dim, seed=seed, dtype=dtype)
    k, v = (draw(batch, longest, 2, d, seed=seed + 1 + i, dtype=dtype) for i, d in enumerate((dim, dim_v)))
    used = torch.tensor(lengths, dtype=INT32)
    shared = {name: kinds[name] for name in ("causal", "window", "softcap") if name in kinds}
    if kinds.get("sink"):
        shared["sink"] = torch.linspace(-1, 2, 2 * group)
    options = {"cache_seqlens": used, **shared}
    if kinds.get("page"):
        (k_cache, table), (v_cache, _) = (paged(t, lengths, kinds["page"], room) for t in (k, v))
        options["page_table"] = table
    else:
        pads = [(7 * b + seed) % 70 if kinds.get("padded") else 0 for b in range(batch)]
        rows = [(b + 1) % (batch + 1) for b in range(batch)] if kinds.get("indexed") else list(range(batch))
        shape = (batch + 1 if kinds.get("indexed") else batch, longest + max(pads))
        k_cache, v_cache = (torch.full((*shape, *t.shape[2:]), float("nan"), dtype=dtype) for t in (k, v))
        for b, n in enumerate(lengths):
            at = slice(pads[b], pads[b] + n)
            k_cache[rows[b], at], v_cache[rows[b], at] = k[b, :n], v[b, :n]
        options["cache_seqlens"] = used + torch.tensor(pads, dtype=INT32)
        if kinds.get("padded"):
            options["cache_leftpad"] = torch.tensor(pads, dtype=INT32)
        if kinds.get("indexed"):
            options["cache_batch_idx"] = torch.tensor(rows, dtype=INT32)
    return (q, k_cache, v_cache), options, (q, k, v), {"seqused_k": used, **shared}


def run(tensors, options, arch="sm_90a", **emulated):
    with emulated_cute_decode(arch, **emulated) as ran:
        out, lse = dispatch.attention_with_kvcache(*tensors, backend="cute", return_lse=True, **options)
    assert len(ran) == 1
    return out, lse


LENGTH = st.sampled_from((0, 1, 63, 64, 65, 128)) | st.integers(0, 900)


@pytest.mark.parametrize(
    ("arch", "kinds"),
    [("sm_90a", name) for name in KINDS] + [("sm_100a", "plain-128-gqa"), ("sm_100a", "page-16-64-causal-sink")],
)
def test_every_layout_is_attention_over_the_valid_keys(arch, kinds):
    kinds = KINDS[kinds]
    most = 16 // kinds["group"]

    @settings(phases=(Phase.explicit, Phase.generate), max_examples=6)
    @given(
        lengths=st.lists(LENGTH, min_size=1, max_size=4),
        seqlen_q=st.sampled_from((1, 1, most)),
        splits=st.sampled_from((0, 0, 1, 3)),
        programs=st.sampled_from((2, 3, 9)),
        seed=st.integers(0, 99),
    )
    def check(lengths, seqlen_q, splits, programs, seed):
        tensors, options, dense, plain = call_of(kinds, lengths, seqlen_q, seed)
        out, lse = run(tensors, {**options, "num_splits": splits}, arch, programs=programs, seed=seed)
        require(out, lse, expected(*dense, **plain))

    check()


def test_a_row_depends_on_its_own_sequence_alone_bit_for_bit():
    """Alone and in company, on pages and on none, on few multiprocessors and on many, whoever merges."""
    kinds, lengths = {"group": 2, "causal": True}, [2500, 33, 0, 700]
    tensors, options, dense, plain = call_of(kinds, lengths, 2, 5)
    together = run(tensors, options, programs=2)
    require(*together, expected(*dense, **plain))
    for programs in (4, 14, 30):
        assert all(map(torch.equal, run(tensors, options, programs=programs, seed=programs), together)), programs
    on_pages, page_options, _, _ = call_of({**kinds, "page": 24}, lengths, 2, 5)
    assert all(map(torch.equal, run(on_pages, page_options, programs=6), together))
    for b in (0, 3):
        mine = [t[b : b + 1] for t in tensors]
        alone = run(mine, {**options, "cache_seqlens": options["cache_seqlens"][b : b + 1]}, programs=8)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together)), b


def test_long_sequences_are_shared_and_short_ones_drawn_after_them():
    """Blocks end one, begin within the next and go on with whole ones; the same bits as of shares alone."""
    lengths = [64 * n + n for n in (1, 30, 2, 1, 45, 0, 3, 1, 20, 2, 1, 1, 2, 3, 1, 2, 4, 1, 2)]
    tensors, options, dense, plain = call_of(KINDS["plain-128-gqa"], lengths, 1, 3)
    tiles, results = [max(1, -(-n // 64)) for n in lengths], []
    for programs, drawn in ((4, True), (6, True), (30, False)):
        short = [n for n in tiles if n * DRAWN * (programs // 2) <= sum(tiles)]
        assert (len(short) > programs // 2) is drawn
        assert len(short) < len(tiles)
        results.append(run(tensors, options, programs=programs, seed=programs))
    require(*results[0], expected(*dense, **plain))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.parametrize("kinds", ["plain-128-gqa", "page-16-64-causal-sink"])
def test_many_short_sequences_are_drawn_and_give_the_same_bits(kinds):
    """On few multiprocessors, of which each has many sequences to do, against one share for each of many."""
    lengths = [(17 * b) % 130 for b in range(37)]
    tensors, options, dense, plain = call_of(KINDS[kinds], lengths, 1, 3)
    tiles = [max(1, -(-n // 64)) for n in lengths]
    results = []
    for programs, drawn in ((2, True), (5, True), (60, False)):
        assert (max(tiles) <= sum(tiles) // (programs // 2) // DRAWN) is drawn
        results.append(run(tensors, options, programs=programs, seed=programs))
    require(*results[0], expected(*dense, **plain))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


MOST = 2**30 - 2**10
"""Keys of a sequence of close on 2^24 tiles, of which 63 are close on 2^30."""
DEALS = [
    *(([n], teams, 0) for n, teams in ((0, 1), (0, 17), (64 * 9, 5), (64 * 128, 16), (64 * 129, 16), (MOST, 132))),
    # Behind each length at which the number of chunks changes.
    *(([64 * n + 1 for n in (3, 7, 8, 15, 16, 31, 63, 64, 127, 128, 511, 512, 2000)], n, 0) for n in (1, 16, 132)),
    *(([64 * n + 1], teams, 0) for n in (130, 300, 511, 600, 777, 1000) for teams in (16, 33)),
    *(([5] * batch, teams, 0) for batch, teams in ((32, 3), (33, 3), (64, 1), (65, 70))),
    *(([MOST] * 63, teams, 0) for teams in (33, 132)),
    *(([0] * batch, 4, 0) for batch in (31, 32, 33)),
    *(([64 * 3] * 40, teams, 0) for teams in (4, 5)),
    ([70_000, 3, 64 * 512, 64 * 513, 0, 20_000], 33, 0),
    *(([1000, 0, 0, 9_999_999], 7, splits) for splits in (1, 7, 64)),
    ([64 * 10] * 3, 5, 64),
    # Some long, others drawn; few of each, and more than lanes.
    ([64 * 40, 64 * 50, *(64 * (n % 5) for n in range(30))], 2, 0),
    ([*(64 * (n % 7) for n in range(100)), 64 * 200, 0, 64 * 90, *(64 for _ in range(70)), 64 * 333], 4, 0),
    ([*(64 * (n % 3) for n in range(70)), *(64 * 200 + n for n in range(3)), 64 * 9], 5, 3),
    ([*(64 * n for n in range(1, 90)), 64 * 2000], 3, 0),
    ([*(64 * 400 for _ in range(40)), 64], 16, 0),
]  # fmt: skip


def chunks_of(tiles, splits):
    """Where a sequence's chunks begin."""
    chunks = 64 if tiles > 512 else min(32, 2 ** ((max(tiles, 4) // 4).bit_length() - 1))
    chunks = min(splits, tiles) if splits else chunks
    return [i * tiles // chunks for i in range(chunks)]


@pytest.mark.parametrize("number", range(len(DEALS)))
def test_every_tile_is_in_a_share_or_drawn_and_shares_begin_where_chunks_do(number):
    lengths, teams, splits = DEALS[number]
    batch = len(lengths)
    shares, chunks = torch.full((teams, 5), -7, dtype=INT32), torch.full((batch, 66), -7, dtype=INT32)
    order = torch.full((batch + 1,), -7, dtype=INT32)
    request = Request("sm_90a", "tests.emulator.cute_probe:SharesProbe", (64,))
    run_kernel(request, [torch.tensor(lengths, dtype=INT32), shares, chunks, order, MOST, splits, teams])
    tiles = [max(1, -(-n // 64)) for n in lengths]
    begins = [chunks_of(n, splits) for n in tiles]
    for (n_tiles, n_chunks, *found), n, want in zip(chunks.tolist(), tiles, begins):
        assert (n_tiles, n_chunks, found[: len(want)]) == (n, len(want), want)
        assert len(want) <= 64

    limit = sum(tiles) / teams / DRAWN
    short = [n for n in tiles if n <= limit]
    assert all(abs(n - limit) > limit * 1e-6 or n == limit for n in tiles)  # else rounding would choose
    short = short if len(short) > teams else []
    assert set(shares[:, 4].tolist()) == {max(short, default=0)}
    order = order[: len(short) + 1].tolist()
    assert sorted(tiles[i] for i in order[:-1]) == sorted(short)
    assert len(set(order)) == len(order)
    assert order[-1] == batch
    assert all(tiles[a] * 2 >= tiles[b] or tiles[b] <= 4 for a, b in itertools.pairwise(order[:-1]))

    row = [i for i in range(batch) if tiles[i] > max(short, default=0)]
    total, before, at = sum(tiles[i] for i in row), {}, 0
    for i in row:
        before[i], at = at, at + tiles[i]
    longest, at = max((b - a for i in row for a, b in itertools.pairwise([*begins[i], tiles[i]])), default=0), 0
    for sequence, chunk, tile, n, _ in shares.tolist():
        if n:
            assert before[sequence] + tile == at
            assert begins[sequence][chunk] == tile
            assert n <= total / teams + longest + total * 2**-20
            if batch == 1 and not splits:  # all have the fewest chunks that they can
                assert n <= -(-len(begins[0]) // teams) * longest
        at += n
    assert at == total


def test_splits_that_are_asked_for_equal_the_whole():
    tensors, options, _, _ = call_of({"group": 1}, [1500, 64], 1, 3)
    (whole, whole_lse), runs = run(tensors, {**options, "num_splits": 1}, programs=4), (0, 2, 7, 64)
    for splits in runs:
        out, lse = run(tensors, {**options, "num_splits": splits}, programs=10)
        torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, whole, rtol=2e-2, atol=2e-3)


def test_no_warp_waits_two_laps_ahead_in_the_ring_of_tiles():
    """One long chunk, so that no warp ever waits for another: four laps of the ring, in copies that end out of turn.

    A parity tells laps apart by twos. A warp that waited for its tile alone, and not for the one before it in its slot,
    took an older copy for its own under 6 of these 8 schedules.
    """
    tensors, options, dense, plain = call_of({"dim": 128, "group": 4}, [1500], 1, 0)
    want = expected(*dense, **plain)
    for seed in range(8):
        out, lse = run(tensors, {**options, "num_splits": 1}, programs=2, seed=seed)
        require(out, lse, want)


def test_a_softcap_takes_scores_of_minus_infinity_for_scores():
    """Not for hidden keys, which are -inf beside them: each counts with the cap's negative."""
    q, k, v = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16), draw(1, 200, 2, 64, seed=1), draw(1, 200, 2, 64, seed=2)
    q[..., 3], k[..., 3] = torch.inf, -1.0
    out, lse = run((q, k, v), {"cache_seqlens": 150, "softcap": 5.0})
    torch.testing.assert_close(lse, torch.full((1, 2, 1), math.log(150) - 5.0))
    torch.testing.assert_close(out[:, 0].float(), v[:, :150].float().mean(1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("where", ["rows", "leftpad", "pages"])
def test_no_wild_length_or_index_leads_out_of_the_tensors(where, monkeypatch):
    """What memcheck would say of the compiled kernel: here no memory exists but that of the arguments."""
    monkeypatch.setattr(kvcache, "contents_are_checked", lambda device: False)
    batch, blocks = 6, 1 if where == "leftpad" else 3
    for seed in range(2):
        q, k, v = draw(batch, 2, 4, 64, seed=0), draw(blocks, 16, 2, 64, seed=1), draw(blocks, 16, 2, 64, seed=2)
        out, lse = run((q, k, v), {"causal": True, **wild_places(where, seed, batch)}, seed=seed)
        assert out.isfinite().all()
        assert not lse.isnan().any()


@pytest.mark.parametrize(("batch", "capacity"), [(2, 0), (0, 64)])
def test_a_call_without_keys_or_sequences_needs_no_kernel(batch, capacity):
    q, cache = draw(batch, 1, 4, 64, seed=0), draw(batch, capacity, 2, 64, seed=1)
    for sink in (None, torch.linspace(-1, 1, 4)):
        with emulated_cute_decode("sm_90a") as ran:
            out, lse = dispatch.attention_with_kvcache(
                q, cache, cache, cache_seqlens=0, sink=sink, backend="cute", return_lse=True
            )
        assert not ran
        assert not out.any()
        assert torch.equal(
            lse, torch.full((batch, 4, 1), -torch.inf) if sink is None else sink[:, None].repeat(batch, 1, 1)
        )


def test_an_int_for_all_lengths_and_a_sink_that_kernels_do_not_read():
    """A float64 sink is converted; results come out in the caller's tensor, of its own strides."""
    tensors, _, dense, plain = call_of({"group": 2}, [130, 130], 1, 8)
    sink = torch.linspace(0, 1, 4, dtype=torch.float64)
    out = torch.full((2, 1, 8, 64), float("nan"), dtype=torch.bfloat16)[:, :, ::2]
    got, lse = run(tensors, {"cache_seqlens": 130, "sink": sink, "out": out})
    assert got is out
    require(out, lse, expected(*dense, sink=sink, seqused_k=plain["seqused_k"]))
    assert compare("out", out, expected(*dense, sink=sink, seqused_k=plain["seqused_k"])["out"]).passed
