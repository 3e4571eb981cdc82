"""The benchmark harness: FLOPs, names, rows, result files, tables, charts. Only its timing needs a GPU."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st

import dispatch
from benchmarks import chart as chart_script
from benchmarks import sanitize
from fa4_core import kvcache
from fa4_core.bench import report, timing
from fa4_core.bench.cases import DTYPES, SUITES, Case, DecodeCase, parse_case
from fa4_core.bench.contestants import RACE, Contestant, Dispatch, FlashAttention3, all_contestants
from fa4_core.bench.harness import Bench, make_tensors
from fa4_core.bench.results import Results, open_results
from fa4_core.bench.timing import WallTimer, interleaved
from fa4_core.bench.warm import cells_to_warm, run_cell, warm_up

CPU = torch.device("cpu")
SMALL = Case(16, 2, 1, 1, 48, 48, causal=True, dtype="fp32")
STEP = DecodeCase(16, 2, 1, 3, 20, dtype="fp32")

drawn_cases = st.builds(
    Case,
    head_dim=st.sampled_from((16, 64, 256)),
    heads_q=st.integers(1, 64),
    heads_kv=st.integers(1, 64),
    batch=st.integers(1, 99),
    seqlen_q=st.integers(1, 70),
    seqlen_k=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 80),
    dtype=st.sampled_from(tuple(DTYPES)),
    head_dim_v=st.sampled_from((0, 16, 48)),
    softcap=st.integers(0, 50),
    sink=st.booleans(),
)
packed_cases = st.builds(
    lambda tokens, mean, **fields: Case(16, 1, 1, 1, tokens, tokens, mean_length=mean, **fields),
    tokens=st.integers(1, 70),
    mean=st.integers(1, 40),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 80),
)
decode_cases = st.builds(
    DecodeCase,
    head_dim=st.sampled_from((16, 128)),
    heads_q=st.integers(1, 64),
    heads_kv=st.integers(1, 64),
    batch=st.integers(1, 99),
    seqlen=st.integers(1, 5000),
    longest=st.just(0) | st.integers(1, 9999),
    capacity=st.just(0) | st.integers(9999, 20000),
    page=st.sampled_from((0, 1, 16)),
    dtype=st.sampled_from(tuple(DTYPES)),
)


@given(drawn_cases | packed_cases | decode_cases)
def test_a_cases_name_says_everything(case):
    assert parse_case(case.name) == case


@given(decode_cases)
def test_a_decode_case_has_room_for_its_lengths(case):
    assert len(case.lengths) == case.batch
    assert max(case.lengths) <= case.room
    assert case.room % max(case.page, 1) == 0
    itemsize = 4 if case.dtype == "fp32" else 2
    assert case.cache_bytes == 2 * sum(case.lengths) * case.heads_kv * case.head_dim * itemsize


def test_lengths_are_exponential_and_fill_the_case():
    case = Case(64, 32, 32, 1, 32768, 32768, causal=True, mean_length=512)
    assert sum(case.packed_lengths) == 32768
    assert 512 * 0.7 < 32768 / len(case.packed_lengths) < 512 * 1.4
    ragged = DecodeCase(128, 32, 8, 512, 4096, longest=65536).lengths
    assert ragged[0] == 65536
    assert sum(ragged[1:]) / 511 == pytest.approx(4096, rel=0.15)


def test_names_are_as_in_the_result_files():
    assert Case(128, 16, 16, 1, 16384, 16384, causal=True).name == "D128 H16/16 B1 S16384 causal bf16"
    assert Case(64, 32, 8, 2, 1, 4096, causal=False, window=9).name == "D64 H32/8 B2 S1/4096 full window 9 bf16"
    latent = Case(192, 16, 16, 1, 512, 512, causal=True, head_dim_v=128, softcap=30, sink=True)
    assert latent.name == "D192/128 H16/16 B1 S512 causal softcap 30 sink bf16"
    assert Case(64, 8, 8, 1, 512, 512, causal=True, mean_length=64).name == "D64 H8/8 B1 S512 mean 64 causal bf16"
    paged = DecodeCase(128, 32, 8, 16, 8192, page=16)
    assert paged.name == "decode D128 H32/8 B16 S8192 page 16 bf16"


@pytest.mark.parametrize(
    "name", ["", "D64", "D64 H8/8 B1 S1 causal", "D64 H8/8 B1 S1 causal int8", "decode", "decode D8"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        parse_case(name)


@given(packed_cases)
def test_flops_of_packed_sequences_are_their_sum(case):
    alone = [replace(case, seqlen_q=n, seqlen_k=n, mean_length=None) for n in case.packed_lengths]
    assert case.forward_flops == sum(c.forward_flops for c in alone)


@given(drawn_cases)
def test_flops_count_the_pairs_that_the_reference_attends_to(case):
    """With v the identity, the output is P itself: its non-zeros are the visible pairs."""
    q = torch.zeros(1, case.seqlen_q, 1, 1)
    k = torch.zeros(1, case.seqlen_k, 1, 1)
    v = torch.eye(case.seqlen_k)[None, :, None]
    p = dispatch.attention(q, k, v, causal=case.causal, window=(case.window, None), backend="reference")
    assert case.visible_pairs == int((p > 0).sum())
    dims = case.head_dim + case.head_dim_v
    assert case.forward_flops == 2 * dims * case.visible_pairs * case.heads_q * case.batch


def test_the_matrix_holds_the_cells_that_are_promised():
    equal = [c for c in SUITES["forward"] if c.heads_q == c.heads_kv]
    forward = {(c.head_dim, c.causal, c.seqlen_q) for c in equal if c.window is None}
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    assert forward == {(d, causal, s) for d in (64, 128, 256) for causal in (False, True) for s in lengths}
    grouped = {(c.heads_q, c.heads_kv, c.causal) for c in SUITES["forward"] if c.heads_q != c.heads_kv}
    assert grouped == {(32, 8, False), (32, 8, True)}
    backward = {(c.head_dim, c.causal, c.seqlen_q) for c in SUITES["backward"]}
    assert backward == {cell for cell in forward if cell[0] != 256 and cell[2] in (2048, 8192, 16384)}
    for case in (*equal, *SUITES["backward"]):
        assert case.heads_q * case.head_dim == 2048
    for case in (*SUITES["forward"], *SUITES["backward"]):
        assert case.batch * case.seqlen_q == 16384
        # Twice the largest L2 there is: a call cannot find in it what the call before left there.
        assert case.forward_bytes > 2 * 126 * 2**20
    features = {(c.head_dim, c.head_dim_v, c.window, c.softcap, c.sink) for c in SUITES["features"]}
    assert {(64, 64, 128, 0, True), (96, 96, None, 0, False), (192, 128, None, 0, False)} <= features
    packed = {(c.head_dim, c.mean_length, c.seqlen_q) for c in SUITES["varlen"]}
    assert packed == {(d, mean, 32768) for d in (64, 128) for mean in (512, 2048)}
    decode = {(c.batch, c.seqlen, c.heads_q, c.heads_kv) for c in SUITES["decode"]}
    assert {(1, 32768, 32, 8), (16, 8192, 32, 8), (64, 4096, 64, 8), (128, 2048, 32, 32)} <= decode
    assert {(c.longest, c.capacity, c.page) for c in SUITES["decode"]} >= {
        (65536, 0, 0), (0, 131072, 0), (0, 0, 16), (0, 0, 256)
    }  # fmt: skip
    assert sum(c.seqlen % 2 for c in SUITES["decode"] if c.batch * c.seqlen > 2**15) == 2  # no schedule's own lengths
    windows = [c for c in SUITES["forward"] if c.window is not None]
    assert {(c.causal, c.seqlen_q, c.window) for c in windows} == {(True, 16384, 1024)}


@pytest.mark.parametrize("name", RACE)
def test_contestants_say_on_the_cpu_that_they_need_a_gpu(name):
    contestant = all_contestants(dispatch.attention)[name]
    why = contestant.unavailable(CPU)
    if name == "triton" and why is None:
        pytest.skip("Triton's interpreter runs the kernels on the CPU in this process")
    assert why


def test_contestants_refuse_what_they_would_compute_differently():
    known = all_contestants(dispatch.attention)
    windowed, bottom_right = replace(SMALL, window=4), replace(SMALL, seqlen_q=7)
    packed = replace(SMALL, mean_length=9)
    for name, case, lacks in (
        ("fa2", packed, "packed"), ("flex", packed, "packed"), ("cudnn", replace(SMALL, softcap=3), "softcap"),
        ("flex", replace(SMALL, sink=True), "sink"),
    ):  # fmt: skip
        assert lacks in known[name].refusal(case, backward=False)
    for changed in ({"page": 16}, {"capacity": 99}, {"longest": 99}):
        for name in ("fa2", "cudnn", "fa4"):
            assert "lengths" in known[name].decode_refusal(replace(STEP, **changed))
    for name in ("fa2", "cudnn", "math"):
        assert "window" in known[name].refusal(windowed, backward=False)
        assert "top-left" in known[name].refusal(bottom_right, backward=False)
        assert known[name].refusal(replace(SMALL, dtype="bf16"), backward=True) is None


def test_fa3_refuses_what_its_build_leaves_out(monkeypatch):
    flags = {"BACKWARD": True, "LOCAL": True, "FP16": True, "PAGEDKV": True}
    module = type(report)("fa3_fwd_config")
    module.CONFIG = {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": value for name, value in flags.items()}}
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", module)
    case = replace(SMALL, dtype="bf16")
    assert FlashAttention3().refusal(case, backward=False) is None
    assert FlashAttention3().refusal(case, backward=True) == "this build leaves out backward"
    assert FlashAttention3().refusal(replace(case, window=4), backward=False) == "this build leaves out local"
    assert FlashAttention3().refusal(replace(case, dtype="fp16"), backward=False) == "this build leaves out fp16"
    assert FlashAttention3().decode_refusal(STEP) is None
    assert FlashAttention3().decode_refusal(replace(STEP, page=16)) == "this build leaves out pagedkv"


class Fake(Contestant):
    """Computes what `compute` computes."""

    def __init__(self, name, compute=None, unavailable=None, heads_first=False):
        self.name = name
        self.heads_first = heads_first
        self._compute = compute or (lambda case: dispatch_on(case))
        self._unavailable = unavailable

    def unavailable(self, device):
        return self._unavailable

    def refusal(self, case, backward):
        return None

    def function(self, case):
        return self._compute(case)


def dispatch_on(case):
    options = {"causal": case.causal, "window": (case.window, None)}
    return lambda q, k, v: dispatch.attention(q, k, v, **options)


def rows_of(suite, *contestants, rounds=2, reference=dispatch.attention, deadline=math.inf, cases=(SMALL,)):
    bench = Bench(WallTimer(), CPU, rounds, reference)
    named = {contestant.name: contestant for contestant in contestants}
    return [row for rows in bench.run(suite, cases, named, deadline) for row in rows]


@pytest.mark.parametrize("suite", ["forward", "backward"])
def test_every_contestant_gives_a_row_with_its_rate(suite):
    rows = rows_of(suite, Fake("one"), Fake("two"))
    for row in rows:
        flops = SMALL.forward_flops * (2.5 if suite == "backward" else 1)
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
        assert row["error_norm"] < 1e-6
        assert row["case"] == SMALL.name
    assert [row["name"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        ("varlen", replace(SMALL, mean_length=9)),
        ("features", replace(SMALL, head_dim_v=24, softcap=3, sink=True, window=20)),
    ],
)
def test_cases_with_features_reach_the_contestants(suite, case):
    """Checked against the reference with them: one that arrives without its softcap, sink or ends is an error row."""
    contestants = all_contestants(dispatch.attention)
    (row,) = rows_of(suite, contestants["reference"], cases=(case,))
    assert row["error_norm"] < 1e-6
    assert row["tflops"] > 0
    for lost in ({"softcap": 0.0}, {"sink": None}, {"cu_seqlens_q": None, "cu_seqlens_k": None}):

        def forgets(q, k, v, lost=lost, **options):
            kept = lost if options["backend"] == "triton" and set(lost) <= set(options) else {}
            q, k, v = (t[None] if "cu_seqlens_q" in kept and t.dim() == 3 else t for t in (q, k, v))
            out = dispatch.attention(q, k, v, **{**options, **kept, "backend": "reference"})
            return out[0] if "cu_seqlens_q" in kept and case.mean_length else out

        forgetful = Dispatch(forgets, "triton")
        forgetful.unavailable = lambda device: None
        (row,) = rows_of(suite, forgetful, cases=(case,))
        matters = (case.mean_length is not None) == ("cu_seqlens_q" in lost)
        assert ("error" in row) == matters, lost


@pytest.mark.parametrize("changed", [{}, {"longest": 33}, {"capacity": 50}, {"page": 8}, {"page": 1, "longest": 30}])
def test_decode_rows_hold_bandwidth_and_host_time(changed):
    case = replace(STEP, **changed)
    contestants = all_contestants(dispatch.attention, dispatch.attention_with_kvcache)
    reference, math = (row for row in rows_of("decode", contestants["reference"], contestants["math"], cases=(case,)))
    assert reference["gb_per_s"] == pytest.approx(case.cache_bytes / reference["ms"] / 1e6)
    assert reference["wall_us"] > 0
    assert reference["error_norm"] < 1e-6
    assert ("skipped" in math) == bool(changed)


def test_a_wrong_decode_step_is_an_error_not_a_time():
    def forgets_the_lengths(q, k, v, cache_seqlens, **options):
        return dispatch.attention_with_kvcache(q, k, v, cache_seqlens=cache_seqlens // 2, **options)

    contestants = all_contestants(dispatch.attention, forgets_the_lengths)
    (row,) = rows_of("decode", contestants["reference"], cases=(STEP,))
    assert row["error"].startswith("ArithmeticError: wrong result")
    assert "gb_per_s" not in row


def test_heads_first_contestants_are_compared_in_the_common_layout():
    def sdpa(case):
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: attend(q, k, v, is_causal=case.causal, enable_gqa=True)

    for suite in ("forward", "backward"):
        (row,) = rows_of(suite, Fake("sdpa", sdpa, heads_first=True))
        assert row["error_norm"] < 1e-5


def test_one_that_raises_does_not_end_the_race():
    def broken(case):
        raise RuntimeError("no kernel image\nmore lines")

    first, second, third = rows_of(
        "forward", Fake("broken", broken), Fake("absent", unavailable="not here"), Fake("ok")
    )
    assert first["error"] == "RuntimeError: no kernel image"
    assert second["skipped"] == "not here"
    assert third["ms"] > 0


def test_one_that_raises_while_it_is_timed_leaves_an_error_and_no_time():
    def late(case):
        calls = iter(range(3))

        def function(q, k, v):
            if next(calls, None) is None:
                raise RuntimeError("launch failure")
            return dispatch_on(case)(q, k, v)

        return function

    first, second = rows_of("forward", Fake("late", late), Fake("ok"), rounds=5)
    assert first["error"] == "RuntimeError: launch failure"
    assert "ms" not in first
    assert second["ms"] > 0


@pytest.mark.parametrize("factor", [1.05, math.nan])
def test_a_wrong_result_is_an_error_not_a_time(factor):
    (row,) = rows_of("forward", Fake("wrong", lambda case: lambda q, k, v: factor * dispatch_on(case)(q, k, v)))
    assert row["error"].startswith("ArithmeticError: wrong result")
    assert "ms" not in row


def test_a_wrong_gradient_is_an_error_not_a_time():
    def wrong(case):
        return lambda q, k, v: dispatch_on(case)(q, k.detach(), v) + 0.0 * k.sum()

    (row,) = rows_of("backward", Fake("wrong", wrong))
    assert "wrong result" in row["error"]


def test_cases_past_the_deadline_say_so():
    (row,) = rows_of("forward", Fake("one"), deadline=-math.inf)
    assert row["skipped"] == "the time budget was spent"


def test_host_rows_hold_all_three_times():
    (row,) = rows_of("host", Fake("one"))
    assert all(row[column] > 0 for column in ("wall_us", "wall_grad_us", "wall_step_us"))


def test_inputs_are_normal_and_the_same_for_every_run():
    first, second = (make_tensors(replace(SMALL, seqlen_q=512), CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first.q.std().item() == pytest.approx(1.0, abs=0.05)
    assert first.q.shape == (1, 512, 2, 16)
    assert first.k.shape == (1, 48, 1, 16)


def test_rounds_interleave_and_start_with_another_contestant_each_time():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times = interleaved(samples, 3)
    assert "".join(order) == "abcbcacab"
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_timer_measures_the_device_not_the_host():
    x = torch.randn(4096, 4096, device="cuda")
    timer = timing.CudaTimer()
    prepared = timer.prepare(lambda: lambda: x @ x)
    assert prepared.method == "graph"
    once, again = prepared.sample(), prepared.sample()
    assert once == pytest.approx(again, rel=0.3)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        _ = x @ x
    end.record()
    end.synchronize()
    assert once == pytest.approx(start.elapsed_time(end) / 50, rel=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_cannot_be_captured_is_timed_with_events():
    x = torch.randn(1024, 1024, device="cuda")
    prepared = timing.CudaTimer().prepare(lambda: lambda: (x @ x).sum().item())
    assert prepared.method.startswith("events, not capturable")
    assert prepared.sample() > 0
    torch.randn(4, device="cuda")  # seen: the failed capture left the random generator unusable


ENVIRONMENT = {
    "device": "NVIDIA Test GPU",
    "torch": "2.11.0",
    "cudnn": 91900,
    "triton": "3.6.0",
    "peers": {"fa3": "0.0.3", "fa4": None},
}


@pytest.fixture
def sample():
    """A small result file's content: two lengths, one window, host and memory rows, a skip and an error."""
    results = Results(dict(ENVIRONMENT))
    results.start_run("0123456789abcdef")
    base = Case(128, 16, 16, 1, 16384, 16384, causal=True)
    rows = []
    for case, ms in ((base, 2.0), (replace(base, batch=8, seqlen_q=2048, seqlen_k=2048), 0.4)):
        for name, factor in (("triton", 1.0), ("fa2", 1.5), ("cudnn", 0.8)):
            for suite, flops in (("forward", case.forward_flops), ("backward", case.backward_flops)):
                tflops = flops / (ms * factor) / 1e9
                rows.append({"suite": suite, "case": case.name, "name": name, "ms": ms * factor, "tflops": tflops})
    windowed = replace(base, window=1024)
    rows.append({"suite": "forward", "case": windowed.name, "name": "triton", "ms": 0.3, "tflops": 400.0})
    rows.append({"suite": "forward", "case": windowed.name, "name": "fa2", "skipped": "has no window"})
    rows.append({"suite": "backward", "case": base.name, "name": "fa4", "error": "RuntimeError: boom"})
    rows.append({"suite": "host", "case": base.name, "name": "triton", "wall_us": 30.5, "wall_grad_us": 50.0})
    rows.append({"suite": "memory", "case": base.name, "name": "triton", "extra_mib": 65.0})
    results.add(rows)
    return results


