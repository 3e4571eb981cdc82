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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fa4_core.backends import Backend, Gradients
from fa4_core.problem import (
    DEFAULT_RESCALE_THRESHOLD,
    Inputs,
    Kinds,
    Options,
    Problem,
    Signature,
    Stride,
    check_contents,
    check_signature,
    check_types,
    is_contiguous,
    signature_of,
)

if TYPE_CHECKING:
    from fa4_core.kvcache import CacheProblem

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

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
"""Where operators have kernels: everything runs on `reference`. For calls on others, above all `meta`, the dispatcher
finds who answers."""

Chooser = Callable[[Kinds, torch.device, str, "CacheProblem | None"], Backend]


def _no_chooser(kinds: Kinds, device: torch.device, name: str, cache: CacheProblem | None = None) -> Backend:
    raise RuntimeError("no chooser is set: import dispatch, which sets it")


_choose: Chooser = _no_chooser
on_new_chooser: list[Callable[[], None]] = []
"""Called when the chooser changes: they forget what the last one chose."""


def set_chooser(choose: Chooser) -> None:
    """Sets the function that turns (kinds, device, requested name, KV-cache call or None) into the backend that runs;
    `dispatch` owns it."""
    global _choose, _last
    _choose, _last = choose, _NO_CALL
    for forget in on_new_chooser:
        forget()


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


def _operator_arguments(inputs: tuple, options: Options) -> tuple[Any, ...]:
    """What the operator takes for a call."""
    max_seqlen_q, max_seqlen_k, scale, softcap, left, right, threshold, deterministic, backend = options
    values = pack_values(scale, softcap, threshold)
    return (*inputs, max_seqlen_q, max_seqlen_k, values, left, right, deterministic, backend)


def _call_arguments(args: tuple[Any, ...]) -> tuple[Inputs, Options]:
    """`_operator_arguments` undone."""
    max_seqlen_q, max_seqlen_k, values, left, right, deterministic, backend = args[_N_TENSORS:]
    scale, softcap, threshold = None, 0.0, DEFAULT_RESCALE_THRESHOLD
    if values is not None:
        scale, softcap, threshold = values.tolist()
        scale = None if scale != scale else scale
    options = Options(max_seqlen_q, max_seqlen_k, scale, softcap, left, right, threshold, deterministic, backend)
    return Inputs(*args[:_N_TENSORS]), options


def _pad_head_dim(tensor: Tensor, multiple: int) -> Tensor:
    """Zero columns up to the multiple, and a contiguous last dimension."""
    short = -tensor.shape[-1] % multiple
    if short:
        return torch.nn.functional.pad(tensor, (0, short))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(slots=True, eq=False)
class _Call:
    """What calls of equal signatures and options share.

    cuda_index: of the device, None elsewhere. indexed: as `Kinds.indexed`. as_is: whether the backend takes the tensors
    as they lie; then the first call leaves in `run` what the backend has prepared for the others, or in `run_unread`
    where nobody reads the LSE.
    """

    problem: Problem
    backend: Backend
    options: Options
    cuda_index: int | None
    indexed: bool
    as_is: bool
    run: Callable[[tuple], tuple[Tensor, Tensor]] | None = None
    run_unread: Callable[[tuple], tuple[Tensor, Tensor]] | None = None


_NO_CALL = (None, None, None)
_last: tuple[Signature | None, Options | None, _Call | None] = _NO_CALL
"""What the last plain call had, and got from `_call_of`: most calls are like the one before them, and to compare them
takes half the time of a look-up. Always replaced as a whole, since threads share it."""


def backend_of(problem: Problem, name: str, cache: CacheProblem | None = None) -> Backend:
    """The backend that runs a problem, or a KV-cache call, where `name` was asked for. Raises as the chooser does."""
    return _choose(problem.kinds, problem.device, name, cache)


@functools.lru_cache(maxsize=4096)
def _call_of(signature: Signature, options: Options) -> _Call | None:
    """Checks what equal signatures share, and chooses the backend; None where no operator is for the device.

    Raises as `check_signature` and the chooser do.
    """
    check_types(Inputs._fields, signature, ("q", "k", "v"), tuple)
    if any(meta is not None and meta[3].type not in DEVICE_TYPES for meta in signature):
        return None
    problem = check_signature(signature, options)
    kinds, device = problem.kinds, problem.device
    backend = backend_of(problem, options.backend)
    fits = kinds.head_dim % backend.head_dim_multiple == kinds.head_dim_v % backend.head_dim_multiple == 0
    rows_packed = all(stride[-1] == 1 for stride in problem.strides)
    others_packed = all(meta is None or is_contiguous(*meta[:2]) for meta in signature[3:])
    index = device.index if device.type == "cuda" else None
    return _Call(problem, backend, options, index, kinds.indexed, fits and rows_packed and others_packed)


