"""Attention as a citizen of PyTorch: operators, compilation, autocast, no synchronisation, CUDA graphs."""

import dataclasses

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import dispatch
from dispatch import attention
from fa4_core import ops
from fa4_core.strategies import Case

CASES = {
    "dense": Case(dtype=torch.float16, head_dim=16, head_dim_v=16, heads_q=2, lengths=((9, 12),) * 2, causal=True),
    "padded": Case(head_dim=20, head_dim_v=12, heads_q=2, lengths=((9, 12),), window=(3, 2)),
    "varlen": Case(dtype=torch.float16, head_dim=16, head_dim_v=16, heads_q=2, lengths=((9, 12), (3, 4)), varlen=True,
                   softcap=5.0, sink="normal", hints="exact", used=((9, 2), (7, 4))),
}  # fmt: skip


def built(target, case):
    """The case's call, in a dtype that the target takes."""
    dtype = case.dtype if case.dtype in target.dtypes else target.widest
    return dataclasses.replace(case, dtype=dtype).build(target.device)


def operator_arguments(call, backend, requires_grad):
    """What `attention` hands to the operator, with q, k, v and the sink as leaves."""
    options = {"max_seqlen_q": None, "max_seqlen_k": None, **call.options}
    tensors = [call.q, call.k, call.v, options.get("sink")]
    tensors = [t if t is None else t.detach().requires_grad_(requires_grad) for t in tensors]
    index = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
    left, right = (-1 if side is None else side for side in options["window"])
    values = ops.pack_values(None, options["softcap"], 8.0)
    right = 0 if options["causal"] else right
    return (
        *tensors,
        *index,
        None,
        options["max_seqlen_q"],
        options["max_seqlen_k"],
        values,
        left,
        right,
        False,
        backend,
    )


OVERLOADS = ("default", "scored")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("overload", OVERLOADS)
def test_opcheck(target, case, requires_grad, overload):
    """Schema, autograd registration, fake kernels (shapes, dtypes and strides) and AOT dispatch."""
    arguments = operator_arguments(built(target, case), target.backend, requires_grad)
    torch.library.opcheck(getattr(torch.ops.fa4.attention, overload), arguments)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("overload", OVERLOADS)
def test_opcheck_backward(target, case, overload):
    call = built(target, case)
    arguments = operator_arguments(call, target.backend, False)
    out, lse = torch.ops.fa4.attention(*arguments)
    checks = ("test_schema", "test_faketensor")
    for dout, dlse in ((call.dout.nan_to_num(), call.dlse.nan_to_num()), (None, call.dlse.nan_to_num())):
        torch.library.opcheck(
            getattr(torch.ops.fa4.attention_backward, overload), (dout, dlse, out, lse, *arguments), test_utils=checks
        )


