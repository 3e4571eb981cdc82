"""Every call that must be refused: the exception's type, the argument it names and what it says is accepted."""

import math

import pytest
import torch
from hypothesis import given

import dispatch
from dispatch import attention
from fa4_core import backends
from fa4_core.strategies import invalid_calls

INT32 = torch.int32


def rows(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def dense(**changed):
    """A valid dense call of 4 query heads on 2 KV heads, with arguments changed."""
    return {"q": rows(2, 5, 4, 16), "k": rows(2, 7, 2, 16), "v": rows(2, 7, 2, 24), **changed}


def packed(**changed):
    """A valid varlen call of two sequences, with arguments changed."""
    cu = {"cu_seqlens_q": torch.tensor([0, 2, 5], dtype=INT32), "cu_seqlens_k": torch.tensor([0, 4, 7], dtype=INT32)}
    return {"q": rows(5, 4, 16), "k": rows(7, 2, 16), "v": rows(7, 2, 24), **cu, **changed}


def index(*values, dtype=INT32):
    return torch.tensor(values, dtype=dtype)


def paged(**changed):
    """A valid call on paged keys: three pages of 8 rows, one for each of two sequences, with arguments changed."""
    pages = {"k": rows(3, 8, 2, 16), "v": rows(3, 8, 2, 24), "page_table": index([0], [2]), "seqused_k": index(8, 5)}
    return {"q": rows(2, 5, 4, 16), **pages, **changed}


class NotATensor:
    pass


# call, exception, the argument named, what the message says is accepted (or what it must be equal to)
BAD = {
    "q is an array": (dense(q=NotATensor()), TypeError, "q", "torch.Tensor"),
    "k is None": (dense(k=None), TypeError, "k", "torch.Tensor"),
    "v is a list": (dense(v=[1.0]), TypeError, "v", "torch.Tensor"),
    "sink is a number": (dense(sink=0.5), TypeError, "sink", "torch.Tensor"),
    "cu_seqlens_q is a list": (packed(cu_seqlens_q=[0, 2, 5]), TypeError, "cu_seqlens_q", "torch.Tensor"),
    "seqused_k is a list": (dense(seqused_k=[1, 2]), TypeError, "seqused_k", "torch.Tensor"),
    "page_table is a list": (dense(page_table=[[0]]), TypeError, "page_table", "torch.Tensor"),
    "q of integers": (dense(q=rows(2, 5, 4, 16, dtype=torch.int64)), TypeError, "q", "torch.bfloat16"),
    "q of complex numbers": (dense(q=rows(2, 5, 4, 16, dtype=torch.complex64)), TypeError, "q", "torch.float16"),
    "k of another dtype": (dense(k=rows(2, 7, 2, 16, dtype=torch.float16)), TypeError, "k", "q's torch.float32"),
    "v of another dtype": (dense(v=rows(2, 7, 2, 24, dtype=torch.bfloat16)), TypeError, "v", "q's torch.float32"),
    "k on another device": (dense(k=rows(2, 7, 2, 16).to("meta")), ValueError, "k", "q is on cpu"),
    "sink on another device": (dense(sink=rows(4).to("meta")), ValueError, "sink", "q is on cpu"),
    "cu_seqlens_k on another device": (
        packed(cu_seqlens_k=index(0, 4, 7).to("meta")), ValueError, "cu_seqlens_k", "q is on cpu"
    ),
    "q of rank 3 without cu_seqlens": (dense(q=rows(5, 4, 16)), ValueError, "q", "(batch, seqlen, heads, head_dim)"),
    "q of rank 5": (dense(q=rows(1, 2, 5, 4, 16)), ValueError, "q", "(batch, seqlen, heads, head_dim)"),
    "k of rank 3": (dense(k=rows(7, 2, 16)), ValueError, "k", "(batch, seqlen, heads, head_dim)"),
    "v of rank 0": (dense(v=torch.zeros(())), ValueError, "v", "(batch, seqlen, heads, head_dim)"),
    "dense q with cu_seqlens": (packed(q=rows(1, 5, 4, 16)), ValueError, "q", "(total, heads, head_dim)"),
    "head_dim 0": (dense(q=rows(2, 5, 4, 0), k=rows(2, 7, 2, 0)), ValueError, "q", "1 to 256"),
    "head_dim 257": (dense(q=rows(2, 5, 4, 257), k=rows(2, 7, 2, 257)), ValueError, "q", "1 to 256"),
    "head_dim_v 0": (dense(v=rows(2, 7, 2, 0)), ValueError, "v", "1 to 256"),
    "head_dim_v 257": (dense(v=rows(2, 7, 2, 257)), ValueError, "v", "1 to 256"),
    "head_dim of k differs": (dense(k=rows(2, 7, 2, 8)), ValueError, "k", "q's 16"),
    "heads of v differ": (dense(v=rows(2, 7, 4, 24)), ValueError, "v", "k's 2"),
    "heads that do not divide": (dense(k=rows(2, 7, 3, 16), v=rows(2, 7, 3, 24)), ValueError, "k", "heads_q=4"),
    "more KV heads than query heads": (dense(k=rows(2, 7, 8, 16), v=rows(2, 7, 8, 24)), ValueError, "k", "heads_q=4"),
    "no query heads": (dense(q=rows(2, 5, 0, 16)), ValueError, "q", "at least 1"),
    "no KV heads": (dense(k=rows(2, 7, 0, 16), v=rows(2, 7, 0, 24)), ValueError, "k", "at least 1"),
    "batch of k differs": (dense(k=rows(3, 7, 2, 16), v=rows(3, 7, 2, 24)), ValueError, "k", "q's 2"),
    "batch of v differs": (dense(v=rows(3, 7, 2, 24)), ValueError, "v", "k's 2"),
    "rows of v differ": (dense(v=rows(2, 6, 2, 24)), ValueError, "v", "k's 7"),
    "sink of a wrong length": (dense(sink=rows(2)), ValueError, "sink", "(heads_q,) = (4,)"),
    "sink of a wrong rank": (dense(sink=rows(1, 4)), ValueError, "sink", "(heads_q,) = (4,)"),
    "sink of integers": (dense(sink=torch.zeros(4, dtype=torch.int64)), TypeError, "sink", "floating-point"),
    "sink of fp8": (dense(sink=rows(4).to(torch.float8_e4m3fn)), TypeError, "sink", "16 bits"),
    "cu_seqlens_q alone": (packed(cu_seqlens_k=None), ValueError, "cu_seqlens_k", "takes both"),
    "cu_seqlens_k alone": (packed(cu_seqlens_q=None), ValueError, "cu_seqlens_q", "takes both"),
    "cu_seqlens of int64": (packed(cu_seqlens_q=index(0, 2, 5, dtype=torch.int64)), TypeError, "cu_seqlens_q", "int32"),
    "cu_seqlens of floats": (packed(cu_seqlens_k=torch.zeros(3)), TypeError, "cu_seqlens_k", "int32"),
    "cu_seqlens of rank 2": (packed(cu_seqlens_q=index([0, 2, 5])), ValueError, "cu_seqlens_q", "n_seqs + 1"),
    "cu_seqlens without entries": (packed(cu_seqlens_q=index()), ValueError, "cu_seqlens_q", "n_seqs + 1"),
    "cu_seqlens of different lengths": (packed(cu_seqlens_k=index(0, 7)), ValueError, "cu_seqlens_k", "n_seqs + 1"),
    "cu_seqlens not from 0": (packed(cu_seqlens_q=index(1, 2, 5)), ValueError, "cu_seqlens_q", "must start at 0"),
    "cu_seqlens that fall": (packed(cu_seqlens_k=index(0, 8, 7)), ValueError, "cu_seqlens_k", "must not decrease"),
    "cu_seqlens past the end": (packed(cu_seqlens_q=index(0, 2, 6)), ValueError, "cu_seqlens_q", "q has 5 rows"),
    "cu_seqlens_k past the end": (packed(cu_seqlens_k=index(0, 2, 9)), ValueError, "cu_seqlens_k", "k has 7 rows"),
    "seqused of int64": (dense(seqused_k=index(1, 2, dtype=torch.int64)), TypeError, "seqused_k", "int32"),
    "seqused of a wrong length": (dense(seqused_q=index(1, 2, 3)), ValueError, "seqused_q", "(2,)"),
    "seqused of rank 2": (dense(seqused_q=torch.zeros(2, 1, dtype=INT32)), ValueError, "seqused_q", "(2,)"),
    "seqused beyond the rows": (dense(seqused_k=index(7, 8)), ValueError, "seqused_k", "0 to 7"),
    "seqused beyond its sequence": (packed(seqused_k=index(4, 4)), ValueError, "seqused_k", "0 to 3"),
    "seqused below 0": (dense(seqused_q=index(5, -1)), ValueError, "seqused_q", "0 to 5"),
    "max_seqlen of a dense call": (dense(max_seqlen_q=5), ValueError, "max_seqlen_q", "cu_seqlens_q"),
    "max_seqlen below 0": (packed(max_seqlen_k=-1), ValueError, "max_seqlen_k", ">= 0"),
    "max_seqlen too small": (packed(max_seqlen_k=3), ValueError, "max_seqlen_k", "4 rows"),
    "max_seqlen a float": (packed(max_seqlen_q=5.0), TypeError, "max_seqlen_q", "integers"),
    "max_seqlen a bool": (packed(max_seqlen_q=True), TypeError, "max_seqlen_q", "integers"),
    "max_seqlen a tensor": (packed(max_seqlen_q=torch.tensor(5)), TypeError, "max_seqlen_q", "integers"),
    "left below -1": (dense(window=(-2, None)), ValueError, "window", ">= 0"),
    "right below -1": (dense(window=(None, -2)), ValueError, "window", ">= 0"),
    "right below -1, causal": (dense(window=(3, -2), causal=True), ValueError, "window", ">= 0"),
    "a window side that is a float": (dense(window=(1.0, 2)), TypeError, "window", "integers"),
    "a window side that is a bool": (dense(window=(True, 2)), TypeError, "window", "integers"),
    "a window side beyond any integer": (dense(window=(10**30, 2)), ValueError, "window", "integers up to"),
    "a window of one side": (dense(window=(1,)), ValueError, "window", "(left, right)"),
    "a window that is a number": (dense(window=128), ValueError, "window", "(left, right)"),
    "no window": (dense(window=None), ValueError, "window", "(left, right)"),
    "scale 0": (dense(softmax_scale=0.0), ValueError, "softmax_scale", "finite numbers > 0"),
    "scale below 0": (dense(softmax_scale=-0.1), ValueError, "softmax_scale", "finite numbers > 0"),
    "scale NaN": (dense(softmax_scale=math.nan), ValueError, "softmax_scale", "finite numbers > 0"),
    "scale infinite": (dense(softmax_scale=math.inf), ValueError, "softmax_scale", "finite numbers > 0"),
    "scale beyond float32": (dense(softmax_scale=1e39), ValueError, "softmax_scale", "in float32"),
    "scale whose log2 units are beyond float32": (dense(softmax_scale=3e38), ValueError, "softmax_scale", "in float32"),
    "scale beyond float64": (dense(softmax_scale=10**400), ValueError, "softmax_scale", "in float32"),
    "scale a string": (dense(softmax_scale="0.1"), TypeError, "softmax_scale", "numbers"),
    "scale a bool": (dense(softmax_scale=True), TypeError, "softmax_scale", "numbers"),
    "scale a tensor": (dense(softmax_scale=torch.tensor(0.1)), TypeError, "softmax_scale", "numbers"),
    "softcap below 0": (dense(softcap=-1.0), ValueError, "softcap", ">= 0"),
    "softcap NaN": (dense(softcap=math.nan), ValueError, "softcap", ">= 0"),
    "softcap infinite": (dense(softcap=math.inf), ValueError, "softcap", ">= 0"),
    "softcap beyond float32": (dense(softcap=1e39), ValueError, "softcap", "in float32"),
    "softcap whose log2 units are beyond float32": (dense(softcap=3e38), ValueError, "softcap", "in float32"),
    "softcap far below the scale": (dense(softcap=1e-40), ValueError, "softcap", "softmax_scale="),
    "softcap a bool": (dense(softcap=True), TypeError, "softcap", "numbers"),
    "threshold above 8": (dense(rescale_threshold=8.5), ValueError, "rescale_threshold", "0 to 8"),
    "threshold below 0": (dense(rescale_threshold=-1), ValueError, "rescale_threshold", "0 to 8"),
    "threshold NaN": (dense(rescale_threshold=math.nan), ValueError, "rescale_threshold", "0 to 8"),
    "threshold a string": (dense(rescale_threshold="8"), TypeError, "rescale_threshold", "numbers"),
    "causal an integer": (dense(causal=1), TypeError, "causal", "bool"),
    "deterministic a string": (dense(deterministic="yes"), TypeError, "deterministic", "bool"),
    "return_lse an integer": (dense(return_lse=1), TypeError, "return_lse", "bool"),
    "an unknown backend": (dense(backend="cuda"), ValueError, "backend", "'auto', 'cute', 'triton', 'reference'"),
    "a backend that is no name": (dense(backend=0), TypeError, "backend", "str"),
    "no backend": (dense(backend=None), TypeError, "backend", "str"),
    "a page table without lengths": (dense(page_table=index([0], [1])), ValueError, "seqused_k", "page_table"),
    "a page table with cu_seqlens_k": (
        packed(page_table=index([0], [1]), k=rows(2, 8, 2, 16), v=rows(2, 8, 2, 24)), ValueError, "cu_seqlens_k",
        "seqused_k",
    ),
    "a page table with max_seqlen_k": (
        paged(cu_seqlens_q=index(0, 2, 5), q=rows(5, 4, 16), max_seqlen_k=8), ValueError, "max_seqlen_k", "page_table"
    ),
    "a page table of int64": (paged(page_table=index([0], [1], dtype=torch.int64)), TypeError, "page_table", "int32"),
    "a page table of rank 1": (paged(page_table=index(0, 1)), ValueError, "page_table", "(batch, pages)"),
    "a page table of another batch": (paged(page_table=index([0])), ValueError, "page_table", "(2, 1)"),
    "pages of 12 rows": (paged(k=rows(3, 12, 2, 16), v=rows(3, 12, 2, 24)), ValueError, "k", "multiples of 8"),
    "pages that are packed": (paged(k=rows(24, 2, 16)), ValueError, "k", "(n_pages, page_size, heads, head_dim)"),
    "numbers of pages differ": (paged(v=rows(4, 8, 2, 24)), ValueError, "v", "k's 3"),
    "a page that does not exist": (paged(page_table=index([0], [3])), ValueError, "page_table", "0 to 2"),
    "more keys than the pages hold": (paged(seqused_k=index(9, 1)), ValueError, "seqused_k", "0 to 8"),
    "a gradient through pages": (paged(q=rows(2, 5, 4, 16).requires_grad_()), ValueError, "q", "no_grad"),
}  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    """The launches that reach a backend; there must be none."""
    seen = []
    for name in backends.MODULES:
        monkeypatch.setattr(backends.load(name), "forward", lambda problem, inputs: seen.append(problem))
    return seen


@pytest.mark.parametrize(("call", "error", "argument", "accepted"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name_before_anything_runs(launches, call, error, argument, accepted):
    with pytest.raises(error) as caught:
        attention(**call)
    message = str(caught.value)
    assert argument in message
    assert accepted in message
    assert not launches


@pytest.mark.parametrize(("call", "error", "argument", "accepted"), BAD.values(), ids=BAD.keys())
def test_explain_refuses_the_same_calls(call, error, argument, accepted):
    with pytest.raises(error) as caught:
        dispatch.explain(**call)
    assert argument in str(caught.value)


@given(bad=invalid_calls())
def test_drawn_invalid_calls_are_refused_by_name(bad):
    with pytest.raises(bad.error) as caught:
        attention(**bad.arguments())
    assert bad.argument in str(caught.value)


@pytest.mark.parametrize("call", [dense(), packed(), paged()], ids=["dense", "packed", "paged"])
def test_the_calls_above_are_valid_but_for_what_they_change(call):
    attention(**call)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="dropout"):
        attention(**dense(), dropout=0.1)


def test_options_are_given_by_name_only():
    call = dense()
    with pytest.raises(TypeError, match="positional"):
        attention(call["q"], call["k"], call["v"], True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"cu_seqlens_q": index(1, 2, 5)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": index(0, 8, 7)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": index(0, 4, 99)}, "cu_seqlens_k"),
        ({"seqused_k": index(4, 99)}, "seqused_k"),
    ],
)
def test_contents_on_a_device_are_clamped_or_under_dispatch_check_refused(monkeypatch, changed, argument):
    """Without the check the result is unspecified, and the device survives: no access is past the tensors."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    call = {name: t.cuda() for name, t in packed(**changed).items()}
    attention(**call)
    torch.cuda.synchronize()
    monkeypatch.setenv("DISPATCH_CHECK", "1")
    with pytest.raises(ValueError, match=argument):
        attention(**call)
