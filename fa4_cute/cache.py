"""Compiled kernels, kept in memory and on disk, so that a kernel is compiled once a machine.

An entry is a shared library: the object that the CuTe DSL exports ahead of time, linked against its run-time library.
It loads in some 20 ms through tvm_ffi, without importing the DSL. Where there is no C compiler the object itself is
kept and loaded through the DSL, which takes a second longer in each process (`python -m dispatch info` says which).

The name of an entry is a hash of everything that the machine code depends on: the kernel's key, the architecture, the
sources of this package and the versions of the DSL and of tvm_ffi. Entries are written beside their place and moved
there, so processes can share the folder, and one that cannot write there uses what it holds; a lock for each entry,
where the file system has locks, spares them building it twice. An entry that does not load is built again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

FUNCTION = "attention"
"""The exported function's name in every entry."""
_LOCK = threading.RLock()
"""The DSL's compiler is not safe under threads."""


def folder() -> Path | None:
    """Where entries are kept: $FA4_CACHE_DIR, else a folder of the user's cache; None for a user without a home."""
    chosen = os.environ.get("FA4_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()  # a bare file name would be sought among the system's libraries
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fa4-attention"
    except RuntimeError:
        return None


def writable() -> bool:
    """Whether the folder, which this makes, takes entries."""
    place = folder()
    try:
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except OSError:
        return False
    return place is not None


@functools.cache
def _fingerprint() -> str:
    """A hash of this package's sources and of the versions that compile them."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        digest.update(f"{package}={metadata.version(package)}\0".encode())
    return digest.hexdigest()


@functools.cache
def linker() -> str | None:
    """The C compiler that links entries, or None."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def get(key: str, compile_kernel: Callable[[], Any]) -> Callable[..., None]:
    """The compiled kernel of `key`, from disk or compiled now.

    key: names the kernel, the architecture and what it is compiled for. compile_kernel: returns what `cute.compile`
    returns; whatever it raises is raised here.
    """
    with _LOCK:
        name = hashlib.sha256(f"{_fingerprint()}\0{key}".encode()).hexdigest()[:32]
        place = folder()
        if place is None:
            return compile_kernel()
        kept = _kept(place, name)
        if kept is not None:
            return kept
        with _locked(place, name) as can_write:
            kept = _kept(place, name)  # another process may have built it
            if kept is not None:
                return kept
            compiled = compile_kernel()
            entry = _write(place, name, compiled) if can_write else None
        if entry is None or entry.suffix == ".o":
            return compiled
        return _kept(place, name) or compiled


def _kept(place: Path, name: str) -> Callable[..., None] | None:
    """The kernel of an entry; None where there is none, or none that loads here."""
    for entry in (place / f"{name}.so", place / f"{name}.o"):
        if os.path.exists(entry):
            with contextlib.suppress(Exception):  # damaged, foreign, or where nothing may be executed
                return _load(entry)
    return None


@contextlib.contextmanager
def _locked(place: Path, name: str) -> Iterator[bool]:
    """Whether the folder can be written; then with the entry's lock held among processes, where there are locks."""
    import fcntl  # not on Windows, where this package is imported to be asked what it serves

    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = open(place / f"{name}.lock", "w")  # noqa: SIM115
    except OSError:
        yield False
        return
    with lock:
        with contextlib.suppress(OSError):  # file systems of clusters may have none
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield True


def _load(entry: Path) -> Callable[..., None]:
    if entry.suffix == ".so":
        import tvm_ffi

        return tvm_ffi.load_module(str(entry))[FUNCTION]
    import cutlass.cute as cute

    return getattr(cute.runtime.load_module(str(entry), enable_tvm_ffi=True), FUNCTION)


def _write(place: Path, name: str, compiled: Any) -> Path | None:
    """Exports and links a kernel into the folder; None where the disk would not take it."""
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=f"{name}.") as work:
            built = Path(work) / f"{name}.o"
            compiled.export_to_c(object_file_path=str(built), function_name=FUNCTION)
            if linker() is not None:
                built = _link(built)
            entry = place / built.name
            os.replace(built, entry)
            return entry
    except OSError:
        return None


def _link(built: Path) -> Path:
    """The object as a shared library that finds the run-time libraries where they are now."""
    import cutlass.cute as cute

    library = built.with_suffix(".so")
    needed = [Path(path) for path in cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)]
    command = [str(linker()), "-shared", "-o", str(library), str(built), *map(str, needed)]
    command += [f"-Wl,-rpath,{path.parent}" for path in needed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"linking {built} failed: {done.stderr.strip()}")
    return library
