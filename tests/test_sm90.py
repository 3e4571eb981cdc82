"""The Hopper kernel's promises about its table of tiles and its machine code, and on a Hopper GPU what it visits.

What it computes is executed in tests/emulator/test_project_sm90.py, and checked on a GPU like every backend's results.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from machine_code import disassembled, kinds, needs_dsl, needs_triton, varlen_kinds
from simulation import visited_by_warpgroups

import fa4_cute
from fa4_core.problem import Inputs, make_problem
from fa4_cute import kernels
from fa4_cute.sm90_config import Sm90Config, config_for

HOPPER = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability(0) == (9, 0)
    and fa4_cute.BACKEND.unavailable(torch.device("cuda", 0)) is None
)


@pytest.mark.parametrize(
    ("group", "packed"), [(1, 1), (2, 2), (3, 1), (8, 8), (12, 1), (32, 32), (64, 64), (96, 1), (128, 1)]
)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_heads_of_a_group_share_a_tile_where_they_fill_a_warpgroups_rows(head_dim, group, packed):
    kind = kinds(head_dim, group=group)
    config = config_for(kind)
    assert config == replace(config_for(kinds(head_dim)), packed=packed)
    assert config.positions * packed == config.tile_m
    assert kernels.items(kind, "sm_90a") == (config.positions, packed, 1, False)


@pytest.mark.parametrize(("options", "turns"), [({}, True), ({"window_right": 0}, False), ({"window_left": 5}, False)])
def test_warpgroups_of_head_dim_256_take_turns_where_items_are_even(options, turns):
    config = config_for(kinds(256, **options))
    assert (config.tile_n, config.turns) == (64, turns)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "columns"), [(256, 256, 128), (192, 128, 64), (192, 64, 64), (192, 192, 0)]
)
def test_the_output_has_shared_memory_of_its_own_where_q_has_one_slot_and_it_fits(head_dim, head_dim_v, columns):
    config = config_for(kinds(head_dim, head_dim_v))
    assert (config.q_slots, config.out_columns) == (1, columns)


@pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"softcap": 3.0}])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "forms"),
    [(64, 64, 1), (96, 96, 1), (128, 128, 1), (192, 128, 2), (160, 64, 2), (192, 192, 1), (256, 256, 2), (256, 72, 2)],
)
def test_long_rows_have_a_form_of_their_own_where_q_has_one_slot(head_dim, head_dim_v, forms, options):
    """It differs in how the output leaves, and in nothing that results depend on."""
    kind = kinds(head_dim, head_dim_v, **options)
    assert kernels.forms(kind, "sm_90a") == (False, True)[:forms]
    assert kernels.forms(kind, "sm_100a") == (False,)
    assert config_for(kind, long=True) == replace(config_for(kind), out_columns=0)


def test_output_columns_that_leave_a_rest_are_refused():
    with pytest.raises(ValueError, match="out_columns have to divide head_dim_v"):
        Sm90Config(192, 192, tile_n=64, q_slots=1, out_columns=128)


def test_heads_that_do_not_fill_a_warpgroups_rows_are_refused():
    with pytest.raises(ValueError, match="packed heads have to divide a warpgroup's 64 rows"):
        Sm90Config(64, 64, tile_n=128, warpgroups=3, packed=3)


@needs_dsl
def test_a_config_for_another_group_is_refused():
    from fa4_cute.sm90_forward import Sm90Forward

    with pytest.raises(ValueError, match="packed: got 2 heads, a group has 3"):
        Sm90Forward(kinds(64, group=3), Sm90Config(64, 64, tile_n=128, packed=2))


@needs_dsl
def test_the_softcaps_polynomial_is_the_best_of_its_degree():
    """Its error alternates with equal heights at a point more than it has free coefficients, p(0) = 1 being fixed."""
    from fa4_cute.softcap import POLYNOMIAL, REACH

    x = np.linspace(1e-4, REACH, 100_001)
    error = np.polynomial.polynomial.polyval(x * x, POLYNOMIAL) * x / np.tanh(x) - 1
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    heights = np.abs(error[[*turns, -1]])
    heights = heights[heights > heights.max() / 2]
    assert POLYNOMIAL[0] == 1
    assert len(heights) == len(POLYNOMIAL)
    assert heights.max() / heights.min() < 1.001


def bent(x, hidden, scale=1.0):
    """tanh(scale x) of a float32 vector as the kernel has it, 16 side by side in a thread and 512 in a warp."""
    from emulator.cute_backend import run
    from emulator.cute_compile import Request

    x = torch.cat([x, torch.zeros(-len(x) % 4096)])
    y = torch.full_like(x, math.nan)
    run(Request("sm_90a", "tests.emulator.cute_probe:SoftcapProbe", (hidden, scale)), [x, y])
    return y


@needs_dsl
@pytest.mark.parametrize("scale", [1.0, 0.75 * 2**-15, 2.0**-20, 2.0**20])
def test_a_softcap_bends_as_accurately_as_it_says(scale):
    """Executed as compiled, on every 16,001st float32 of either sign; infinities bend, and NaN stays."""
    from fa4_cute.softcap import MAX_RELATIVE_ERROR

    first, last = (int(np.float32(x).view(np.uint32)) for x in (1e-30, 100.0))
    magnitudes = np.arange(first, last, 16001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = torch.from_numpy(np.concatenate([-magnitudes[::-1], [0.0], magnitudes]).astype(np.float32))
    got, want = bent(x / scale, False, scale)[: len(x)].double(), torch.tanh(x.double())
    assert (x.abs() < 0.5).sum() > 10_000
    assert (x.abs() > 0.5).sum() > 1_000
    assert (((got - want) / want).abs()[x != 0]).max() <= MAX_RELATIVE_ERROR
    assert got[x == 0] == 0
    special = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38]) / max(scale, 1.0)
    assert bent(special, False, scale)[:5].nan_to_num(7.0).tolist() == [1.0, -1.0, 7.0, 1.0, -1.0]
    assert bent(special, True, scale)[:5].nan_to_num(7.0, neginf=-7.0).tolist() == [1.0, -7.0, 7.0, 1.0, -1.0]
    assert bent(torch.tensor([-math.inf, 0.1 / scale, -1.0 / scale]), True, scale)[0] == -math.inf


@needs_dsl
def test_a_bent_score_depends_on_no_other():
    """To the bit: near scores beside near ones alone, far ones in their own part, or elsewhere in the warp."""
    g = torch.Generator().manual_seed(0)
    near = torch.rand(4096, generator=g) * 0.998 - 0.499
    alone = bent(near, False)
    for loud in (torch.arange(4096) % 16 == 3, torch.arange(4096) % 512 == 500, torch.rand(4096, generator=g) < 0.3):
        for value in (0.51, -40.0, math.inf, math.nan):
            beside = bent(torch.where(loud, value, near), False)
            assert torch.equal(beside[~loud], alone[~loud])
            assert not torch.equal(beside, alone)


CODE = {
    "window-sink-64": (kinds(64, window_left=5, window_right=5), None),
    "varlen-left-used-sink-64": (varlen_kinds(64, 1, window_left=5), torch.float32),
    "causal-gqa-128": (kinds(128, group=8, window_right=0), None),
    "varlen-window-used-sink-gqa-128": (varlen_kinds(128, 64, window_left=5, window_right=5), torch.float32),
    "varlen-window-used-sink-softcap-gqa-256": (
        varlen_kinds(256, 4, window_left=5, window_right=5, softcap=2.0),
        torch.float32,
    ),
    "full-256": (kinds(256), None),
    "causal-softcap-64": (kinds(64, window_right=0, softcap=2.0), None),
    "varlen-window-used-sink-softcap-gqa-64": (
        varlen_kinds(64, 8, window_left=5, window_right=5, softcap=2.0),
        torch.float32,
    ),
    "causal-softcap-128": (kinds(128, window_right=0, softcap=2.0), None),
    "varlen-window-used-sink-softcap-gqa-128": (
        varlen_kinds(128, 8, window_left=5, window_right=5, softcap=2.0),
        torch.float32,
    ),
    "varlen-window-used-sink-softcap-gqa-192": (
        varlen_kinds(192, 8, window_left=5, window_right=5, softcap=2.0),
        torch.float32,
    ),
    "causal-192": (kinds(192, 128, window_right=0), None),
    # Three consumer warpgroups leave the scheduler 32 registers, and packed sequences and drawn items ask most of it.
    "varlen-window-used-sink-gqa-64": (varlen_kinds(64, 8, window_left=5, window_right=5), torch.float32),
}


@needs_dsl
@needs_triton
@pytest.mark.parametrize(
    ("name", "long"), [(name, long) for name, (kind, _) in CODE.items() for long in kernels.forms(kind, "sm_90a")]
)
def test_machine_code_spills_nothing_and_keeps_to_each_roles_registers(name, long):
    """No local memory, no product waited for by itself; no register index reaches its role's budget."""
    from emulator.cute_backend import FACTORIES
    from emulator.cute_compile import Request, compile_kernel

    kind, sink = CODE[name]
    config = config_for(kind, long=True) if long else None
    kept = compile_kernel(Request("sm_90a", FACTORIES["sm_90a"], (kind, config, False), (kind, sink, False)))
    usage = disassembled(kept, "cuobjdump", "-res-usage")
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage
    code = disassembled(kept, "nvdisasm", "-c")
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert code.count("WARPGROUP.DEPBAR") <= 9  # serialised products would be waited for one by one, 40 times and more
    _, told_producer, producer, told_consumer, consumer = re.split(r"(USETMAXREG\.\S+ .*?;)", code)
    told = tuple(int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16) for text in (told_producer, told_consumer))
    assert told == config_for(kind).registers
    for budget, part in zip(told, (producer, consumer)):
        assert max(int(n) for n in re.findall(r"\bR(\d+)\b", part)) < budget


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and nvidia-cutlass-dsl")
@pytest.mark.parametrize("group", [2, 3, 8, 64])
def test_hidden_tiles_are_never_visited_by_packed_heads(group):
    """Counted against brute force over random masks, by the positions that a query tile holds."""
    from fa4_cute import launch

    rng = np.random.default_rng(group)
    for _ in range(20):
        len_q, len_k = (int(n) for n in rng.integers(1, 700, 2))
        left, right = (int(rng.integers(0, 200)) if rng.random() < 0.6 else -1 for _ in range(2))
        q, k = torch.randn(1, len_q, group, 64).half().cuda(), torch.randn(1, len_k, 1, 64).half().cuda()
        inputs = Inputs(q, k, k)
        problem = make_problem(inputs, window_left=left, window_right=right)
        counts = torch.zeros(*problem.lse_shape, 2, dtype=torch.int32, device="cuda")
        launch.forward(problem, inputs, counts)
        config = config_for(problem.kinds)
        want = visited_by_warpgroups(len_q, len_k, left, right, config)
        assert (counts[0, :, :, 0].cpu().numpy() == want).all(), (len_q, len_k, left, right)