def test_result_files_round_trip_and_keep_the_promised_form(sample, tmp_path):
    path = tmp_path / "h100.json"
    sample.save(path)
    content = json.loads(path.read_text())
    assert content["environment"]["device"] == "NVIDIA Test GPU"
    assert content["environment"]["runs"][0]["commit"] == "0123456789abcdef"
    row = content["rows"][0]
    assert {"suite", "case", "name", "ms", "tflops"} <= set(row)
    assert row["case"] == "D128 H16/16 B1 S16384 causal bf16"
    again = Results.load(path)
    assert again.rows == sample.rows
    assert again.environment == ENVIRONMENT


def test_a_cell_measured_again_replaces_its_row_and_spent_runs_go(sample, tmp_path):
    path = tmp_path / "h100.json"
    sample.save(path)
    results = open_results(path, dict(ENVIRONMENT))
    count = len(results.rows)
    results.start_run("new")
    results.add([dict(row, ms=9.0) for row in results.rows])
    results.save(path)
    again = Results.load(path)
    assert len(again.rows) == count
    assert [run["commit"] for run in again.runs] == ["new"]
    assert {row["run"] for row in again.rows} == {0}


def test_results_of_another_machine_do_not_mix(sample, tmp_path):
    path = tmp_path / "h100.json"
    sample.save(path)
    with pytest.raises(ValueError, match="device NVIDIA Test GPU there, Other here"):
        open_results(path, ENVIRONMENT | {"device": "Other"})


