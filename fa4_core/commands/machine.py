"""What the commands ask of the machine: its device, and which backends run there."""

from __future__ import annotations

import os

import torch
import typer

from fa4_core import backends


def default_device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def unavailable(device: torch.device) -> dict[str, str | None]:
    """For each backend, why it cannot run on `device`, or None."""
    return {name: backends.load(name).unavailable(device) for name in backends.MODULES}


def running_backends(device: torch.device, named: list[str] | None) -> list[str]:
    """The backends to run: those named, or else every one that is available.

    Raises:
        typer.BadParameter: a named backend does not exist or is not available on `device`.
    """
    reasons = unavailable(device)
    for name in named or ():
        if name not in reasons:
            raise typer.BadParameter(f"backend: got {name!r}, accepted are {', '.join(reasons)}")
        if reasons[name] is not None:
            raise typer.BadParameter(f"backend {name!r}: {reasons[name]}")
    return named or [name for name, why in reasons.items() if why is None]


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes to check a backend in: what it takes of float32, float16 and, but interpreted, bfloat16.

    Triton's interpreter keeps bfloat16 as integers and multiplies those; compiled kernels are not concerned.
    """
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    checked = (torch.float32, torch.float16) if interpreted else (torch.float32, torch.float16, torch.bfloat16)
    return tuple(dtype for dtype in checked if dtype in backends.load(backend).dtypes)
