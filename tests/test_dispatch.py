"""The choice of a backend: what runs, what is said about the others, and what is never done in silence."""

import types

import pytest
import torch

import dispatch
import fa4_triton
from dispatch import attention, explain
from fa4_core import backends
from fa4_core.backends import Backend
from fa4_core.problem import contents_are_checked, make_problem

Q = torch.zeros(1, 4, 2, 16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def kinds_of(**changed):
    from fa4_core.problem import Inputs

    return make_problem(Inputs(Q, Q, Q), **changed).kinds


class Picky(Backend):
    """A backend that serves everything but softcap and sink, and counts its calls."""

    name = "picky"

    def __init__(self, head_dim_multiple=1):
        self.calls, self.head_dim_multiple = [], head_dim_multiple

    def unavailable(self, device):
        return None

    def missing(self, kinds, device):
        return tuple(sorted(kinds.features() & {"softcap", "sink"}))

    def forward(self, problem, inputs):
        self.calls.append((problem, inputs))
        return backends.load("reference").forward(problem, inputs)

    def backward(self, problem, inputs, out, lse, dout, dlse):
        return backends.load("reference").backward(problem, inputs, out, lse, dout, dlse)


@pytest.fixture
def picky(monkeypatch):
    """Registers a Picky backend that `auto` tries first on the CPU."""
    found = Picky()
    monkeypatch.setitem(backends.MODULES, "picky", "picky_backend")
    monkeypatch.setitem(__import__("sys").modules, "picky_backend", types.SimpleNamespace(BACKEND=found))
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("picky", "reference"))
    forget_choices()
    yield found
    forget_choices()


def forget_choices():
    from fa4_core import ops

    backends.load.cache_clear()
    ops.set_chooser(dispatch._choose)


def test_auto_runs_the_reference_on_the_cpu():
    choice = explain(Q, Q, Q)
    assert choice.backend == "reference"
    assert set(choice.reasons) == {"cute", "triton"}
    assert "CUDA" in choice.reasons["triton"]


def test_explain_prints_a_line_for_each_backend():
    text = str(explain(Q, Q, Q, causal=True, return_lse=True))
    assert text.splitlines()[0] == "runs on reference"
    assert text.count("\nnot ") == len(backends.MODULES) - 1


def test_auto_takes_the_first_that_can_serve(picky):
    attention(Q, Q, Q)
    assert len(picky.calls) == 1
    attention(Q, Q, Q, softcap=5.0)
    assert len(picky.calls) == 1


def test_explain_names_what_is_missing(picky):
    assert explain(Q, Q, Q).reasons["reference"] == "could serve, but picky comes first"
    choice = explain(Q, Q, Q, softcap=5.0, sink=torch.zeros(2))
    assert choice.backend == "reference"
    assert choice.reasons["picky"] == "does not support sink, softcap"
    assert explain(Q, Q, Q, backend="picky").reasons["reference"] == "backend='picky' was asked for"


def test_explain_says_whose_the_gradients_are_and_where_there_are_none(picky, monkeypatch):
    picky.backward_backend = "reference"
    assert str(explain(Q, Q, Q)).startswith("runs on picky, its gradients on reference\n")
    monkeypatch.setattr(type(backends.load("reference")), "unavailable", lambda self, device: "is not there")
    choice = explain(Q, Q, Q)
    assert choice.backward is None
    assert str(choice).startswith("runs on picky, without gradients\n")
    assert choice.reasons["reference"] == "is not there"


def test_explain_says_what_runs_only_when_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(type(backends.load("triton")), "unavailable", lambda self, device: None)
    want = "could serve, but on cpu runs only when asked for by name"
    assert explain(Q, Q, Q).reasons["triton"] == want


def test_a_named_backend_that_cannot_serve_raises_and_names_the_feature(picky):
    """Never another backend instead: the caller asked for this one."""
    with pytest.raises(NotImplementedError, match="backend='picky': does not support softcap"):
        attention(Q, Q, Q, softcap=5.0, backend="picky")
    assert not picky.calls


def test_a_named_backend_that_cannot_run_here_raises():
    with pytest.raises(NotImplementedError, match="backend='cute'"):
        attention(Q, Q, Q, backend="cute")


def test_an_error_inside_a_backend_is_not_a_reason_to_try_another(picky, monkeypatch):
    """A kernel that fails to compile under auto raises; falling back would hide it as slowness."""

    def failing(problem, inputs):
        raise RuntimeError("the kernel does not compile")

    monkeypatch.setattr(picky, "forward", failing)
    with pytest.raises(RuntimeError, match="does not compile"):
        attention(Q, Q, Q)


def test_a_backend_prepares_calls_of_one_signature_once(picky, monkeypatch):
    """Then a call goes straight to what was prepared; one of another shape, or with other options, has its own."""
    prepared = []

    def prepare(problem, inputs):
        prepared.append(problem)
        return lambda tensors: (tensors[0] + len(prepared), None)

    monkeypatch.setattr(picky, "prepare", prepare)
    for _ in range(3):
        assert (attention(Q, Q, Q) == 1).all()
        with torch.no_grad():
            assert (attention(Q.clone(), Q, Q) == 1).all()
    attention(Q, Q, Q, causal=True)
    attention(Q[:, :3], Q[:, :3], Q[:, :3])
    assert len(prepared) == 3
    assert not picky.calls


