"""What is shipped: the wheel's and the source archive's contents, what an import costs, and the documents' commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

import dispatch

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "cutlass", "typer", "rich", "hypothesis", "pandas", "matplotlib", "pytest")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and a source archive of the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """The wheel's files as pip lays them out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def run_installed(program: str, site: Path, cwd: Path) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_four_parts_and_nothing_else(site):
    names = {entry.name for entry in site.iterdir()}
    info = f"fa4_attention-{dispatch.__version__}.dist-info"
    assert names == {"dispatch.py", "fa4_core", "fa4_triton", "fa4_cute", info}
    assert not list(site.rglob("test_*"))


def test_the_wheel_says_what_it_needs(site):
    info = next(site.glob("*.dist-info"))
    metadata = message_from_bytes((info / "METADATA").read_bytes())
    hard = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [re.match(r"[\w-]+", need)[0] for need in hard] == ["torch"]
    assert {"triton", "cute", "cute-cu13", "cli", "bench", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()


def test_the_source_archive_can_be_tested(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for needed in (
        "dispatch.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        ".ci/run",
        "docs/guide.md",
        "tests/conftest.py",
        "benchmarks/run.py",
        "examples/sentence_embeddings.py",
    ):
        assert needed in names


def test_the_installed_package_computes(site, tmp_path):
    program = (
        "import dispatch, torch\n"
        "from dispatch import attention\n"
        f"assert dispatch.__file__.startswith({str(site)!r})\n"
        "q = torch.randn(1, 8, 2, 16, requires_grad=True)\n"
        "attention(q, q, q, causal=True).sum().backward()\n"
        "print(q.grad.isfinite().all().item())"
    )
    assert run_installed(program, site, tmp_path).strip() == "True"


def test_importing_it_imports_nothing_optional(site, tmp_path):
    """Only what `import torch` brings itself may be there."""
    listed = f"print([m for m in {OPTIONAL!r} if m in sys.modules])"
    alone = run_installed(f"import sys, torch; {listed}", site, tmp_path)
    assert run_installed(f"import sys, dispatch; {listed}", site, tmp_path) == alone


def test_the_installed_command_line_runs(site, tmp_path):
    command = [sys.executable, "-m", "dispatch", "info"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout


def readme_command(name: str) -> str:
    """The one command between `<!-- name -->` markers."""
    section = (ROOT / "README.md").read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    lines = section.strip().splitlines()
    assert lines[0] == "```bash"
    assert lines[-1] == "```"
    assert len(lines) == 3, "one line, so that it can be pasted"
    return lines[1]


def test_the_readmes_commands_set_up_and_run():
    command = readme_command("try")
    assert command.endswith(".venv/bin/python -m dispatch")
    extras = re.search(r"'\.\[([\w,-]+)\]'", command)
    assert extras
    # Without one of the kernels' packages the main job would leave these kernels out, and still say that all passed.
    assert {"triton", "cute-cu13", "cli"} <= set(extras[1].split(","))
    command = readme_command("test")
    assert command.startswith("python3 -m venv .venv && ")
    assert " && .venv/bin/python -m pytest" in command
    assert "-m interpreter" in command


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` takes the command from the README; what it takes must be all of it, in two halves."""
    script = (ROOT / ".ci" / "run").read_text()
    taking = "".join(line for line in script.splitlines(keepends=True) if re.match(r"(command|setup|tests)=", line))
    program = f'{taking}printf "%s\\n%s\\n" "$setup" "$tests"'
    done = subprocess.run(["bash", "-euc", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    setup, tests = done.stdout.splitlines()
    assert f"{setup} && {tests}" == readme_command("test")
    assert tests.startswith(".venv/bin/python -m pytest")


def test_the_readme_lists_every_extra():
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) =", project, flags=re.MULTILINE))
    table = (ROOT / "README.md").read_text().split("| extra |")[1].split("\n\n")[0]
    listed = {name for line in table.splitlines() for name in re.findall(r"`([\w-]+)`", line[: line.find("|", 1)])}
    assert extras - {"dev"} == listed


def test_links_in_the_documents_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