@pytest.mark.parametrize(
    "content", ["", "not JSON", "[]", "{}", '{"environment": 3, "rows": []}', '{"environment": {}}']
)
def test_a_file_that_is_no_result_file_is_named_and_kept(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no result file of this harness"):
        open_results(path, ENVIRONMENT)
    assert path.read_text() == content


def test_the_text_report_ends_with_ratios(sample):
    text = report.text(sample.rows)
    line = next(line for line in text.splitlines() if line.startswith("D128 H16/16 B1 S16384 causal bf16"))
    assert line.split()[-2:] == ["1.50", "0.80"]
    assert "skipped: fa2, 1 cells: has no window" in text
    assert "error: fa4, 1 cells: RuntimeError: boom" in text
    shares = report.window_shares(sample.rows)
    assert shares.loc["D128 H16/16 B1 S16384 causal window 1024 bf16", "triton"] == pytest.approx(0.15)


def test_the_readmes_tables_are_written_between_the_markers(sample, tmp_path):
    path, readme, picture = tmp_path / "h100.json", tmp_path / "README.md", tmp_path / "speed.png"
    sample.save(path)
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    for _ in range(2):  # writing twice is writing once
        chart_script.main(path, readme, picture)
    written = readme.read_text()
    assert written.startswith("before\n<!-- results -->\n")
    assert written.endswith("<!-- /results -->\nafter\n")
    assert "old" not in written
    rate = Case.parse("D128 H16/16 B1 S16384 causal bf16").forward_flops / 2.0 / 1e9
    assert f"| D128 H16/16 B1 S16384 causal bf16 | {rate:.0f} |" in written
    assert "FA2 (SDPA)" in written
    assert "NVIDIA Test GPU with torch 2.11.0, cuDNN 91900, Triton 3.6.0, FA3 0.0.3" in written
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_follow_the_suite_and_not_the_runs_that_filled_them():
    rows = [{"suite": "decode", "case": "own", "name": "cute", "gb_per_s": 1.0}]
    rows += [{"suite": "decode", "case": case.name, "name": "cute", "gb_per_s": 2.0} for case in SUITES["decode"][::-1]]
    shown = list(report.pivot(rows, "decode", "gb_per_s").index)
    assert shown == [*(case.name for case in SUITES["decode"]), "own"]


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="<!-- results -->"):
        report.write_between(tmp_path / "README.md", "results", "x")


