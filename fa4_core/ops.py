"""The torch operators `fa4::attention` and `fa4::attention_backward`: fake kernels, autograd, the backend's call.

The operator takes raw arguments; the problem is built and checked inside it, at run time, so that traced code holds one
opaque call and no guards on lengths or values. The floating-point values travel as one CPU tensor: `torch.compile`
keeps the elements of a tensor dynamic, where it would specialise on a Python float handed to an operator. A CUDA graph,
though, keeps that tensor's numbers: a call that has one goes through the overload `scored`, which the graphs that
`torch.compile` makes leave out. Integers need none: it captures anew for each.
Source for the registration: the PyTorch documentation, "torch.library" (Library.define, Library.impl, register_fake).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fa4_core.backends import Backend, Gradients
from fa4_core.problem import DEFAULT_RESCALE_THRESHOLD, Inputs, Kinds, Problem, make_problem

_LIBRARY = torch.library.Library("fa4", "DEF")
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, Tensor? page_table"
)
_NUMBERS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? values, SymInt window_left, SymInt window_right, "
    "bool deterministic, str backend"
)
for _overload, _tags in (("", ()), (".scored", (torch.Tag.cudagraph_unsafe,))):
    _LIBRARY.define(f"attention{_overload}({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)", tags=_tags)
    _LIBRARY.define(
        f"attention_backward{_overload}(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_TENSORS}, {_NUMBERS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        tags=_tags,
    )
_N_TENSORS = len(Inputs._fields)
_VALUES_AT = _N_TENSORS + 2

_NO_OTHERS = [None] * (_N_TENSORS - 3)

Chooser = Callable[[Kinds, torch.device, str], Backend]


def _no_chooser(kinds: Kinds, device: torch.device, name: str) -> Backend:
    raise RuntimeError("no chooser is set: import dispatch, which sets it")


_choose: Chooser = _no_chooser


def set_chooser(choose: Chooser) -> None:
    """Sets the function that turns (kinds, device, requested name) into the backend that runs; `dispatch` owns it."""
    global _choose
    _choose = choose
    backend_of.cache_clear()


def pack_values(softmax_scale: float | None, softcap: float, rescale_threshold: float) -> Tensor | None:
    """The operator's `values`: None for all defaults, else a CPU float64 tensor (softmax_scale, softcap, threshold).

    A softmax_scale of None is packed as NaN, so an explicit NaN must be refused before.
    """
    if softmax_scale is None and softcap == 0.0 and rescale_threshold == DEFAULT_RESCALE_THRESHOLD:
        return None
    if not torch.compiler.is_compiling():
        # Made anew for each call: one kept from inference mode or from a fake mode would break the calls after it.
        scale = float("nan") if softmax_scale is None else softmax_scale
        return torch.tensor((scale, softcap, rescale_threshold), dtype=torch.float64, device="cpu")
    # A product with a tensor is what the tracer can keep dynamic in the number; a constructor call is not.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    scale = one * float("nan") if softmax_scale is None else one * softmax_scale
    return torch.stack((scale, one * softcap, one * rescale_threshold))


def overload_for(operator: torch._ops.OpOverloadPacket, values: Tensor | None) -> torch._ops.OpOverload:
    """The overload of an operator of the library `fa4` for a call with these `values`."""
    return operator.default if values is None else operator.scored


def problem_of(
    inputs: Inputs,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    values: Tensor | None,
    window_left: int,
    window_right: int,
    deterministic: bool,
) -> Problem:
    """Builds and checks the problem from the operator's arguments (errors as in `make_problem`)."""
    scale, softcap, threshold = None, 0.0, DEFAULT_RESCALE_THRESHOLD
    if values is not None:
        scale, softcap, threshold = values.tolist()
        scale = None if scale != scale else scale
    return make_problem(
        inputs,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        softcap=softcap,
        window_left=window_left,
        window_right=window_right,
        rescale_threshold=threshold,
        deterministic=deterministic,
    )