on_new_chooser.append(_call_of.cache_clear)


@functools.lru_cache(maxsize=4096)
def _with_layout(problem: Problem, head_dim: int, head_dim_v: int, strides: tuple[Stride, Stride, Stride]) -> Problem:
    kinds = problem.kinds
    if (head_dim, head_dim_v) != (kinds.head_dim, kinds.head_dim_v):
        kinds = replace(kinds, head_dim=head_dim, head_dim_v=head_dim_v)
    return replace(problem, kinds=kinds, strides=strides)


def _fitted(call: _Call, inputs: Inputs) -> tuple[Problem, Inputs]:
    """The problem as the backend's kernels take it (see `Backend`): head dims padded to a multiple, vectors packed."""
    q, k, v = (_pad_head_dim(t, call.backend.head_dim_multiple) for t in inputs[:3])
    problem = _with_layout(call.problem, q.shape[-1], v.shape[-1], (q.stride(), k.stride(), v.stride()))
    return problem, Inputs(q, k, v, *[t if t is None else t.contiguous() for t in inputs[3:]])


def _forward(call: _Call, tensors: tuple, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Returns out and lse.

    tensors: the fields of `Inputs`; to make one takes time that most calls need not spend. with_lse: whether the lse is
    wanted; else it may be anything.
    """
    index = call.cuda_index
    if index is not None and torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _forward(call, tensors, with_lse)
    if call.indexed:
        check_contents(call.problem, Inputs(*tensors))
    if call.as_is:
        run = call.run if with_lse else call.run_unread
        return run(tensors) if run is not None else _prepare(call, tensors, with_lse)(tensors)
    problem, inputs = _fitted(call, Inputs(*tensors))
    out, lse = call.backend.forward(problem, inputs)
    kinds = call.problem.kinds
    if problem.kinds is not kinds:
        out = out[..., : kinds.head_dim_v].contiguous()
    return out, lse


def _prepare(call: _Call, tensors: tuple, with_lse: bool) -> Callable[[tuple], tuple[Tensor, Tensor]]:
    if with_lse:
        call.run = run = call.backend.prepare(call.problem, Inputs(*tensors))
    else:
        call.run_unread = run = call.backend.prepare(replace(call.problem, with_lse=False), Inputs(*tensors))
    return run


def _backward(
    call: _Call, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
) -> Gradients:
    problem, backend, index = call.problem, call.backend, call.cuda_index
    if index is not None and torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _backward(call, inputs, out, lse, dout, dlse)
    fitted, padded = (problem, inputs) if call.as_is else _fitted(call, inputs)
    dout = torch.zeros_like(out) if dout is None else dout
    dout, out = (_pad_head_dim(t, backend.head_dim_multiple) for t in (dout, out))
    grads = backend.backward(fitted, padded, out, lse, dout, dlse)
    if fitted.kinds is problem.kinds:
        return grads
    head_dim, head_dim_v = problem.kinds.head_dim, problem.kinds.head_dim_v
    return Gradients(
        grads.q[..., :head_dim].contiguous(),
        grads.k[..., :head_dim].contiguous(),
        grads.v[..., :head_dim_v].contiguous(),
        grads.sink,
    )


def _call_below(inputs: Inputs, options: Options) -> _Call:
    """The call where the dispatcher has brought it here, so that its devices are known to be ours."""
    call = _call_of(signature_of(inputs), options)
    assert call is not None
    return call


def _operator(*args):
    inputs, options = _call_arguments(args)
    return _forward(_call_below(inputs, options), inputs)


def _backward_operator(dout, dlse, out, lse, *args):
    inputs, options = _call_arguments(args)
    grads = _backward(_call_below(inputs, options), inputs, out, lse, dout, dlse)
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
        out, lse = _below_autograd(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:_N_TENSORS], args[_VALUES_AT])
        ctx.numbers = (*args[_N_TENSORS:_VALUES_AT], *args[_VALUES_AT + 1 :])
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        out, lse, *tensors, values = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, *rest = ctx.numbers
        args = (*tensors, max_seqlen_q, max_seqlen_k, values, *rest)
        dq, dk, dv, dsink = _gradients(dout, dlse, out, lse, args)
        return dq, dk, dv, dsink, *(None,) * (len(args) - 4)


class _PlainAttention(torch.autograd.Function):
    """`_Attention` for a plain call, without the operator's arguments; the lse is a result only where it is wanted."""

    @staticmethod
    def forward(ctx, call, tensors, with_lse, *differentiable):
        out, lse = _forward(call, tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.options = call.options
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):  # type: ignore[override]
        out, lse, *tensors = ctx.saved_tensors
        grads = _gradients(dout, dlse, out, lse, _operator_arguments(Inputs(*tensors), ctx.options))
        return None, None, None, *grads


def _gradients(dout, dlse, out, lse, args):
    """Of q, k, v and sink (None where there is none), from what arrived and the operator's arguments."""
    if dout is None and dlse is None:
        return (None,) * 4
    tensors = args[:_N_TENSORS]
    with torch.no_grad():
        plain = is_plain(dout, dlse, *tensors)
        run = _backward_operator if plain else overload_for(torch.ops.fa4.attention_backward, args[_VALUES_AT])
        grads = run(dout, dlse, out, lse, *args)
    if torch.is_grad_enabled():  # create_graph=True
        grads = _Once.apply(len(grads), *grads, dout, dlse, *tensors[:4])
    dq, dk, dv, dsink = grads
    return dq, dk, dv, None if tensors[3] is None else dsink


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


def _differentiable(*args):
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in args[:4]
    ):
        raise NotImplementedError("attention: forward-mode differentiation is not supported")
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    return _Attention.apply(*args) if recorded else _below_autograd(*args)


