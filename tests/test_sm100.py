"""The Blackwell kernel's promises that need no GPU: its table of budgets, its exponential, its machine code.

What it computes is executed in tests/emulator/test_project_cute.py, within the table's shared memory.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from machine_code import disassembled, kinds, needs_dsl, needs_triton, varlen_kinds

from fa4_cute import sm100_config
from fa4_cute.sm100_config import Exp2Share, Sm100Config, config_for, missing, padded


@pytest.mark.parametrize("head_dims", sm100_config.HEAD_DIMS)
def test_budgets_add_up(head_dims):
    config = config_for(kinds(*head_dims), (10, 0))
    assert config.shared_bytes <= 227 * 1024
    columns = sorted([*config.s_columns, *config.o_columns])
    widths = {**dict.fromkeys(config.s_columns, 128), **dict.fromkeys(config.o_columns, config.head_dim_v)}
    assert len(columns) == len(widths) == 2 + config.q_tiles
    assert all(a + widths[a] <= b for a, b in zip(columns, [*columns[1:], 512]))
    assert all(s < s + config.p_offset < s + 128 for s in config.s_columns)
    # With room for one K and one V tile alone, the tensor cores would wait for the next V: of two Q tiles the first has
    # read a slot long before the second has. A single one makes room part by part.
    assert config.kv_slots * config.slot_bytes >= (1.5 if config.q_tiles == 2 else 1.2) * (
        config.k_bytes + config.v_bytes
    )
    registers = 8 * config.registers_softmax + 4 * config.registers_correction + 4 * config.registers_other
    assert 32 * registers <= 65536


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"registers_softmax": 208}, "registers: 69632 of 65536"),
        ({"registers_softmax": 180}, "multiples of 8"),
        ({"p_first": 128}, "p_first"),
        ({"p_first": 48}, "p_first"),
        ({"tile_n": 192}, "tensor memory: 640 of 512"),
        ({"head_dim": 100}, "head dims 100, 128"),
        ({"packed": 3}, "packed: got 3 heads, a Q tile has 128 rows"),
        ({"ctas": 3}, "ctas: got 3"),
        ({"ctas": 2, "launch_control": True}, "ctas: got 2"),
        ({"ctas": 2, "head_dim": 192}, "ctas: got 2"),
        ({"head_dim": 256, "head_dim_v": 256, "registers_softmax": 200}, "registers: 67584 of 65536"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        replace(Sm100Config(128, 128), **change)


def test_it_says_what_it_lacks():
    assert missing(kinds(128)) == missing(kinds(192, 128)) == missing(kinds(8, dtype=torch.float16)) == ()
    assert missing(kinds(128, dtype=torch.float32)) == ("dtype torch.float32",)
    assert missing(kinds(256)) == missing(kinds(256, 8)) == ()


def test_other_head_dims_take_the_first_kernel_that_holds_them():
    assert [padded(d, d) for d in (8, 64, 72, 96, 104, 128)] == [(64, 64)] * 2 + [(96, 96)] * 2 + [(128, 128)] * 2
    assert padded(136, 128) == padded(192, 64) == (192, 128)
    assert padded(64, 128) == (128, 128)
    assert padded(136, 136) == padded(200, 64) == padded(8, 256) == (256, 256)


@pytest.mark.parametrize(("group", "packed"), [(1, 1), (2, 2), (3, 1), (8, 8), (12, 1), (128, 128), (256, 1)])
def test_heads_of_a_group_share_a_tile_where_they_fill_it(group, packed):
    config = config_for(kinds(64, group=group), (10, 0))
    assert config.packed == packed
    assert config.positions == 256 // packed


def test_pairs_of_ctas_multiply_where_work_items_are_alike_and_head_dim_is_128():
    assert config_for(kinds(128), (10, 0)).ctas == config_for(kinds(100, group=4), (10, 3)).ctas == 2
    assert config_for(kinds(128, window_right=0), (10, 0)).ctas == config_for(kinds(64), (10, 0)).ctas == 1
    single, pair = config_for(kinds(128, window_right=0), (10, 0)), config_for(kinds(128), (10, 0))
    assert pair.positions == 2 * single.positions
    assert pair.k_bytes == single.k_bytes // 2
    assert pair.kv_slots == 2 * single.kv_slots


def test_nothing_is_emulated_where_the_special_function_rate_is_doubled():
    assert config_for(kinds(128), (10, 3)).share.fraction(128) == 0
    assert 0.1 < config_for(kinds(128), (10, 0)).share.fraction(128) < 0.3


def test_the_share_is_what_it_says():
    share = Exp2Share(period=16, emulated=4, first=1, last=3)
    assert share.fraction(128) == 4 / 16 * 2 / 4
    assert Exp2Share(period=16).fraction(128) == 4 / 16
    assert [share.holds(*at) for at in ((1, 12), (1, 10), (0, 12), (3, 12))] == [True, False, False, False]
    assert Exp2Share().fraction(128) == 0


@needs_dsl
@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        (kinds(128), Sm100Config(64, 64), "do not hold 128, 128"),
        (kinds(64, group=3), Sm100Config(64, 64, packed=2), "packed: got 2 heads, a group has 3"),
        (kinds(128, window_right=0), Sm100Config(128, 128, ctas=2), "ctas: a pair takes equal shares"),
    ],
)
def test_a_config_for_other_kinds_is_refused(kind, config, why):
    from fa4_cute.sm100_forward import Sm100Forward

    with pytest.raises(ValueError, match=why):
        Sm100Forward(kind, config)


@needs_dsl
def test_the_polynomial_is_the_best_of_its_degree():
    """Its error alternates with equal heights at as many points as it has free coefficients, p(0) = 1 being fixed."""
    from fa4_cute.exp2 import POLYNOMIAL

    x = np.linspace(0, 1, 100_001)
    error = np.polynomial.polynomial.polyval(x, POLYNOMIAL) / 2**x - 1
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    heights = np.abs(error[[*turns, -1]])
    assert len(heights) >= len(POLYNOMIAL) - 1
    assert heights.max() / heights[heights > heights.max() / 2].min() < 1.05


@needs_dsl
def test_the_emulated_exponential_is_as_accurate_as_it_says():
    """Executed as compiled, on every 8,009th float32 of either sign up to 127.5 in magnitude: half a million."""
    from emulator.cute_backend import run
    from emulator.cute_compile import Request

    from fa4_cute.exp2 import MAX_RELATIVE_ERROR

    first, last = (int(np.float32(x).view(np.uint32)) for x in (1e-30, 127.5))
    magnitudes = np.arange(first, last, 8009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([-magnitudes, magnitudes])
    x = torch.from_numpy(np.concatenate([x, np.zeros(-len(x) % 512, np.float32)]))
    y = torch.full_like(x, float("nan"))
    run(Request("sm_100a", "tests.emulator.cute_probe:Exp2Probe"), [x, y])
    want = torch.exp2(x.double())
    relative = ((y.double() - want) / want).abs()
    assert relative[(x >= -126) & (x <= 127)].max() <= MAX_RELATIVE_ERROR
    assert (y.double() - want)[x < -126].abs().max() <= 2.0**-126
    assert (y[x == 0] == 1).all()


CODE = {
    "full-128": (kinds(128), None),
    "causal-64": (kinds(64, window_right=0), None),
    "causal-gqa-128": (kinds(128, group=8, window_right=0), None),
    "varlen-left-used-sink-gqa-128": (varlen_kinds(128, 8, window_left=4), torch.float32),
    "varlen-left-used-sink-96": (varlen_kinds(96, 3, window_left=4), torch.float32),
    "varlen-used-sink-128": (varlen_kinds(128, 1), torch.float32),
    "window-softcap-256": (kinds(256, window_left=5, window_right=5, softcap=2.0), None),
    "window-softcap-192": (kinds(192, 128, window_left=5, window_right=5, softcap=2.0), None),
}


@needs_dsl
@needs_triton
@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
@pytest.mark.parametrize("name", CODE)
def test_machine_code_spills_nothing_and_keeps_to_each_roles_registers(name, arch):
    """No local memory; between a role's setmaxnreg and the next, no register index reaches its budget."""
    from emulator.cute_backend import FACTORIES
    from emulator.cute_compile import Request, compile_kernel

    kind, sink = CODE[name]
    config = config_for(kind, (10, 3) if arch == "sm_103a" else (10, 0))
    kept = compile_kernel(Request(arch, FACTORIES[arch], (kind, config, False), (kind, sink, False)))
    usage = disassembled(kept, "cuobjdump", "-res-usage")
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage
    code = disassembled(kept, "nvdisasm", "-c")
    assert not re.search(r"\b(LDL|STL)\b", code)
    parts = re.split(r"(USETMAXREG\.\S+ .*?;)", code)
    budgets = [int(re.findall(r"0x([0-9a-f]+)", part)[-1], 16) for part in parts[1::2]]
    assert budgets == [config.registers_softmax, config.registers_correction, config.registers_other]
    *roles, others = parts[2::2]
    others, exit_, tail = others.rpartition(" EXIT ;")  # behind the last exit: every role's loops around try_wait
    assert exit_
    for budget, part in zip([*budgets, max(budgets)], [*roles, others, tail]):
        highest = max(int(n) for n in re.findall(r"\bR(\d+)\b", part))
        assert highest < budget, f"R{highest} of {budget} registers"
