"""Calls of one signature share what was checked and prepared: what must nevertheless be looked at with every call."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from caches import step_inputs
from host_threads import at_once
from torch.utils._python_dispatch import TorchDispatchMode

from dispatch import attention, attention_with_kvcache

INT32 = torch.int32


def dense(seed=0, **changed):
    shape = {"batch": 2, "seqlen": 12, "heads": 2, "head_dim": 16, **changed}
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape.values(), generator=make) for _ in range(3)]


@pytest.mark.parametrize(
    ("accepted", "refused", "error", "names"),
    [
        ({"causal": True}, {"causal": 1}, TypeError, "causal"),
        ({"causal": False}, {"causal": 0.0}, TypeError, "causal"),
        ({"causal": True}, {"causal": np.True_}, TypeError, "causal"),
        ({"softmax_scale": 1.0}, {"softmax_scale": True}, TypeError, "softmax_scale"),
        ({"softmax_scale": 1}, {"softmax_scale": True}, TypeError, "softmax_scale"),
        ({"softmax_scale": 0.5}, {"softmax_scale": float("nan")}, ValueError, "softmax_scale"),
        ({"softcap": 0.0}, {"softcap": False}, TypeError, "softcap"),
        ({"rescale_threshold": 1.0}, {"rescale_threshold": True}, TypeError, "rescale_threshold"),
        ({"window": (1, 0)}, {"window": (True, 0)}, TypeError, "window: left"),
        ({"window": (1, 0)}, {"window": (1, 0.0)}, TypeError, "window: right"),
        ({"window": (1, None)}, {"window": ([], None)}, TypeError, "window: left is a list"),
        ({"window": (1, None)}, {"window": {1, None}}, ValueError, "window"),
        ({"deterministic": False}, {"deterministic": 0}, TypeError, "deterministic"),
        ({"causal": True}, {"causal": [True]}, TypeError, "causal: got list"),
        ({"causal": True}, {"causal": torch.tensor(True)}, TypeError, "causal: got Tensor"),
        ({"backend": "auto"}, {"backend": {}}, TypeError, "backend: got dict"),
    ],
)
def test_what_equals_an_accepted_option_is_refused_all_the_same(accepted, refused, error, names):
    """1 == True == 1.0, and they have one hash: a memory of options that goes by equality alone takes all for one."""
    attention(*dense(), **accepted)
    for _ in range(2):
        with pytest.raises(error, match=names):
            attention(*dense(), **refused)
    q, k_cache, v_cache, _, seqlens, _ = step_inputs("cpu", dtype=torch.float32)
    if not refused.keys() & {"rescale_threshold", "deterministic"}:
        attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **accepted)
        with pytest.raises(error, match=names):
            attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **refused)


@pytest.mark.parametrize(("accepted", "refused"), [({"num_splits": 1}, True), ({"rotary_interleaved": True}, 1)])
def test_the_same_holds_for_the_options_of_a_cache(accepted, refused):
    q, k_cache, v_cache, _, seqlens, _ = step_inputs("cpu", dtype=torch.float32)
    (name,) = accepted
    attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **accepted)
    with pytest.raises(TypeError, match=name):
        attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **{name: refused})


def test_contents_are_read_with_every_call():
    q, k, v = (t[0] for t in dense())
    cu, used = torch.tensor([0, 5, 12], dtype=INT32), torch.tensor([5, 7], dtype=INT32)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "seqused_k": used}
    attention(q, k, v, **options)
    used[1] = 8
    with pytest.raises(ValueError, match="seqused_k: entry 1"):
        attention(q, k, v, **options)
    used[1], cu[1] = 0, 13
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        attention(q, k, v, **options)


def test_lengths_of_a_cache_are_read_with_every_call():
    q, k_cache, v_cache, _, seqlens, _ = step_inputs("cpu", dtype=torch.float32)
    for length in (seqlens, 3):
        attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=length)
    seqlens[0] = k_cache.shape[1] + 1
    for length in (seqlens, k_cache.shape[1] + 1):
        with pytest.raises(ValueError, match="cache_seqlens"):
            attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=length)


def test_tensors_that_differ_in_their_strides_alone(target):
    """What is prepared holds strides: taken for another call's, they would read other elements."""
    q, k, v = (t.to(target.device, target.widest) for t in dense())
    want, want_lse = target(q, k, v, causal=True, return_lse=True)
    packed = torch.stack((q, k, v), 2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    for other in (heads_first, packed.unbind(2), columns, [q, heads_first[1], v], [columns[0], k, v], [q, k, v]):
        out, lse = target(*other, causal=True, return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        assert out._is_view() == want._is_view()  # of a padded one


@pytest.mark.serves("kv_cache")
def test_steps_that_differ_in_their_strides_alone(target):
    q, k_cache, v_cache, new, seqlens, _ = step_inputs(target.device, dtype=target.widest)

    def step(q, new, seqlens, out=None):
        caches = k_cache.clone(), v_cache.clone()
        got = attention_with_kvcache(q, *caches, new, new, cache_seqlens=seqlens, out=out, backend=target.backend)
        return got, *caches

    want = step(q, new, seqlens)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, new)]
    spread = torch.stack((seqlens, seqlens), 1)[:, 0]
    roomy = torch.empty(*q.shape[:3], q.shape[3] + 8, dtype=q.dtype, device=q.device)[..., : q.shape[3]]
    for other in (turned, [q, turned[1]], [turned[0], new]):
        if target.backend == "cute" and other[0] is not q:
            with pytest.raises(NotImplementedError, match="strides"):
                step(*other, seqlens)
            continue
        assert all(map(torch.equal, step(*other, seqlens), want))
    assert all(map(torch.equal, step(q, new, spread), want))
    assert all(map(torch.equal, step(q, new, seqlens, roomy), want))
    assert all(map(torch.equal, step(q, new, seqlens), want))


