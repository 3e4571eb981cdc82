"""Compiles CuTe DSL kernels of the project without a GPU, in a process of its own, and keeps what the emulator reads.

The DSL reads its environment when it loads, and pytest's process may have loaded it without `CUTE_DSL_KEEP`; so one
worker an architecture does the compiling. Artifacts are cached on disk by what was asked for and by the sources.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ROOT = Path(__file__).parents[2]


class Request(NamedTuple):
    """One kernel: `factory` names a class as `module:Class`, which is made with `arguments` and compiled for `arch`.

    fake: what `fa4_cute.params.fake_arguments` takes, or the kernel's own `fake_arguments` where it has one.
    """

    arch: str
    factory: str
    arguments: tuple = ()
    fake: tuple = ()


class Artifacts(NamedTuple):
    """What one compilation kept."""

    ptx: str
    ir: str
    cubin: bytes


def compile_kernel(request: Request) -> Artifacts:
    """The artifacts of a kernel, from the disk or from the architecture's worker."""
    path = Path(tempfile.gettempdir()) / "emulator-cute" / f"{_key(request)}.pickle"
    if path.exists():
        return Artifacts(*pickle.loads(path.read_bytes()))
    reply = _worker(request.arch).ask(tuple(request))
    if isinstance(reply, str):
        raise RuntimeError(f"compiling {request.factory} for {request.arch} failed:\n{reply}")
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(pickle.dumps(reply))
    partial.rename(path)
    return Artifacts(*reply)


@functools.cache
def _sources() -> bytes:
    digest = hashlib.sha256()
    probes = Path(__file__).parent.glob("cute_*.py")
    for path in sorted([*(ROOT / "fa4_cute").glob("*.py"), ROOT / "fa4_core" / "problem.py", *probes]):
        digest.update(path.read_bytes())
    return digest.digest()


def _key(request: Request) -> str:
    from importlib.metadata import version

    told = repr(request).encode() + version("nvidia-cutlass-dsl").encode() + sys.version.encode()
    return hashlib.sha256(told + _sources()).hexdigest()[:32]


class _Worker:
    """The other end of `serve`, in a process whose environment makes the DSL keep its artifacts."""

    def __init__(self, arch: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="cute-keep-")
        environment = {
            **os.environ,
            "CUTE_DSL_ARCH": arch,
            "CUTE_DSL_KEEP": "ptx,ir,cubin",
            "CUTE_DSL_DUMP_DIR": self.folder.name,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.emulator.cute_compile"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self.close)

    def ask(self, request: tuple) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        _send(self.process.stdin, request)
        return _receive(self.process.stdout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


@functools.cache
def _worker(arch: str) -> _Worker:
    return _Worker(arch)


def _send(stream: BinaryIO, value: Any) -> None:
    raw = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(raw)) + raw)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the compiling process ended")
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def _compile(request: Request, folder: Path) -> tuple[str, str, bytes]:
    import cutlass.cute as cute

    from fa4_cute import params

    for old in folder.iterdir():
        old.unlink()
    module, name = request.factory.split(":")
    kernel = getattr(importlib.import_module(module), name)(*request.arguments)
    fake_arguments = getattr(kernel, "fake_arguments", params.fake_arguments)
    cute.compile(kernel, *fake_arguments(*request.fake))
    (ptx,), (ir,), (cubin,) = (list(folder.glob(f"*.{ending}")) for ending in ("ptx", "mlir", "cubin"))
    return ptx.read_text(), ir.read_text(), cubin.read_bytes()


def serve() -> None:
    """Answers requests on standard input until it closes. What the compiler prints goes to standard error."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        try:
            reply: Any = _compile(Request(*request), Path(os.environ["CUTE_DSL_DUMP_DIR"]))
        except Exception as error:  # handed to whoever asked
            reply = f"{type(error).__name__}: {error}"
        _send(replies, reply)


if __name__ == "__main__":
    serve()
