"""Records what a GPU computes, as files that a machine without one compares with the emulator.

`python -m tests.emulator.record_hardware FOLDER` runs the project's Triton kernels on this machine's GPU; with a
second word, a name of `PUBLISHED`, it runs flash-attn-4's SM90 forward. Of each Triton launch it keeps everything (the
PTX that ran, parameters, memory before) and the memory after; of the CuTe kernel, which `upstream.py` compiles again,
its results. The files go to records/, where test_hardware_records.py finds them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from . import launcher
from .launcher import Recording, launch_triton
from .tensor_map import TensorMap

CASES = {
    "causal-gqa-bf16": ({"dtype": torch.bfloat16, "head_dim": 64, "heads": (2, 1), "lengths": (80, 80)},
                        {"causal": True}),
    "window-softcap-sink-fp16": ({"dtype": torch.float16, "head_dim": 128, "heads": (1, 1), "lengths": (40, 70)},
                                 {"window": (40, 10), "softcap": 5.0, "sink": torch.tensor([0.5])}),
    "tma-bf16": ({"dtype": torch.bfloat16, "head_dim": 64, "heads": (1, 1), "lengths": (72, 136)}, {}),
}  # fmt: skip
"""Shapes and options of the recorded calls. "tma": tensor descriptors, which small problems would not use."""

PUBLISHED = {"sm90-d128": {"head_dim": 128}, "sm90-d64-causal": {"head_dim": 64, "causal": True, "tile_m": 192}}
"""Options of `upstream.forward_sm90`; the problem is `published_problem`."""


class _Packed(Exception):
    """Ends a launch when its parameters are packed and its memory is known."""


def save(path: Path, recording: Recording, expected: dict[int, tuple[torch.Tensor, str]], about: dict) -> None:
    """Writes a launch and the tensors after it, by address, as one compressed archive of plain arrays."""
    arrays = {"text": np.frombuffer(recording.text.encode(), np.uint8),
              "params": np.frombuffer(recording.params, np.uint8)}  # fmt: skip
    memory = []
    for n, (address, size, name, content) in enumerate(recording.memory):
        arrays[f"before{n}"] = np.frombuffer(content, np.uint8)
        after = expected.get(address)
        if after is not None and after[0].view(torch.uint8).numpy().tobytes() != content:
            arrays[f"after{n}"] = after[0].view(torch.uint8).numpy()
        memory.append([address, size, after[1] if after else name, str(after[0].dtype) if after else ""])
    maps = {index: vars(tensor_map) for index, tensor_map in recording.tensor_maps.items()}
    facts = {"kernel": recording.kernel, "grid": recording.grid, "block": recording.block, "memory": memory,
             "maps": maps, "options": recording.options, **about}  # fmt: skip
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> tuple[Recording, dict[str, tuple[int, torch.Tensor]], dict]:
    """Reads what `save` wrote: the launch, (address, content after it) of what it wrote by name, and facts about it."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(arrays["facts"].tobytes())
    memory, after = [], {}
    for n, (address, size, name, dtype) in enumerate(facts["memory"]):
        memory.append((address, size, name, arrays[f"before{n}"].tobytes()))
        if f"after{n}" in arrays:
            raw = torch.from_numpy(arrays[f"after{n}"].copy())
            after[name] = (address, raw.view(getattr(torch, dtype.removeprefix("torch."))))
    maps = {int(index): TensorMap(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
            for index, fields in facts["maps"].items()}  # fmt: skip
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["options"].items()}
    recording = Recording(facts["kernel"], arrays["params"].tobytes(), memory, maps, tuple(facts["grid"]),
                          tuple(facts["block"]), 0, options, arrays["text"].tobytes().decode())  # fmt: skip
    return recording, after, facts