def test_padding_to_a_backends_multiple_changes_no_result(picky):
    """head_dim 13 and head_dim_v 5 become 16 and 8 there; scale, results and gradients are those of 13 and 5."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, dim, generator=random, requires_grad=True) for dim in (13, 13, 5))
    want = attention(q, k, v, backend="reference")
    wanted = torch.autograd.grad(want.square().sum(), (q, k, v))
    picky.head_dim_multiple = 8
    out = attention(q, k, v, backend="picky")
    problem, inputs = picky.calls[-1]
    assert (problem.kinds.head_dim, problem.kinds.head_dim_v) == (16, 8)
    assert [t.shape[-1] for t in inputs[:3]] == [16, 16, 8]
    torch.testing.assert_close(out, want)
    for got, grad in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted):
        assert got.is_contiguous()
        torch.testing.assert_close(got, grad)


def test_a_backend_gets_a_contiguous_last_dimension(picky):
    q = torch.randn(1, 6, 2, 32)[..., ::2]
    torch.testing.assert_close(attention(q, q, q), attention(q, q, q, backend="reference"))
    assert all(t.stride(-1) == 1 for t in picky.calls[0][1][:3])


def test_a_gpu_without_triton_raises_with_the_install_line(monkeypatch):
    """Never the reference on a GPU: it would be a thousand times slower without a word."""
    monkeypatch.setattr(fa4_triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fa4_triton, "interpreted", lambda: False)
    fa4_triton._unavailable.cache_clear()
    try:
        for name in ("auto", "triton"):
            with pytest.raises(NotImplementedError) as caught:
                dispatch._choose(kinds_of(), CUDA, name)
            assert "pip install 'fa4-attention[triton]'" in str(caught.value)
    finally:
        fa4_triton._unavailable.cache_clear()


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_kernels_of_ours_runs_the_reference_where_it_is_named(device):
    """No such device is needed: who is chosen, and that the operators have kernels there."""
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        dispatch._choose(kinds_of(), torch.device(device), "auto")
    assert dispatch._choose(kinds_of(), torch.device(device), "reference").name == "reference"
    for operator in ("attention", "attention_backward", "attention_with_kvcache"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fa4::{operator}", device.upper())


def test_float64_on_a_gpu_raises_and_names_the_dtype(monkeypatch):
    monkeypatch.setattr(type(backends.load("triton")), "unavailable", lambda self, device: None)
    from fa4_core.problem import Inputs

    kinds = make_problem(Inputs(Q.double(), Q.double(), Q.double())).kinds
    with pytest.raises(NotImplementedError, match="float64"):
        dispatch._choose(kinds, CUDA, "auto")


def test_every_feature_has_a_name_that_messages_use():
    assert kinds_of().features() == frozenset()
    assert kinds_of(window_left=3).features() == {"window or causal"}
    assert kinds_of(softcap=1.0).features() == {"softcap"}


def test_kinds_do_not_depend_on_values_or_lengths():
    """The compile key: one kernel for all windows, caps, scales, thresholds, lengths and batches."""
    from fa4_core.problem import Inputs

    long = torch.zeros(3, 90, 2, 16)
    one = make_problem(Inputs(Q, Q, Q), window_left=3, softcap=1.0)
    two = make_problem(Inputs(long, long, long), window_left=7, softcap=2.0, softmax_scale=0.3, rescale_threshold=0.0)
    assert one.kinds == two.kinds


def test_a_window_wider_than_the_sequences_is_cut_to_them():
    """Seen: positions plus a window near 2^31 overflowed a kernel's int32 and read out of bounds."""
    from fa4_core.problem import Inputs

    problem = make_problem(Inputs(Q, Q, Q), window_left=2**31 - 1, window_right=2**62)
    assert (problem.window_left, problem.window_right) == (8, 8)


def test_dispatch_check_reads_contents_on_any_device(monkeypatch):
    assert contents_are_checked(CPU)
    monkeypatch.delenv("DISPATCH_CHECK", raising=False)
    assert not contents_are_checked(CUDA)
    monkeypatch.setenv("DISPATCH_CHECK", "1")
    assert contents_are_checked(CUDA)


def test_a_backend_is_told_when_nobody_reads_the_lse(picky):
    """A recorded call's backward reads it."""
    leaf = Q.clone().requires_grad_()
    calls = (
        (lambda: attention(Q, Q, Q), False),
        (lambda: attention(Q, Q, Q, return_lse=True)[0], True),
        (lambda: attention(Q, Q, Q), False),
        (lambda: attention(leaf, Q, Q), True),
        (lambda: torch.ops.fa4.attention(Q, Q, Q, *[None] * 9, -1, -1, False, "auto")[0], True),
    )
    want = calls[0][0]()
    for call, read in calls:
        assert torch.equal(call(), want)
        assert picky.calls[-1][0].with_lse == read


def test_only_what_somebody_reads_has_memory_of_its_own():
    from fa4_core.allocation import UNREAD, allocator

    make, make_unread = (allocator((2, 3), torch.float32, CPU, is_read) for is_read in (True, False))
    one, two, unread = make(), make(), make_unread()
    assert one.data_ptr() != two.data_ptr() != unread.data_ptr() != one.data_ptr()
    assert (unread.shape, unread.stride(), unread.dtype) == (one.shape, one.stride(), one.dtype)
    assert make_unread() is unread
    assert allocator((5,), torch.float64, CPU, False)().data_ptr() == unread.data_ptr()
    assert allocator((0, 4), torch.float32, CPU, False)().shape == (0, 4)
    too_large = allocator((UNREAD // 4 + 1,), torch.float32, CPU, False)
    one, two = too_large(), too_large()
    assert one.data_ptr() != two.data_ptr()


def test_a_tensor_kept_from_a_transform_stands_for_what_the_transform_wrapped():
    """The transform is over, but its wrapper still wants a gradient. PyTorch's `Function.apply` takes it off."""
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(Q)
    (k,) = kept
    assert k.requires_grad  # or the test would say nothing
    assert not attention(Q, k, k).requires_grad
    q = Q.clone().requires_grad_()
    attention(q, k, k).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(Q))