def _pad_head_dim(tensor: Tensor, multiple: int) -> Tensor:
    """Zero columns up to the multiple, and a contiguous last dimension."""
    short = -tensor.shape[-1] % multiple
    if short:
        return torch.nn.functional.pad(tensor, (0, short))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=1024)
def _with_head_dims(problem: Problem, head_dim: int, head_dim_v: int) -> Problem:
    return replace(problem, kinds=replace(problem.kinds, head_dim=head_dim, head_dim_v=head_dim_v))


def _fitted(problem: Problem, inputs: Inputs, multiple: int) -> tuple[Problem, Inputs]:
    """The problem as the backend's kernels take it (see `Backend`): head dims padded to `multiple`, vectors packed."""
    kinds, (q, k, v, *others) = problem.kinds, inputs
    fits = kinds.head_dim % multiple == kinds.head_dim_v % multiple == 0
    if fits and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and others == _NO_OTHERS:
        return problem, inputs
    q, k, v = (_pad_head_dim(t, multiple) for t in (q, k, v))
    inputs = Inputs(q, k, v, *[t if t is None else t.contiguous() for t in others])
    if not fits:
        problem = _with_head_dims(problem, q.shape[-1], v.shape[-1])
    return problem, inputs


@functools.lru_cache(maxsize=1024)
def backend_of(problem: Problem, name: str) -> Backend:
    """The backend that runs a problem where `name` was asked for; remembered. Raises as the chooser does."""
    return _choose(problem.kinds, problem.device, name)


def _forward(*args):
    inputs = Inputs(*args[:_N_TENSORS])
    *numbers, name = args[_N_TENSORS:]
    problem = problem_of(inputs, *numbers)
    backend = backend_of(problem, name)
    fitted, padded = _fitted(problem, inputs, backend.head_dim_multiple)
    out, lse = backend.forward(fitted, padded)
    if fitted is not problem:
        out = out[..., : problem.kinds.head_dim_v].contiguous()
    return out, lse


def _backward(dout, dlse, out, lse, *args):
    inputs = Inputs(*args[:_N_TENSORS])
    *numbers, name = args[_N_TENSORS:]
    problem = problem_of(inputs, *numbers)
    backend = backend_of(problem, name)
    fitted, padded = _fitted(problem, inputs, backend.head_dim_multiple)
    dout = torch.zeros_like(out) if dout is None else dout
    dout, out = (_pad_head_dim(t, backend.head_dim_multiple) for t in (dout, out))
    grads = backend.backward(fitted, padded, out, lse, dout, dlse)
    if fitted is not problem:
        head_dim, head_dim_v = problem.kinds.head_dim, problem.kinds.head_dim_v
        grads = Gradients(
            grads.q[..., :head_dim].contiguous(),
            grads.k[..., :head_dim].contiguous(),
            grads.v[..., :head_dim_v].contiguous(),
            grads.sink,
        )
    # A schema has no optional results: an empty tensor stands for "no sink".
    return grads.q, grads.k, grads.v, lse.new_empty(0) if grads.sink is None else grads.sink


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64 inputs, whose backward would otherwise lose their precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_fake(q, k, v, *args):
    # One tensor on the meta device brings the whole call here, past the checks that stand before a launch.
    for name, tensor in zip(Inputs._fields, (q, k, v, *args)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}")
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse_shape = (q.shape[-2], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[-2], q.shape[1])
    return out, q.new_empty(lse_shape, dtype=lse_dtype(q.dtype))


def _backward_fake(dout, dlse, out, lse, q, k, v, sink, *args):
    dsink = lse.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