@pytest.fixture
def counted():
    """Compiles for a counter of graphs; AOT autograd runs, so that the fake kernels and the backward are traced."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield counter, lambda function: torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    torch._dynamo.reset()


def dense(target, len_q, len_k, batch=1):
    make = torch.Generator().manual_seed(len_q)
    return [
        torch.randn(batch, n, heads, 16, generator=make).to(target.device, target.widest).requires_grad_()
        for n, heads in ((len_q, 4), (len_k, 2), (len_k, 2))
    ]


def test_compiled_calls_equal_eager_ones_and_never_recompile_for_values(target, counted):
    """One graph for all windows, scales, caps, thresholds and lengths; results and gradients bit for bit."""
    counter, compiled = counted

    def function(q, k, v, window, scale, softcap, threshold):
        return target(q, k, v, window=window, softmax_scale=scale, softcap=softcap, rescale_threshold=threshold,
                      return_lse=True, deterministic=True)  # fmt: skip

    fast = compiled(function)
    calls = [
        ((20, 24), ((5, 7), 0.25, 5.0, 8.0)),
        ((20, 24), ((6, 9), 0.5, 7.5, 2.0)),
        ((33, 40), ((16, 2), 0.125, 30.0, 0.5)),
        ((50, 21), ((3, 4), 0.3, 1.25, 4.0)),
    ]
    for i, (lengths, values) in enumerate(calls):
        # No size equals another: PyTorch guards the equalities that it sees.
        q, k, v = dense(target, *lengths, batch=5 + i)
        got, want = fast(q, k, v, *values), function(q, k, v, *values)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        grads = [
            torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), lse.detach()]) for out, lse in (got, want)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert counter.frame_count == 1


def test_compiled_varlen_calls_never_recompile_for_lengths(target, counted):
    """Totals, the number of sequences, their lengths and max_seqlen all change."""
    counter, compiled = counted

    def function(q, k, v, cu, longest):
        return target(
            q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest
        )

    fast, compiled_first = compiled(function), 0
    for lengths in ([9, 30, 2, 2, 3], [40, 3, 2, 0, 0, 11, 2], [5, 6, 7, 8, 90, 3]):
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(target.device)
        q, k, v = (t[0].detach().requires_grad_() for t in dense(target, sum(lengths), sum(lengths)))
        out = fast(q, k, v, cu, max(lengths))
        assert torch.equal(out, function(q, k, v, cu, max(lengths)))
        out.sum().backward()
        assert q.grad is not None
        compiled_first = compiled_first or counter.frame_count
    assert counter.frame_count == compiled_first


def test_plain_calls_compile_without_dynamic(target, counted):
    """The default mode, as a user writes it: fullgraph, with a sink and gradients, then a second shape."""
    counter, _ = counted
    fast = torch.compile(lambda q, k, v, sink: target(q, k, v, causal=True, sink=sink), fullgraph=True, backend=counter)
    for lengths in ((20, 24), (33, 40), (51, 52), (70, 90)):
        q, k, v = dense(target, *lengths)
        sink = torch.zeros(4, device=target.device, requires_grad=True)
        fast(q, k, v, sink).sum().backward()
        assert sink.grad.abs().sum() > 0
    # The first shape is static, the second makes the lengths dynamic for good: PyTorch's rule, not ours.
    assert counter.frame_count <= 2


CHANGING = {
    "softmax_scale": (0.25, 0.5, 0.125, 3, 2, 1),
    "softcap": (5.0, 1.25, 30.0, 2, 7, 4),
    "rescale_threshold": (4.0, 2.0, 0.5, 0.0, 1, 3),
    "window": ((5, 7), (6, 9), (16, 2), (3, 4), (5, 7), (3, 4)),
    "causal": (True, False, True),
}
"""Values of an option, call by call: `torch.compile` takes the first as fixed, and the second, too, where it has
another type; from then on they change without a recompilation."""


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CHANGING)
def test_calls_with_a_float_stay_out_of_the_cuda_graphs_that_compile_makes(target, name, autocast):
    """A replayed graph would go on with the number that it was captured with: silently wrong, forward and backward.

    Others stay in: one is captured for each integer, and a bool is the compiled code's own.
    """
    called = []

    def note(module, example_inputs):
        targets = (node.target for node in module.graph.nodes if node.op == "call_function")
        called.extend(t for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace == "fa4")
        return make_boxed_func(module.forward)

    def function(q, k, v, value):
        return target(q, k, v, return_lse=True, deterministic=True, **{name: value})

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    q, k, v = dense(target, 20, 24)
    dtype = torch.float16 if torch.float16 in target.dtypes else torch.bfloat16
    with torch.autocast(target.device, dtype=dtype, enabled=autocast):
        for value in CHANGING[name]:
            results = []
            for call in (compiled, function):
                out, lse = call(q, k, v, value)
                results.append([out, lse, *torch.autograd.grad([out, lse], [q, k, v], [out.detach(), lse.detach()])])
            assert all(map(torch.equal, *results)), value
    torch._dynamo.reset()
    overload = "default" if name in ("window", "causal") else "scored"
    assert {str(operator) for operator in called} == {f"fa4.attention{way}.{overload}" for way in ("", "_backward")}
    assert all((torch.Tag.cudagraph_unsafe in operator.tags) == (overload == "scored") for operator in called)


def test_autocast_casts_q_k_and_v(target):
    """To the autocast dtype and back in the gradients; the kernel itself stays outside of autocast.

    Seen: the reference's float32 products ran in bfloat16 under autocast.
    """
    dtype = torch.float16 if torch.float16 in target.dtypes else torch.bfloat16
    q, k, v = (t.detach().float().requires_grad_() for t in dense(target, 20, 24))
    with torch.autocast(target.device, dtype=dtype):
        out, lse = target(q, k, v, causal=True, return_lse=True)
        out.sum().backward()
        same = target(q.to(dtype), k, v, causal=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert q.grad.dtype == torch.float32
    r, s, t = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    want, want_lse = target(r, s, t, causal=True, return_lse=True)
    want.sum().backward()
    assert torch.equal(out, want)
    assert torch.equal(same, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(q.grad, r.grad.float())


def test_autocast_leaves_float64_and_integers_alone():
    """As PyTorch's own rules do: float64 stays, and integers are refused instead of being cast."""
    q = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, q).dtype == torch.float64
        with pytest.raises(TypeError, match="q: dtype"):
            attention(q.long(), q.long(), q.long())