def _map_tensors(value, function):
    """`value` with every tensor in its (named) tuples and tensor descriptors replaced by `function(tensor)`."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(x, function) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if hasattr(value, "base") and hasattr(value, "block_shape"):
        return type(value)(function(value.base), value.shape, value.strides, value.block_shape)
    return value


def _named_tensors(value, name: str, found: dict) -> None:
    if isinstance(value, torch.Tensor):
        found.setdefault(id(value), (value, name))
    elif hasattr(value, "base") and hasattr(value, "block_shape"):
        found.setdefault(id(value.base), (value.base, name))
    elif isinstance(value, tuple):
        for field, x in zip(getattr(value, "_fields", range(len(value))), value):
            _named_tensors(x, name if field == "tensor" else f"{name}.{field}", found)


def record_triton(folder: Path, device: str = "cuda", names: tuple[str, ...] = tuple(CASES)) -> None:
    """Every launch of the project's forward and backward over the named `CASES`. On "cpu", within `emulated_triton`,
    it tests itself."""
    import triton

    import dispatch
    from fa4_triton import launch as host

    original, small = host._launch, host.MIN_TMA_FLOPS
    name = torch.cuda.get_device_name() if device == "cuda" else device
    about = {"device": name, "triton": triton.__version__}
    current = [""]

    def launch(kernel, plan, where, grid, arguments, layout) -> None:
        named: dict = {}
        args = arguments(False)
        for name, value in zip(kernel.arg_names, args):
            _named_tensors(value, name, named)
        copies = {key: tensor.detach().to("cpu", copy=True) for key, (tensor, _) in named.items()}
        original(kernel, plan, where, grid, arguments, layout)
        packed: list[Recording] = []

        def stop(recording: Recording) -> None:
            packed.append(recording)
            raise _Packed

        launcher.on_launch = stop
        try:
            host_args = [_map_tensors(value, lambda t: copies[id(t)]) for value in args]
            launch_triton(plan.compiled[layout], (grid,), dict(zip(kernel.arg_names, host_args)))
        except _Packed:
            pass
        finally:
            launcher.on_launch = None
        after = {copies[key].data_ptr(): (tensor.detach().cpu().reshape(-1), name)
                 for key, (tensor, name) in named.items()}  # fmt: skip
        save(folder / f"{current[0]}-{kernel.__name__}.npz", packed[0], after, about)

    host._launch = launch
    try:
        for name in names:
            shape, options = CASES[name]
            current[0] = name
            host.MIN_TMA_FLOPS = 0 if name.startswith("tma") else small
            random = torch.Generator().manual_seed(0)
            (heads, kv_heads), (seqlen_q, seqlen_k) = shape["heads"], shape["lengths"]
            q, k, v, dout = (
                torch.randn(1, rows, n, shape["head_dim"], generator=random).to(device, shape["dtype"])
                for rows, n in ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads), (seqlen_q, heads))
            )
            on_device = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
            inputs = [t.requires_grad_() for t in (q, k, v)]
            out = dispatch.attention(*inputs, backend="triton", **on_device)
            torch.autograd.grad(out, inputs, dout)
    finally:
        host._launch, host.MIN_TMA_FLOPS = original, small


def published_problem(options: dict):
    from .published import Problem

    return Problem(3, options["head_dim"], 150, 200, causal=options.get("causal", False))


def record_published(folder: Path, name: str) -> None:
    """flash-attn-4's SM90 forward with `PUBLISHED[name]`: results, and the digest of the PTX that ran. One a process:
    the DSL reads where to keep its PTX when it loads."""
    from .upstream import main

    options = PUBLISHED[name]
    dump = folder / f"dump-{name}"
    compiled = main(dump, "forward_sm90", {**options, "callable": True})
    problem = published_problem(options)
    q, k, v = (t.cuda() for t in (problem.q, problem.k, problem.v))
    out, lse = torch.full_like(q, float("nan")), torch.full((1, 1, problem.seqlen_q), float("nan"), device="cuda")
    compiled(q, k, v, out, lse, problem.softmax_scale)
    torch.cuda.synchronize()
    digest = hashlib.sha256(next(dump.glob("*.ptx")).read_bytes()).hexdigest()
    facts = {"device": torch.cuda.get_device_name(), "ptx": digest, "options": options}
    raw = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    results = {"out": out.cpu().view(torch.int16).numpy(), "lse": lse.cpu().numpy()}
    np.savez_compressed(folder / f"published-{name}.npz", **results, facts=raw)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 2:
        record_published(target, sys.argv[2])
    else:
        record_triton(target)
    print("\n".join(f"{path.name} {path.stat().st_size}" for path in sorted(target.glob("*.npz"))))
