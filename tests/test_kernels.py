"""Every kernel against float64, row by row: the compile-time axes are a table, the run-time axes are drawn."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from targets import Target

from fa4_core import reference
from fa4_core.checks import check_backward, check_forward
from fa4_core.strategies import Case, cases


def check(target, case):
    call = case.build(target.device)
    report = check_backward(target, call.q, call.k, call.v, dout=call.dout, dlse=call.dlse, **call.options)
    assert report.passed, f"{report}\n\n{case.as_call(target.device, target.backend)}"


@given(data=st.data())
def test_every_row_of_results_and_gradients_is_within_its_budget(target, dtype, kernel, data):
    """Lengths, windows, magnitudes, seqused and thresholds are drawn; rows that belong to no sequence hold NaN."""
    check(target, data.draw(cases(**{**target.limits, **kernel, "dtype": dtype})))


@given(data=st.data())
def test_any_combination_of_features_is_within_its_budget(target, dtype, data):
    """Draws the compile-time axes too, which the table above covers pairwise only."""
    if target.compiles:
        pytest.skip("compiles three kernels an example; `python -m dispatch fuzz` does this on a GPU")
    check(target, data.draw(cases(**target.limits, dtype=dtype)))


ODD_CASES = {
    # Seen: the tail after the last sequence spans several tiles, and only its first one was zeroed.
    "long tail": Case(lengths=((1, 1),) * 4, varlen=True, tail=(70, 70), heads_q=2, heads_kv=2),
    "no sequence": Case(lengths=(), varlen=True, tail=(5, 3)),
    "no batch": Case(lengths=()),
    "no query": Case(lengths=((0, 5),)),
    "no key": Case(lengths=((5, 0),)),
    "no key, sink": Case(lengths=((5, 0),), sink="normal"),
    "empty between full": Case(lengths=((9, 9), (0, 0), (7, 0), (0, 7), (3, 3)), varlen=True, causal=True),
    "one key": Case(lengths=((1, 1),), causal=True),
    "more queries than keys, causal": Case(lengths=((80, 20),), causal=True),
    "window beside every key": Case(lengths=((20, 80),), window=(0, 0), causal=True),
    "window wider than an int32 holds keys": Case(lengths=((20, 80),), window=(2**31 - 1, 2**31 - 1)),
    "sinks of -inf and rows without keys": Case(lengths=((30, 10),), causal=True, sink="off"),
    "sink far above": Case(lengths=((30, 40),), sink="large"),
    "nothing used": Case(lengths=((9, 9), (9, 9)), used=((0, 9), (9, 0))),
    # Seen: a tile past the used rows began its unmasked range before its range, and read out of bounds.
    "no key used of two tiles": Case(lengths=((70, 70),), used=((70,), (0,)), causal=True),
    "no query used of two tiles": Case(lengths=((140, 140),), used=((0,), (140,)), window=(10, None)),
    "rising keys, exact maximum": Case(lengths=((70, 300),), scores="rising", rescale_threshold=0.0),
    "rising keys, lazy maximum": Case(lengths=((70, 300),), scores="rising"),
    "near one-hot rows": Case(lengths=((70, 130),), scores="large", softmax_scale=1.0),
}


@pytest.mark.parametrize("case", ODD_CASES.values(), ids=ODD_CASES.keys())
def test_odd_shapes_and_magnitudes_are_within_their_budget(target, case):
    check(target, replace(case, dtype=target.widest))


@given(case=cases(dtype=torch.float64, longest=60))
@example(Case(dtype=torch.float64, lengths=((65, 130),), causal=True, window=(20, None), softcap=5.0, sink="normal"))
def test_float64_on_the_reference_keeps_float64(case):
    """A float32 step anywhere in the reference (its LSE was one) would be 2^20 budgets away."""
    check(Target("reference", "cpu"), case)


@given(case=cases())
def test_the_reference_where_lengths_cannot_be_read(case):
    """On a GPU it gathers ranges of rows by index tensors that it never reads; here on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_on_host", lambda device: False)
        check(Target("reference", "cpu"), case)


def test_long_rows_are_within_their_budget(target, dtype):
    """Rows of 3,000 keys are small numbers, whose errors a budget over the whole tensor would hide."""
    if target.interpreted:
        pytest.skip("minutes in the interpreter")
    check(target, Case(dtype=dtype, head_dim=64, head_dim_v=64, lengths=((40, 3000),), heads_q=2, causal=True))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 8.0])
@pytest.mark.parametrize("scores", ["normal", "large", "rising"])
def test_rescale_threshold_changes_no_result_beyond_rounding(target, scores, threshold):
    """A rescale that is skipped for O but not for the sum (or the reverse) is off by powers of two."""
    case = Case(dtype=torch.float16, head_dim=64, head_dim_v=64, lengths=((33, 200),), scores=scores,
                rescale_threshold=threshold)  # fmt: skip
    call = case.build(target.device)
    check_forward(target, call.q, call.k, call.v, **call.options).require()