RESULTS = Path(chart_script.ROOT) / "benchmarks" / "results" / "h100.json"


@pytest.mark.skipif(not RESULTS.exists(), reason="no results are recorded yet")
def test_the_readme_shows_the_recorded_results():
    """Whoever commits results runs `python -m benchmarks.chart`, too."""
    readme = (chart_script.ROOT / "README.md").read_text()
    shown = readme.split("<!-- results -->\n")[1].split("\n<!-- /results -->")[0]
    assert shown == chart_script.section(Results.load(RESULTS), chart_script.PICTURE, chart_script.ROOT / "README.md")


def test_every_way_to_read_a_cache_is_a_kernel_that_assembles(tmp_path):
    """It runs on a GPU alone."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="needs triton, for ptxas")
    from benchmarks.cache_reads import VARIANTS, ptx

    for variant in VARIANTS:
        (tmp_path / "reads.ptx").write_text(ptx(variant))
        command = [Path(nvidia.__file__).parent / "bin" / "ptxas", "-arch=sm_90a", "-o", os.devnull, "reads.ptx"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (variant, done.stderr)


def test_the_record_of_a_test_run_says_what_passed_failed_and_was_skipped(tmp_path):
    """In a process of its own: pytest inside pytest would share its plugins and modules."""
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "@pytest.mark.parametrize('i', [1, 2])\n"
        "@pytest.mark.skip(reason='no second device')\n"
        "def test_skips(i): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_errs(broken): pass\n"
    )
    out = tmp_path / "record.json"
    options = ["--out", str(out), "--anywhere"]
    pytest_arguments = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu_tests", *options, "--", *pytest_arguments]
    done = subprocess.run(command, cwd=chart_script.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert (content["passed"], content["failed"], content["errors"], content["skipped"]) == (1, 1, 1, 2)
    assert content["skip_reasons"] == {"no second device": 2}
    assert len(content["failures"]) == 2
    assert re.fullmatch(r"[0-9a-f]{40}\+?", content["commit"]) or content["commit"] is None
    assert content["torch"] == torch.__version__
    assert any("test_passes" in name for name in content["slowest"])


def test_only_what_compiles_and_runs_is_compiled_ahead():
    kept, absent, other = Fake("kept"), Fake("absent", unavailable="not here"), Fake("other")
    kept.compiles = absent.compiles = True
    named = {contestant.name: contestant for contestant in (kept, absent, other)}
    cells = cells_to_warm({"forward": [SMALL], "backward": [SMALL]}, named, CPU)
    assert cells == [("backward", SMALL.name, "kept"), ("forward", SMALL.name, "kept")]


def test_compiling_ahead_runs_the_cells_in_other_processes(monkeypatch):
    """The environment is the only thing that both processes share: a cell that runs elsewhere leaves none here."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    named = {"reference": all_contestants(dispatch.attention)["reference"]}
    assert warm_up(dispatch.attention, {"host": [SMALL]}, named, CPU, jobs=1) == 1
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ


