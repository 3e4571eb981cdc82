"""The command line: what it prints and how it exits, with kernels that are right and with kernels that are wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dispatch
from fa4_core.bench.contestants import Contestant
from fa4_core.bench.timing import WallTimer
from fa4_core.cli import missing_line
from fa4_core.commands import check, info, overview
from fa4_core.commands.app import make_app
from fa4_core.strategies import Case

ROOT = Path(__file__).resolve().parents[1]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a CUDA device")
SMALL = "D16 H2/2 B1 S64 causal fp32"


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments, module=dispatch: runner.invoke(make_app(module), list(arguments))


def with_attention(attention) -> types.SimpleNamespace:
    return types.SimpleNamespace(attention=attention, explain=dispatch.explain, __version__="0")


def off_by_one_key(q, k, v, *, causal=False, window=(None, None), **options):
    """attention with a causal mask that lets one key too many through."""
    return dispatch.attention(q, k, v, window=(window[0], 1 if causal else window[1]), **options)


@pytest.fixture
def few_checks(monkeypatch):
    names = ("causal, GQA", "varlen, with empty sequences")
    monkeypatch.setattr(check, "CASES", {name: check.CASES[name] for name in names})


@CPU_ONLY
def test_the_main_job_runs_what_runs_here_and_says_so():
    """As a user runs it, in a process of its own, where `dispatch` is `__main__`."""
    command = [sys.executable, "-m", "dispatch"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No CUDA device here: checked" in done.stdout
    assert "all checks passed" in done.stdout


@CPU_ONLY
def test_the_main_job_fails_where_a_check_fails(run, few_checks):
    result = run(module=with_attention(off_by_one_key))
    assert result.exit_code == 1
    assert "a check failed" in result.stdout


def test_check_passes_on_the_reference(run, few_checks):
    result = run("check", "--backend", "reference")
    assert result.exit_code == 0, result.stdout
    assert "varlen, with empty sequences" in result.stdout


def test_check_names_the_wrong_rows(run, few_checks):
    result = run("check", "--backend", "reference", module=with_attention(off_by_one_key))
    assert result.exit_code == 1
    assert "reference, causal, GQA, float32: out[" in result.stdout


def test_check_reports_a_kernel_that_raises_and_goes_on(run, few_checks):
    def broken(q, k, v, *, cu_seqlens_q=None, **options):
        if cu_seqlens_q is None:
            raise RuntimeError("does not compile")
        return dispatch.attention(q, k, v, cu_seqlens_q=cu_seqlens_q, **options)

    result = run("check", "--backend", "reference", module=with_attention(broken))
    assert result.exit_code == 1
    assert "RuntimeError: does not compile" in result.stdout
    assert "varlen, with empty sequences" in result.stdout


@pytest.mark.parametrize("processes", [0, 2])
def test_answers_come_in_order_from_however_many_processes(processes):
    """Another process has to find the attention, too."""
    case = Case(lengths=((5, 7),), dtype=torch.float64)
    jobs = [(case, torch.device("cpu"), backend) for backend in ("reference", "cute", "reference")]
    first, second, third = check._answers(dispatch.attention, jobs, processes)
    assert first == third
    assert first.cell.startswith("[green]0.")
    assert second.cell == "not served"


def test_every_problem_of_check_is_served_by_the_reference():
    for case in check.CASES.values():
        call = case.build()
        assert dispatch.explain(call.q, call.k, call.v, **call.options).backend in ("reference", "triton")


def test_fuzz_passes_on_the_reference_and_keeps_an_account(run, tmp_path):
    record = tmp_path / "fuzz.json"
    options = ("--backend", "reference", "--longest", "20", "--seed", "1", "--record", str(record))
    for runs in (1, 2):
        result = run("fuzz", "--minutes", "0.03", *options)
        assert result.exit_code == 0, result.stdout
        checked = int(re.search(r"(\d+) calls checked", result.stdout)[1])
        assert checked > 1
        accounts = json.loads(record.read_text())
        assert len(accounts) == runs
        assert accounts[-1]["calls"] == checked
        assert accounts[-1]["failure"] is None
        assert accounts[-1]["torch"] == torch.__version__


def test_fuzz_prints_a_minimal_call_that_fails_when_pasted(run, monkeypatch, tmp_path):
    record = tmp_path / "fuzz.json"
    options = ("--minutes", "1", "--backend", "reference", "--longest", "20", "--seed", "1", "--record", str(record))
    result = run("fuzz", *options, module=with_attention(off_by_one_key))
    assert result.exit_code == 1
    assert "FAILED, minimal example" in result.stdout
    source = result.stdout[result.stdout.index("import torch") :]
    assert "backend='reference'" in source
    assert json.loads(record.read_text())[0]["failure"]["call"] == source.strip()
    # What is printed is the minimal case itself: with the wrong attention it fails, with the right one it passes.
    exec(source, {})
    wrong = types.ModuleType("dispatch")
    wrong.attention = off_by_one_key
    monkeypatch.setitem(sys.modules, "dispatch", wrong)
    with pytest.raises(AssertionError, match="float64 gives"):
        exec(source, {})
    case = next(line for line in source.splitlines() if line.startswith("case = "))
    assert "causal=True" in case
    assert case.count("=") <= 5, "the example was not shrunk: a drawn case sets over ten fields"


def test_fuzz_stops_at_a_cuda_error_without_shrinking(run):
    """After such an error every call fails, so a shrunk example would be an arbitrary one."""
    calls = []

    def lost(q, k, v, **options):
        calls.append(q.shape)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = run("fuzz", "--minutes", "1", "--backend", "reference", module=with_attention(lost))
    assert result.exit_code == 1
    assert "device lost, not shrunk" in result.stdout
    assert len(calls) == 1


def test_help_says_in_a_whole_sentence_what_each_command_does():
    """Typer cuts a first sentence that is too long for a line of 80 columns."""
    command, environment = [sys.executable, "-m", "dispatch", "--help"], os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    listed = [line.strip() for line in done.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert [line.split()[0] for line in listed] == ["check", "fuzz", "info", "warm", "bench"]
    assert not [line for line in listed if line.endswith("...") or not line.endswith(".")]


def test_a_backend_that_is_not_there_is_named(run):
    result = run("fuzz", "--backend", "cude")
    assert result.exit_code == 2
    assert "accepted are cute, triton, reference" in " ".join(result.output.split())


@CPU_ONLY
def test_a_backend_that_cannot_run_says_why(run):
    result = run("check", "--backend", "cute")
    assert result.exit_code == 2
    assert "nvidia" in result.output.lower()  # the package, or the GPU, that is missing


def test_info_lists_versions_and_backends(run):
    result = run("info")
    assert result.exit_code == 0
    for expected in (dispatch.__version__, torch.__version__, "reference", "triton", "cute", "not available"):
        assert expected in result.stdout


def test_info_prints_an_install_line_with_its_extra(run, monkeypatch):
    line = "install it with: pip install 'fa4-attention[cute]'"
    monkeypatch.setattr(info, "unavailable", lambda device: {"cute": line})
    assert "fa4-attention[cute]" in run("info").stdout


@CPU_ONLY
def test_bench_writes_json_and_a_chart(run, tmp_path):
    out, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ("bench", "--case", SMALL, "--rounds", "2", "--out", str(out), "--chart", str(chart))
    result = run(*arguments, "--contestants", "reference,math,fa2")
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    by_name = {row["name"]: row for row in content["rows"]}
    assert by_name["reference"]["tflops"] > 0
    assert by_name["fa2"]["skipped"] == "runs on CUDA devices, not on cpu"
    assert content["environment"]["torch"] == torch.__version__
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sideways"], "accepted are forward, backward"),
        (["--case-filter", "["], "accepted are regular expressions: unterminated character set"),
        (["--case", "D64"], "accepted are names like"),
        (["--contestants", "fa5"], "accepted are triton"),
    ],
)
def test_bench_refuses_what_it_does_not_know(run, tmp_path, arguments, message):
    result = run("bench", "--out", str(tmp_path / "bench.json"), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_missing_packages_give_the_line_that_installs_them():
    """typer is hidden from a new interpreter: the command line must say what to install, not raise."""
    program = (
        "import importlib.util as u, sys\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'typer' else found(name, *rest)\n"
        "sys.modules['typer'] = None\n"
        "import runpy; runpy.run_module('dispatch', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "this command needs typer; install with: pip install 'fa4-attention[cli]'"
    )


def test_nothing_is_missing_here():
    assert missing_line("cli") is None
    assert missing_line("bench") is None


class Fake(Contestant):
    """Runs the reference under another contestant's name."""

    def __init__(self, name, factor=1.0):
        self.name, self.factor = name, factor

    def unavailable(self, device):
        return None

    def refusal(self, case, backward):
        return None

    def function(self, case):
        return lambda q, k, v: self.factor * dispatch.attention(q, k, v, causal=case.causal)