class _Attention(torch.autograd.Function):
    """Saves the inputs, O and LSE; the backward recomputes P from the LSE. Differentiating it again raises."""

    @staticmethod
    def forward(ctx, *args):
        return _Attention.saved(ctx, args, *_below_autograd(*args))

    @staticmethod
    def saved(ctx, args, out, lse):
        """Keeps what the backward needs, and passes the results on."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:_N_TENSORS], args[_VALUES_AT])
        ctx.numbers = (*args[_N_TENSORS:_VALUES_AT], *args[_VALUES_AT + 1 :])
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        out, lse, *tensors, values = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, *rest = ctx.numbers
        nothing = (None,) * (len(tensors) - 4 + len(rest) + 3)
        if dout is None and dlse is None:
            return (None,) * 4 + nothing
        with torch.no_grad():
            plain = is_plain(dout, dlse, *tensors)
            run = _backward if plain else overload_for(torch.ops.fa4.attention_backward, values)
            grads = run(dout, dlse, out, lse, *tensors, max_seqlen_q, max_seqlen_k, values, *rest)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _Once.apply(len(grads), *grads, dout, dlse, *tensors[:4])
        dq, dk, dv, dsink = grads
        return dq, dk, dv, dsink if tensors[3] is not None else None, *nothing


class _PlainAttention(_Attention):
    """`_Attention` for a call that is known to be plain."""

    @staticmethod
    def forward(ctx, *args):
        return _Attention.saved(ctx, args, *_forward(*args))


class _Once(torch.autograd.Function):
    """Passes gradients through and raises when they are differentiated.

    PyTorch's `once_differentiable` does so only where the arriving gradient requires one: after loss.sum(), a gradient
    penalty would silently lose its second-order part.
    """

    @staticmethod
    def forward(ctx, n, *args):
        return tuple(t.view_as(t) for t in args[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("attention: its gradients cannot be differentiated again")


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *_) -> bool:
    if not torch.is_grad_enabled():
        return False
    return q.requires_grad or k.requires_grad or v.requires_grad or (sink is not None and sink.requires_grad)


def _differentiable(*args):
    return _Attention.apply(*args) if _needs_grad(*args) else _below_autograd(*args)


def _below_autograd(*args):
    if is_plain(*args[:_N_TENSORS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload_for(torch.ops.fa4.attention, args[_VALUES_AT])(*args)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd takes part in the call: no tracing, mode, transform, autocast or tensor subclass.

    The dispatcher would then only come back here, at some 10 microseconds a visit.
    """
    for t in tensors:
        if t is not None and not (type(t) in _PLAIN and (t.is_cuda or t.is_cpu)):
            return False
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and not torch._C._is_any_autocast_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def attention(*args):
    """`torch.ops.fa4.attention`, called without the dispatcher where only autograd would take part."""
    if not is_plain(*args[:_N_TENSORS]):
        return overload_for(torch.ops.fa4.attention, args[_VALUES_AT])(*args)
    return _PlainAttention.apply(*args) if _needs_grad(*args) else _forward(*args)


def autocast(inputs: Inputs) -> Inputs:
    """q, k and v as autocast wants them where it is on: floating point but float64 in its dtype, as PyTorch's own."""
    device = inputs.q.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def _outside_autocast(op: Callable, key: str, *args):
    """Runs the operator with autocast off: a backend's own products must not be cast again."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
        return op(*args)


def _autocast_forward(op: Callable, key: str, *args):
    return _outside_autocast(op, key, *autocast(Inputs(*args[:_N_TENSORS])), *args[_N_TENSORS:])


for _name in ("default", "scored"):
    _op, _backward_op = (getattr(o, _name) for o in (torch.ops.fa4.attention, torch.ops.fa4.attention_backward))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_op, _forward, _key)
        _LIBRARY.impl(_backward_op, _backward, _key)
        _autocast = f"Autocast{_key}"
        _LIBRARY.impl(_op, functools.partial(_autocast_forward, _op, _autocast), _autocast)
        _LIBRARY.impl(_backward_op, functools.partial(_outside_autocast, _backward_op, _autocast), _autocast)
    _LIBRARY.impl(_op, _differentiable, "Autograd")
    torch.library.register_fake(_op, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(_backward_op, _backward_fake, lib=_LIBRARY)