@pytest.mark.parametrize("suite", ["forward", "backward", "host"])
def test_warming_runs_the_forward_and_where_asked_the_backward(suite, monkeypatch):
    seen = []

    def watched(q, k, v, **options):
        seen.append(q.requires_grad)
        return dispatch.attention(q, k, v, **options)

    run_cell(watched, suite, SMALL.name, "reference", "cpu")
    assert seen == ([False] if suite == "forward" else [False, True])


def test_the_sanitizers_calls_are_attention_on_caches_too_whose_lengths_and_pages_are_wild(monkeypatch):
    """On the reference. A call that is wrong whatever the kernel does would say nothing about one."""
    monkeypatch.setattr(kvcache, "contents_are_checked", lambda device: False)
    for title, chosen in sanitize.SETS.items():
        counts = [int(n) for n in re.findall(r"(\d+) (?:cases|calls)", title)]
        assert sum(counts) == len(chosen.calls), title
        assert title.startswith(chosen.tool)
    for call in (*sanitize.STEPS, *sanitize.CASES[2:]):
        sanitize.check(call, "reference", CPU, backward=call in sanitize.CASES).require()


@pytest.mark.parametrize(
    ("printed", "clean", "right"),
    [
        ("========= COMPUTE-SANITIZER\nright\nright\n========= ERROR SUMMARY: 0 errors\n", True, 2),
        ("right\nwrong: a call\nout[0]: 1\n========= ERROR SUMMARY: 0 errors\n", False, 1),
        ("right\nright\n========= ERROR SUMMARY: 10 errors\n", False, 2),
        ("right\nright\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True, 2),
        ("right\nright\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", False, 2),
        ("right\nright\n", False, 2),
    ],
)
def test_what_a_sanitizer_printed_is_clean_without_findings_and_with_right_results(printed, clean, right):
    found = sanitize.finding(printed, calls=2)
    assert (sanitize.is_clean(found), found["results right"], found["results wrong"]) == (clean, right, 2 - right)
    assert ("output" in found) != clean


@pytest.mark.parametrize(("option", "accepted"), [("tool", "memcheck, racecheck"), ("backend", "triton, cute")])
def test_an_unknown_name_is_refused_before_any_sanitizer_runs(option, accepted):
    with pytest.raises(typer.BadParameter, match=f"--{option}: got valgrind, accepted are {accepted}"):
        sanitize.main(**{option: [accepted.split(", ")[0], "valgrind"]})


def test_the_sanitizers_record_has_an_entry_for_every_set(monkeypatch, tmp_path):
    """A script stands in for the tool; where there is none, that is said."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@" >&2\nfor i in 1 2 3; do echo right; done\necho ERROR SUMMARY: 0 errors\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((str(tmp_path), os.environ["PATH"])))
    monkeypatch.setattr(sys, "executable", "true")  # in place of the run that compiles
    three, seven = "memcheck, decode kernel of cute, 3 calls", "memcheck, forward of cute, 7 cases"
    clean = sanitize.sanitize(tmp_path / "record.json", [three, seven], sanitize.find_sanitizer(), jobs=2, limit=60)
    content = json.loads((tmp_path / "record.json").read_text())
    assert not clean
    assert content[three] == {"summary": "ERROR SUMMARY: 0 errors", "results wrong": 0, "results right": 3}
    assert content[seven]["results wrong"] == 4
    assert "--tool memcheck --report-api-errors no true -m benchmarks.sanitize --calls" in content[seven]["output"][0]
    assert content["torch"] == torch.__version__
    tool.write_text("#!/bin/sh\necho right\nsleep 60\n")  # in a process of its own, which holds the output open
    clean = sanitize.sanitize(tmp_path / "record.json", [three], str(tool), jobs=1, limit=0.5)
    content = json.loads((tmp_path / "record.json").read_text())
    assert (clean, content[three]["results right"]) == (False, 1)
    assert content[three]["summary"].startswith("none")
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sanitize, "CUDA_FOLDER", tmp_path / "nowhere")
    with pytest.raises(typer.BadParameter, match="needs compute-sanitizer"):
        sanitize.find_sanitizer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="no CUDA device"):
        sanitize.main()