@pytest.fixture
def small_race(monkeypatch, few_checks):
    """The main job as it runs with a GPU, where the GPU's contestants are the reference on the CPU."""
    contestants = {name: Fake(name) for name in ("triton", "fa2", "cudnn")}
    monkeypatch.setattr(overview, "all_contestants", lambda attention: contestants)
    monkeypatch.setattr(overview, "unavailable", lambda device: {"triton": None, "reference": None, "cute": "no"})
    monkeypatch.setattr(overview, "has_speed", lambda device: True)
    monkeypatch.setattr(overview, "CudaTimer", WallTimer)
    monkeypatch.setattr(overview, "SPEED_CASES", {"forward": (SMALL,), "backward": (SMALL,)})
    return contestants


@CPU_ONLY
def test_the_main_job_shows_speed_beside_sdpa(run, small_race):
    result = run()
    assert result.exit_code == 0, result.stdout
    assert "triton/fa2" in result.stdout
    assert re.search(r"\d\.\d\dx", result.stdout)
    assert "all checks passed" in result.stdout


@CPU_ONLY
def test_the_main_job_says_so_where_no_kernel_runs_on_the_gpu(run, small_race, monkeypatch):
    """An old GPU, or one without Triton: the reference passes there, and that must not read as if kernels had."""
    monkeypatch.setattr(overview, "unavailable", lambda device: {"triton": "no", "reference": None, "cute": "no"})
    result = run()
    assert result.exit_code == 0, result.stdout
    assert "No kernel runs on this GPU" in result.stdout
    assert "TFLOP/s" not in result.stdout


@CPU_ONLY
def test_the_main_job_fails_where_a_kernel_is_wrong_at_full_size(run, small_race):
    small_race["triton"] = Fake("triton", factor=1.1)
    result = run()
    assert result.exit_code == 1
    assert "wrong result" in result.stdout