def test_calls_that_take_turns_with_others():
    """What the last call has prepared is at hand; taken for a call unlike it, it would give another mask or shape."""
    short, long = dense(), dense(seqlen=13)
    calls = [(short, {}), (short, {"causal": True}), (long, {"causal": True}), (long, {"window": (2, 0)})]
    want = [attention(*tensors, **options) for tensors, options in calls]
    for first, second in itertools.permutations(range(len(calls)), 2):
        for i in (first, second, second, first):
            tensors, options = calls[i]
            assert torch.equal(attention(*tensors, **options), want[i])


def test_threads_whose_calls_differ():
    calls = [(dense(seqlen=n), {"causal": causal}) for n in (3, 12) for causal in (False, True)]
    want = [attention(*tensors, **options) for tensors, options in calls]

    def repeated(i):
        tensors, options = calls[i]
        return lambda: all(torch.equal(attention(*tensors, **options), want[i]) for _ in range(200))

    assert all(at_once([repeated(i) for i in range(len(calls))]))


def test_no_tensor_is_kept():
    tensors = dense(seqlen=13)
    q, k_cache, v_cache, new, seqlens, _ = step_inputs("cpu", dtype=torch.float32)
    attention(*tensors, causal=True)
    attention(*[t.requires_grad_() for t in tensors], causal=True).sum().backward()
    attention_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens)
    kept = [weakref.ref(t) for t in (*tensors, q, k_cache, v_cache, new, seqlens)]
    del tensors, q, k_cache, v_cache, new, seqlens
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_takes_part_in_a_call_gets_it_after_a_plain_one_too():
    """Modes, transforms, autocast and subclasses change nothing in the signature of the tensors."""
    q, k, v = dense()
    want = attention(q, k, v)
    with Seen() as seen:
        assert torch.equal(attention(q, k, v), want)
    assert "fa4.attention.default" in seen.names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16

    class Named(torch.Tensor):
        pass

    assert type(attention(q.as_subclass(Named), k, v)) is Named
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    assert attention(*leaves).requires_grad
    with torch.no_grad():
        assert not attention(*leaves).requires_grad
    with torch.inference_mode():
        assert attention(q, k, v).is_inference()
    assert attention(q.to("meta"), k.to("meta"), v.to("meta")).device.type == "meta"
    assert torch.equal(attention(torch.nn.Parameter(q, requires_grad=False), k, v), want)