def _below_autograd(*args):
    if is_plain(*args[:_N_TENSORS]):
        return _operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload_for(torch.ops.fa4.attention, args[_VALUES_AT])(*args)


_PLAIN = (Tensor, torch.nn.Parameter)
# Bound once: every call asks them.
_is_traced = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_count_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_top_transform = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_has_autocast = torch._C._is_any_autocast_enabled


def plain_signature(tensors: Iterable[Tensor | None]) -> Signature | None:
    """The call's signature, or None where something besides autograd takes part in the call, if only perhaps: tracing,
    a mode, a transform, autocast, a tensor subclass.

    For the rest the dispatcher would only come back here, at some 10 microseconds a visit. Every call comes by here.
    """
    if (
        _is_traced()
        or _count_modes()
        or _has_function_mode()
        or _top_transform() is not None
        or _has_autocast()
        or forward_ad._current_level >= 0
    ):
        return None
    signature = []
    for t in tensors:
        if t is None:
            signature.append(None)
        elif type(t) in _PLAIN:
            signature.append((t.shape, t.stride(), t.dtype, t.device))
        else:
            return None
    return tuple(signature)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd takes part in a call with these tensors, which are on a CPU or a CUDA device."""
    signature = plain_signature(tensors)
    return signature is not None and all(meta is None or meta[3].type in DEVICE_TYPES for meta in signature)


def attention(tensors: tuple, options: Options, with_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.ops.fa4.attention`, called without the dispatcher where only autograd would take part.

    Returns out, or out and lse.

    Args:
        tensors: the fields of `Inputs`, unchecked.
        options: the call's, of checked types.
        with_lse: whether lse is wanted.

    Raises:
        TypeError: one of the inputs is no tensor; for the rest see `dispatch.attention`.
    """
    global _last
    signature, call = plain_signature(tensors), None
    if signature is not None:
        last_signature, last_options, call = _last
        if options is not last_options or signature != last_signature:
            call = _call_of(signature, options)
            _last = signature, options, call
    if call is None:
        check_types(Inputs._fields, tensors, ("q", "k", "v"))
        args = _operator_arguments(tensors, options)
        out, lse = overload_for(torch.ops.fa4.attention, args[_VALUES_AT])(*args)
        return (out, lse) if with_lse else out
    if _is_grad_enabled():
        q, k, v, sink = tensors[:4]
        if q.requires_grad or k.requires_grad or v.requires_grad or (sink is not None and sink.requires_grad):
            return _PlainAttention.apply(call, tensors, with_lse, q, k, v, sink)
    out, lse = _forward(call, tensors, with_lse)
    return (out, lse) if with_lse else out


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
    for _key in map(str.upper, DEVICE_TYPES):
        _LIBRARY.impl(_op, _operator, _key)
        _LIBRARY.impl(_backward_op, _backward_operator, _key)
        _autocast = f"Autocast{_key}"
        _LIBRARY.impl(_op, functools.partial(_autocast_forward, _op, _autocast), _autocast)
        _LIBRARY.impl(_backward_op, functools.partial(_outside_autocast, _backward_op, _autocast), _autocast)
    _LIBRARY.impl(_op, _differentiable, "Autograd")
    torch.library.register_fake(_op, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(_backward_op, _backward_fake, lib=_LIBRARY)
