"""How the decode kernel deals the tiles of all sequences to its teams: each once, in order, cut between chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="needs the package triton")

import triton.language as tl  # noqa: E402

from fa4_triton.decode import Rows, Splits, find_share, keys_of, part_begin  # noqa: E402
from fa4_triton.steps import Values  # noqa: E402

pytestmark = pytest.mark.serves("kv_cache")

TILE_N = 16
ROOM = 2**20


@triton.jit
def deal(rows: Rows, values: Values, splits: Splits, out, TILE_N: tl.constexpr):
    """Writes each team's share, and where the next chunk of the sequence that it begins within does."""
    team = tl.program_id(0)
    sequence, chunk, tile, n_tiles = find_share(rows, values, splits, team, tl.num_programs(0), TILE_N)
    keys = keys_of(rows, values, splits, sequence, TILE_N)
    tl.store(out + 5 * team, sequence)
    tl.store(out + 5 * team + 1, chunk)
    tl.store(out + 5 * team + 2, tile)
    tl.store(out + 5 * team + 3, n_tiles)
    tl.store(out + 5 * team + 4, part_begin(keys.tiles, chunk + 1, keys.chunks))


def shares(target, lengths, teams):
    """(sequence, chunk and tile in it, number of tiles, tile of the next chunk) of each team."""
    if target.backend != "triton":
        pytest.skip("Triton's kernel alone")
    used = torch.tensor(lengths, dtype=torch.int32, device=target.device)
    out = torch.full((teams, 5), -1, dtype=torch.int32, device=target.device)
    rows = Rows(None, None, used, None, None, None, None, len(lengths), 1, ROOM, 1, 0, 0)
    values = Values(1.0, None, None, None, 0.0, None)  # a string is no kernel's argument
    deal[(teams,)](rows, values, Splits(None, None, 32, 0), out, TILE_N)
    return out.tolist()


def chunks_of(tiles):
    """Where a sequence's chunks begin, and its end."""
    chunks = 32 if tiles > 128 else min(16, max(tiles // 2, 1))
    return [i * tiles // chunks for i in range(chunks + 1)]


@given(
    lengths=st.lists(st.integers(0, 90) | st.integers(0, 9000), min_size=1, max_size=9)
    | st.integers(0, 20).map(lambda n: [n * 37 % 500 for _ in range(n * 15 + 1)]),
    teams=st.integers(1, 40),
)
@example(lengths=[n * 131 % 2000 for n in range(300)], teams=33)  # more sequences than are summed at once
@example(lengths=[0, 0, 0], teams=5)
def test_the_shares_are_all_tiles_in_order_and_begin_where_chunks_do(target, lengths, teams):
    tiles = [max(1, -(-n // TILE_N)) for n in lengths]
    before = [sum(tiles[:i]) for i in range(len(tiles) + 1)]
    at = 0
    found = shares(target, lengths, teams)
    for sequence, chunk, tile, n_tiles, following in found:
        if n_tiles:
            chunks = chunks_of(tiles[sequence])
            assert before[sequence] + tile == at
            assert (tile, following) == (chunks[chunk], chunks[chunk + 1])
        assert n_tiles >= 0
        at += n_tiles
    assert at == before[-1]
    # A share is the mean, or one within 5 % of it, and a chunk at most.
    begun = {sequence for sequence, *_ in found if sequence < len(tiles)}
    longest = max(end - begin for i in begun for begin, end in itertools.pairwise(chunks_of(tiles[i])))
    assert max(n for _, _, _, n, _ in found) <= 1.07 * -(-before[-1] // teams) + longest


@pytest.mark.parametrize("teams", [16, 33])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_shares_of_lengths_that_nothing_divides_are_alike(target, batch, teams):
    """One chunk more than teams can share alike would take as long as a whole one for each."""
    for tiles in (129, 257, 300, 513, 550):
        found = [n for _, _, _, n, _ in shares(target, [TILE_N * tiles] * batch, teams)]
        assert max(found) <= 1.07 * -(-tiles * batch // teams) + -(-tiles // 32)


@pytest.mark.parametrize(
    ("batch", "teams", "sequences", "pieces"),
    [(16, 33, 1, 2), (1, 33, 1, 33), (8, 33, 1, 4), (66, 33, 2, 1), (33, 33, 1, 1)],
)
def test_sequences_that_are_alike_are_dealt_whole_or_in_pieces_of_their_own(target, batch, teams, sequences, pieces):
    """A share that ends within the next sequence would store and merge a part more."""
    found = [share for share in shares(target, [8192] * batch, teams) if share[3]]
    assert len(found) >= min(batch * pieces // sequences, batch * 32)
    for sequence, _, tile, n_tiles, _ in found:
        assert tile + n_tiles <= 8192 // TILE_N * sequences
        assert sequence % sequences == 0
        assert n_tiles >= 8192 // TILE_N * sequences // pieces - 16
