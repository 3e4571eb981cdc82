"""The strategies: cases are valid, repeatable, printable, and reach what they are there to reach."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch import attention
from fa4_core import problem
from fa4_core.strategies import SCORES, STORAGES, Case, cases, invalid_calls


@given(case=cases(longest=30, max_head_dim=24))
def test_a_case_prints_as_the_call_that_made_it(case):
    """What a failing fuzz run prints can be pasted and runs the same numbers."""
    scope = {}
    exec(case.as_call(), scope)
    assert scope["case"] == case
    again = case.build()
    assert torch.equal(scope["q"].nan_to_num(), again.q.nan_to_num())
    assert torch.equal(scope["out"], attention(again.q, again.k, again.v, **again.options))


def test_a_printed_case_shows_only_what_is_not_default():
    assert repr(Case(causal=True, window=(3, None))) == "Case(causal=True, window=(3, None))"


@given(case=cases(longest=30, max_head_dim=24))
def test_equal_cases_build_equal_calls(case):
    first, second = case.build(), case.build()
    for name in ("q", "k", "v", "dout", "dlse"):
        assert torch.equal(getattr(first, name).nan_to_num(), getattr(second, name).nan_to_num())


@pytest.mark.parametrize("storage", STORAGES)
def test_storages_differ_in_strides_and_not_in_values(storage):
    case = Case(heads_q=2, heads_kv=2, lengths=((5, 6),) * 2, storage=storage)
    q, k, v, *_ = case.build()
    plain = Case(heads_q=2, heads_kv=2, lengths=((5, 6),) * 2).build()
    if storage == "broadcast":
        assert k.stride(2) == v.stride(2) == 0
        assert torch.equal(k[:, :, 0], plain.k[:, :, 0])
    else:
        assert torch.equal(k, plain.k)
        assert (q.stride() == plain.q.stride()) == (storage == "contiguous")


@pytest.mark.parametrize("varlen", [False, True])
def test_rows_that_take_no_part_hold_nan(varlen):
    """In q, k, v and in the arriving gradients: whatever a kernel lets through shows."""
    case = Case(lengths=((5, 6), (5, 6)), used=((3, 5), (6, 2)), varlen=varlen, tail=(2, 1) if varlen else (0, 0))
    q, k, _, _, dout, dlse = case.build()
    q_rows, k_rows = (t.flatten(0, -3)[..., 0, 0].isnan().tolist() for t in (q, k))
    assert q_rows == [False] * 3 + [True] * 2 + [False] * 5 + [True] * (2 if varlen else 0)
    assert k_rows == [False] * 8 + [True] * 4 + [True] * (1 if varlen else 0)
    assert dout.flatten(0, -3)[..., 0, 0].isnan().tolist() == q_rows
    assert dlse.transpose(-1, -2).reshape(-1).isnan().tolist() == q_rows


@pytest.mark.parametrize("scores", SCORES)
def test_score_magnitudes_move_the_running_maximum_as_they_say(scores):
    """In tiles of 64 keys: N(0, 1) never moves it by 8 after the first, rising keys move it at every one."""
    q, k, *_ = Case(head_dim=64, head_dim_v=64, lengths=((64, 512),), scores=scores).build()
    logits = torch.einsum("bihd,bjhd->bij", q, k) * 0.125 * math.log2(math.e)
    tiles = logits.unflatten(-1, (8, 64)).amax(-1).cummax(-1).values
    moves = (tiles.diff(dim=-1) > 8.0).float().mean()
    assert {"normal": moves == 0.0, "large": 0.0 < moves < 0.3, "rising": moves > 0.5}[scores]


def test_cases_reach_every_feature():
    """A strategy that stops drawing a feature would leave it untested in silence."""
    reached, lengths, hints = set(), set(), set()

    @settings(max_examples=300, database=None, derandomize=True)
    @given(case=cases())
    def collect(case):
        call = case.build()
        options = call.options
        left, right = (-1 if side is None else side for side in options["window"])
        inputs = problem.Inputs(*call[:3], *(options.get(name) for name in problem.Inputs._fields[3:]))
        made = problem.make_problem(inputs, softcap=options["softcap"], window_left=left,
                                    window_right=0 if options["causal"] else right)  # fmt: skip
        reached.update(made.kinds.features())
        lengths.update(n for pair in case.lengths for n in pair)
        hints.add(case.hints)

    collect()
    assert reached >= {"varlen", "seqused", "window or causal", "softcap", "sink", "head_dim_v != head_dim", "GQA"}
    assert {0, 1, 63, 65, 128} <= lengths
    assert hints == {"none", "exact", "tenfold"}


@given(data=st.data())
def test_fixed_fields_and_features_are_kept(data):
    case = data.draw(cases(dtype=torch.float16, head_dim=64, window=st.tuples(st.just(3), st.none()), longest=20))
    assert (case.dtype, case.head_dim, case.window) == (torch.float16, 64, (3, None))
    case = data.draw(cases(features=frozenset({"GQA"}), longest=20, max_head_dim=64))
    assert not any((case.varlen, case.causal, case.softcap, case.sink, case.used))
    assert case.head_dim == case.head_dim_v <= 64


@given(bad=invalid_calls())
def test_an_invalid_call_is_valid_but_for_its_argument(bad):
    """Otherwise it could be refused for another reason than the one it is there for."""
    call = bad.case.build()
    attention(call.q, call.k, call.v, **call.options)
    assert bad.argument in repr(bad)
