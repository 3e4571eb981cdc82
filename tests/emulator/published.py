"""Launches of the published flash-attn-4 kernels on drawn inputs, each with its float64 answer.

The kernels are compiled by `upstream.py`, once a machine. What its host code would hand to a launch (views, scheduler
values, grid) is computed here; docs/emulator.md states why that code itself does not run.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .cute_launch import launch_cute, read_operands
from .machine import Result

L2_FOR_HEADS = 50 * 2**20
"""Bytes of K and V that the package's causal scheduler lets one section of heads occupy."""


def artifacts(kind: str, **options) -> tuple[str, str]:
    """Kept PTX and IR of one configuration of `upstream.KINDS`, compiled in a process of its own, since the DSL reads
    its environment when it loads."""
    words = [f"{name}={str(value).lower()}" for name, value in options.items()]
    folder = Path(tempfile.gettempdir()) / "emulator-upstream" / "-".join([kind, *words])
    if not list(folder.glob("*.ptx")):
        script = Path(__file__).with_name("upstream.py")
        done = subprocess.run([sys.executable, script, folder, kind, *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling {kind} {words} failed:\n{done.stderr[-2000:]}")
    return next(folder.glob("*.ptx")).read_text(), next(folder.glob("*.mlir")).read_text()


@dataclass
class Problem:
    """Dense attention on bfloat16 inputs drawn from a seed; `scale` multiplies q, so that large scores move the
    running maximum. Shapes as in the package: (batch, seqlen, heads, head_dim)."""

    seed: int
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    heads: int = 1
    group: int = 1
    batch: int = 1
    causal: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def draw(seqlen, heads):
            return torch.randn(self.batch, seqlen, heads, self.head_dim, generator=random)

        self.q = (draw(self.seqlen_q, self.heads) * self.scale).bfloat16()
        self.k = draw(self.seqlen_k, self.heads // self.group).bfloat16()
        self.v = draw(self.seqlen_k, self.heads // self.group).bfloat16()
        self.dout = draw(self.seqlen_q, self.heads).bfloat16()

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def answer(self, gradients: bool = False) -> dict[str, torch.Tensor]:
        """out and lse in float64, and dq, dk, dv if asked for."""
        q, k, v = (t.double().transpose(1, 2).requires_grad_(gradients) for t in (self.q, self.k, self.v))
        keys, values = (t.repeat_interleave(self.group, 1) for t in (k, v))
        scores = q @ keys.transpose(-1, -2) * self.softmax_scale
        if self.causal:
            hidden = torch.ones(self.seqlen_q, self.seqlen_k, dtype=torch.bool)
            scores = scores.masked_fill(hidden.triu(1 + self.seqlen_k - self.seqlen_q), -math.inf)
        out = (scores.softmax(-1) @ values).transpose(1, 2)
        found = {"out": out, "lse": scores.logsumexp(-1)}
        if gradients:
            grads = torch.autograd.grad(out, (q, k, v), self.dout.double())
            found |= {name: g.transpose(1, 2) for name, g in zip(("dq", "dk", "dv"), grads)}
        return {name: t.detach() for name, t in found.items()}


@dataclass
class Run:
    """errors: relative RMS error of each output against float64 (for the LSE the largest absolute one). seconds: CPU
    time of the launch."""

    errors: dict[str, float]
    result: Result
    seconds: float
    outputs: dict[str, torch.Tensor]
    ptx: str


def relative_error(found: torch.Tensor, want: torch.Tensor) -> float:
    return ((found.double() - want).norm() / want.norm()).item()


def _single_tile(blocks: int, heads: int, batch: int, sm100: bool) -> tuple[list, tuple[int, int, int]]:
    """Values and grid of the package's scheduler with one tile a CTA."""
    return ([blocks, heads, batch, 1, 1, 1, 1] if sm100 else [blocks, heads, batch, 1, 1]), (blocks, heads, batch)


def _longest_first(blocks: int, heads: int, problem: Problem, sm100: bool) -> tuple[list, tuple[int, int, int]]:
    """The same of the causal scheduler: heads in sections that fit the L2 cache, longest tiles first."""
    bytes_a_head = problem.seqlen_k * problem.head_dim * 2 * 2
    section = 1 << (L2_FOR_HEADS // bytes_a_head).bit_length() - 1 if bytes_a_head <= L2_FOR_HEADS else 1
    sections, rest = divmod(heads * problem.batch, section)
    total = blocks * heads * problem.batch
    divisors = [heads, section, section * blocks, max(rest, 1)]
    shape = [total, 1, blocks, heads, problem.batch] if sm100 else [total, blocks, heads, problem.batch]
    pairs = [x for divisor in divisors for x in (divisor, divisor)]
    return [*shape, section, *pairs, sections, *([1, 1, 1] if sm100 else [1, 1])], (total, 1, 1)


def forward(problem: Problem, *, sm100: bool, pair: bool = False, pack: bool = False, tile_m: int = 128,
            program=None, **options) -> Run:  # fmt: skip
    """One forward: of SM100 (two query tiles of 128 rows a CTA; pair: two CTAs share their MMAs), else of SM90
    (options of `upstream.forward_sm90` among `options`). pack: a group's query heads share a tile. program: runs in
    place of the compiled text."""
    compiled = {n: options.pop(n) for n in ("tile_n", "rs") if n in options}
    choices = {"head_dim": problem.head_dim, "group": problem.group, "causal": problem.causal, "pack": pack}
    if sm100:
        ptx, ir = artifacts("forward_sm100", **choices, pair=pair)
        rows, threads = 256 * (2 if pair else 1), 512
    else:
        ptx, ir = artifacts("forward_sm90", **choices, tile_m=tile_m, **compiled)
        rows, threads = tile_m, 2 * tile_m + 128
    q, k, v = problem.q, problem.k, problem.v
    out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16)
    lse = torch.full((problem.batch, problem.heads, problem.seqlen_q), float("nan"))

    heads, seqlen = problem.heads, problem.seqlen_q
    k_view, v_view = (t.permute(1, 3, 2, 0) for t in (k, v))
    if sm100:
        v_view = v_view.transpose(0, 1)
    if pack:
        # Modes ((head in group, row), head_dim, KV head, batch), flattened.
        kv_heads = heads // problem.group

        def packed(t):
            return t.unflatten(2, (kv_heads, problem.group)).permute(3, 1, 4, 2, 0)

        q_view, out_view = packed(q), packed(out)
        lse_view = lse.unflatten(1, (kv_heads, problem.group)).permute(2, 3, 1, 0)
        # The SM90 maps are made before heads are split: (head, row), head_dim, batch.
        q_map, out_map = (q_view, out_view) if sm100 else (t.permute(2, 1, 3, 0) for t in (q, out))
        heads, seqlen = kv_heads, seqlen * problem.group
    else:
        q_view, out_view = (t.permute(1, 3, 2, 0) for t in (q, out))
        q_map, out_map, lse_view = q_view, out_view, lse.permute(2, 1, 0)
    blocks = -(-seqlen // rows)
    tail, grid = (_longest_first(blocks, heads, problem, sm100) if problem.causal else
                  _single_tile(blocks, heads, problem.batch, sm100))  # fmt: skip
    if pack and sm100:
        tail += [problem.group, problem.group]
    cluster = (2, 1, 1) if pair else (1, 1, 1)
    values = [q_view, k_view, v_view, out_view, lse_view, q_map, k_view, v_view, out_map,
              problem.softmax_scale * math.log2(math.e), None, None, *tail]  # fmt: skip
    assert len(read_operands(ir)) == len(values)
    started = time.process_time()
    result = launch_cute(program or ptx, ir, (grid[0] * cluster[0], *grid[1:]), (threads, 1, 1), values,
                         cluster=cluster, seed=problem.seed, **options)  # fmt: skip
    seconds = time.process_time() - started
    want = problem.answer()
    errors = {"out": relative_error(out, want["out"]), "lse": (lse - want["lse"]).abs().max().item()}
    return Run(errors, result, seconds, {"out": out, "lse": lse}, ptx)


def _unscramble(accumulator: torch.Tensor, head_dim: int, pair: bool) -> torch.Tensor:
    """dQ as (batch, rows, heads, head_dim) from the flat float32 tiles in the order in which TMEM was drained: 4-column
    vectors of all rows, then the next 4 columns. A pair keeps 64 rows in each CTA, whose lanes 64 and up hold the
    upper half of the columns."""
    batch, heads, _ = accumulator.shape
    if pair:
        tiles = accumulator.reshape(batch, heads, -1, 2, head_dim // 8, 2, 64, 4)
        rows = tiles.permute(0, 2, 3, 6, 1, 5, 4, 7)
    else:
        tiles = accumulator.reshape(batch, heads, -1, head_dim // 4, 128, 4)
        rows = tiles.permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(batch, -1, heads, head_dim)


def backward(problem: Problem, *, pair: bool = False, program=None, **options) -> Run:
    """One SM100 backward over key tiles of 128 rows (pair: two CTAs share their MMAs). The row statistics come from
    float64, as the package's preprocessing kernel would compute them."""
    ptx, ir = artifacts("backward_sm100", head_dim=problem.head_dim, causal=problem.causal, pair=pair)
    want = problem.answer(gradients=True)
    batch, heads, rows = problem.batch, problem.heads, -(-problem.seqlen_q // 128) * 128
    lse = torch.full((batch, heads, rows), math.inf)
    lse[..., : problem.seqlen_q] = want["lse"] * math.log2(math.e)
    delta = torch.zeros(batch, heads, rows)
    delta[..., : problem.seqlen_q] = (want["out"] * problem.dout.double()).sum(-1).transpose(1, 2)
    dq = torch.zeros(batch, heads, rows * problem.head_dim)
    dk, dv = (torch.full(t.shape, float("nan"), dtype=torch.bfloat16) for t in (problem.k, problem.v))

    q, k, v, dk_view, dv_view, dout = (
        t.permute(1, 3, 2, 0) for t in (problem.q, problem.k, problem.v, dk, dv, problem.dout)
    )
    dout_t = dout.transpose(0, 1)
    statistics = [lse.permute(2, 1, 0), delta.permute(2, 1, 0)]
    results = [dv_view, dk_view, dq.permute(2, 1, 0), dv_view, dk_view]
    if pair:
        tensors = [q, q.transpose(0, 1), k, k.transpose(0, 1), v]
        maps = [*tensors, dout_t, dout, dv_view, dk_view]
        values = [*tensors, *statistics, dout_t, dout, *results, *maps]
    else:
        values = [q, k, v, *statistics, dout_t, *results, q, k, v, dout_t, dv_view, dk_view]
    blocks = -(-problem.seqlen_k // 128)
    scale = problem.softmax_scale
    values += [*[None] * 5, scale, scale * math.log2(math.e), blocks, heads, batch, 1, 1]
    assert len(read_operands(ir)) == len(values)
    cluster = (2, 1, 1) if pair else (1, 1, 1)
    grid = (-(-blocks // cluster[0]) * cluster[0], heads, batch)
    started = time.process_time()
    result = launch_cute(program or ptx, ir, grid, (512, 1, 1), values, cluster=cluster, seed=problem.seed, **options)
    seconds = time.process_time() - started
    dq_rows = _unscramble(dq, problem.head_dim, pair)[:, : problem.seqlen_q] * scale
    outputs = {"dq": dq_rows, "dk": dk, "dv": dv}
    return Run({name: relative_error(t, want[name]) for name, t in outputs.items()}, result, seconds, outputs, ptx)