def test_explain_follows_autocast():
    q = torch.randn(1, 3, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.explain(q, q.bfloat16(), q).backend == "reference"


def test_meta_and_fake_tensors_give_shapes_and_spoil_nothing():
    """Seen: a number's tensor made under a fake mode was kept, and every later call with that number failed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = torch.randn(2, 5, 4, 16)
    meta = q.to("meta")
    out, lse = attention(meta, meta, meta, softcap=6.25, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 5, 4, 16), (2, 4, 5), "meta")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert attention(fake, fake, fake, softcap=6.25).shape == q.shape
    assert attention(q, q, q, softcap=6.25).isfinite().all()


def test_a_default_device_or_dtype_changes_nothing():
    """torch.device as a context moves factory calls: the operator's numbers stay on the CPU."""
    q = torch.randn(1, 5, 2, 16)
    want = attention(q, q, q, softcap=5.0)
    with torch.device("meta"):
        assert torch.equal(attention(q, q, q, softcap=5.0), want)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(attention(q, q, q, softcap=5.0), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_modules_export():
    """torch.export keeps one operator call in the graph."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    q = torch.randn(1, 8, 2, 16)
    program = torch.export.export(Layer(), (q, q, q))
    assert "fa4.attention" in program.graph_module.code
    assert torch.equal(program.module()(q, q, q), attention(q, q, q, causal=True))


def test_the_counter_that_the_cute_backend_keeps_belongs_to_no_mode_of_the_first_caller():
    """Nor to its memory pool, which a CPU does not have: seen through what comes with it, a thread's modes."""
    launch = pytest.importorskip("fa4_cute.launch")
    with torch.inference_mode():
        counter = launch._stream_counter.__wrapped__(torch.device("cpu"), 0)
    assert not counter.is_inference()
    assert counter.tolist() == [0, 0]


@pytest.mark.gpu
def test_the_counter_that_the_cute_backend_keeps_comes_from_no_pool_of_the_first_caller(target):
    """torch.compile's warm-up for CUDA graphs gives its pool's memory to others: blocks would draw wild work items."""
    if target.backend != "cute":
        pytest.skip("needs a GPU that the cute backend serves")
    from test_kvcache_kept import pool_of

    from fa4_cute import launch

    launch._stream_counter.cache_clear()
    q = torch.randn(1, 300, 2, 64, dtype=torch.float16, device=target.device)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        out = target(q, q, q, causal=True)
    assert pool_of(out) == tuple(pool.id)  # or the test would say nothing
    assert launch._stream_counter.cache_info().currsize == 1
    counter = launch._stream_counter(q.device, torch._C._cuda_getCurrentRawStream(q.device.index))
    assert launch._stream_counter.cache_info().currsize == 1
    assert pool_of(counter) == (0, 0)
    assert torch.equal(out, target(q, q, q, causal=True))


PACKED = Case(
    dtype=torch.float16, head_dim=64, head_dim_v=64, heads_q=4, varlen=True, lengths=((100, 130), (70, 90)),
    used=((90, 70), (130, 80)), causal=True, softcap=5.0, sink="normal", deterministic=True,
)  # fmt: skip
DENSE = dataclasses.replace(PACKED, varlen=False, lengths=((100, 130),) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [PACKED, DENSE], ids=["varlen", "dense"])
def test_no_call_synchronises_with_the_device(target, case):
    """Lengths, indices and values are never read back, in the forward or in the backward."""
    if target.device == "cpu":
        pytest.skip("needs a GPU")
    call = case.build(target.device)
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]

    def step():
        out, lse = target(*leaves, return_lse=True, **call.options)
        return torch.autograd.grad([out, lse], leaves, [call.dout, call.dlse])

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_forward_and_backward_can_be_captured_in_a_cuda_graph(target):
    """Replayed on new contents, lengths included, they equal an eager call on them bit for bit."""
    if target.device == "cpu":
        pytest.skip("needs a GPU")
    call = PACKED.build(target.device)
    other = dataclasses.replace(PACKED, seed=1, used=((30, 66), (77, 90))).build(target.device)
    leaves = [t.detach().clone().requires_grad_() for t in (call.q, call.k, call.v)]
    options = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in call.options.items()}

    def step(leaves, options):
        out, lse = target(*leaves, return_lse=True, **options)
        return (out, lse, *torch.autograd.grad([out, lse], leaves, [call.dout.nan_to_num(), call.dlse.nan_to_num()]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(leaves, options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(leaves, options)
    with torch.no_grad():
        for leaf, fresh in zip(leaves, (other.q, other.k, other.v)):
            leaf.copy_(fresh)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            value.copy_(other.options[name])
    graph.replay()
    fresh = [t.detach().requires_grad_() for t in (other.q, other.k, other.v)]
    for got, want in zip(results, step(fresh, other.options)):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHANGING)
def test_cuda_graphs_that_compile_makes_follow_every_value(target, name, monkeypatch):
    """mode="reduce-overhead", forward and backward, against eager calls bit for bit.

    A bool and an integer that came before are replayed: then nothing runs here.
    """
    if target.device == "cpu":
        pytest.skip("needs a GPU")
    run, real = [], ops._forward
    monkeypatch.setattr(ops, "_forward", lambda *args: run.append(args) or real(*args))
    q, k, v = dense(target, 70, 90, batch=2)
    dout = torch.ones_like(q)

    def function(q, k, v, value):
        return target(q, k, v, return_lse=True, deterministic=True, **{name: value})

    def step(call, value):
        out, lse = call(q, k, v, value)
        return [t.clone() for t in (out, lse, *torch.autograd.grad([out, lse], [q, k, v], [dout, lse.detach()]))]

    torch._dynamo.reset()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    replayed = False
    for value in CHANGING[name] * 3:
        before = len(run)
        torch.compiler.cudagraph_mark_step_begin()
        got = step(compiled, value)
        replayed = len(run) == before
        assert all(map(torch.equal, got, step(function, value))), value
    torch._dynamo.reset()
    assert replayed == (name in ("window", "causal"))
