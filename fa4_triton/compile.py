"""Compiling a kernel for a target and launching it, without the run-time specialisation of `triton.jit`.

Triton's own launcher looks at every integer (is it 1, is it a multiple of 16) and may compile again when a length
changes. Here the types and alignments that a kernel is compiled for follow from the problem's kinds alone, so one
compiled kernel serves every length, batch and value, and a repeated launch is a look-up and a call of its handle.
The same path compiles for GPUs that are not there, which the tests use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fa4_triton.steps import Strided

POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8
"""Bytes and elements that an "aligned" kernel may assume; 8 elements are 16 bytes or more in every dtype."""

_compiling = threading.Lock()

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


Arguments = Callable[[bool], tuple]
"""Makes a kernel's arguments, in plain tuples: with addresses in place of tensors, or (False) with the tensors.

Of a tensor, Triton's launcher asks the driver whether a GPU can reach it: microseconds with every launch."""


def addresses(tensors: Iterable[torch.Tensor | None]) -> list[int | None]:
    """Where the tensors lie; None for None."""
    return [None if t is None else t.data_ptr() for t in tensors]


def pointers_are_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every tensor's first element lies where 16 bytes can be moved at once."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % POINTER_ALIGNMENT == 0


def named(kernel: Any, args: tuple) -> tuple:
    """The arguments with each plain tuple made the named one that annotates its parameter."""
    types = kernel.fn.__annotations__
    return tuple([
        types[name](*arg) if type(arg) is tuple and name in types else arg for name, arg in zip(kernel.arg_names, args)
    ])  # fmt: skip


class _Signature:
    """Collects what the compiler wants to know of the arguments: types, constants by path, alignments by path."""

    def __init__(self, aligned: bool):
        self.aligned = aligned
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], list] = {}

    def type_of(self, path: tuple[int, ...], name: str, value: Any, aligned: bool = False) -> Any:
        if isinstance(value, tuple):
            names = getattr(value, "_fields", [""] * len(value))
            # Callers look at tensors with a head_dim alone: an LSE's strides, an index's pointer are anything.
            aligned = self.aligned and isinstance(value, Strided)
            types = [self.type_of((*path, i), n, item, aligned) for i, (n, item) in enumerate(zip(names, value))]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if value is None or isinstance(value, str):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            if aligned:
                self.attributes[path] = [["tt.divisibility", POINTER_ALIGNMENT]]
            return _POINTERS[value.dtype]
        if isinstance(value, TensorDescriptor):
            element = _POINTERS[value.base.dtype][1:]
            return f"tensordesc<{element}{list(value.block_shape)}>"
        if isinstance(value, float):
            return "fp32"
        if name.startswith("stride"):
            if aligned:
                self.attributes[path] = [["tt.divisibility", STRIDE_ALIGNMENT]]
            return "i64"
        return "i32"


def compile_kernel(
    kernel: Any,
    args: tuple,
    constants: dict[str, Any],
    options: dict[str, int],
    target: GPUTarget,
    aligned: bool = True,
) -> CompiledKernel:
    """Compiles `kernel` for `target`; no GPU needs to be there.

    Args:
        kernel: a `triton.jit` function.
        args: run-time arguments; only their kinds count: tensors (meta tensors do), ints (strides by their field's
            name), floats, strings and None (which are constants), and tuples of these, which take the names of their
            parameter's annotation.
        constants: the kernel's constexpr parameters.
        options: num_warps, num_stages.
        aligned: whether pointers and strides are aligned (those of tensors with a head_dim).
    """
    signature = _Signature(aligned)
    names = kernel.arg_names
    types = {n: signature.type_of((i,), n, arg) for i, (n, arg) in enumerate(zip(names, named(kernel, args)))}
    for name, value in constants.items():
        types[name] = "constexpr"
        signature.constants[(names.index(name),)] = value
    source = ASTSource(kernel, types, signature.constants, signature.attributes)
    # Multiplications and additions are fused under every version: from 3.10 on Triton does not unless asked to.
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def loaded_once(
    kept: dict[tuple, CompiledKernel],
    layout: tuple,
    device: torch.device,
    make: Callable[..., CompiledKernel],
    *args: Any,
) -> CompiledKernel:
    """kept[layout]; the first host thread that asks for it compiles it by make(*args) and loads it on `device`."""
    with _compiling, torch.cuda.device(device):
        compiled = kept.get(layout)
        if compiled is None:
            compiled = make(*args)
            # Triton loads at first use, one attribute after the other: another thread could find it half done.
            _ = compiled.run
            kept[layout] = compiled
        return compiled


def run_compiled(compiled: CompiledKernel, grid: int, index: int, args: tuple) -> None:
    """Launches `grid` programs of a compiled kernel on the current stream of CUDA device `index`, the current one.

    args: all of the kernel's arguments in order. Does what `compiled[(grid, 1, 1)](*args)` does, but prepares nothing
    for profilers' hooks that nobody set.
    """
    stream = torch._C._cuda_getCurrentRawStream(index)
    hooks = triton.knobs.runtime  # pyright: ignore[reportAttributeAccessIssue]
    if _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook):
        compiled[(grid, 1, 1)](*args, stream=stream)  # pyright: ignore[reportOptionalCall]
    else:
        # `run` loads the kernel on its first use, so it is asked for before the function.
        run: Any = compiled.run
        run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def _is_set(hook: Any) -> bool:
    """Whether a hook of Triton's runtime does anything: it is a chain, a function, or None."""
    return bool(getattr(hook, "calls", hook is not None))
