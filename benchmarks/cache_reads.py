"""How fast a GPU reads a KV cache, by how its tiles are dealt to blocks: `python -m benchmarks.cache_reads`.

A kernel of TMA loads alone, written in PTX: what a decode kernel would take if arithmetic, results and merges cost
nothing. One thread a block keeps a ring of tiles on their way and does nothing with them; it may store a part of a
result after each item, as split sequences do. Every variant runs in turn, for some rounds, on caches that exceed L2.

Needs a GPU with TMA (compute capability 9.0 or later) and PyTorch. docs/performance.md quotes it.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fa4_core.bench.results import provenance

RESULTS = Path(__file__).parent / "results"
DIM = 128
ROW_BYTES = 2 * DIM
KEYS = 64
"""Keys of a tile of one head, or of several together: a tile of K and one of V are 32 KiB in all."""
TILE_BYTES = 2 * KEYS * ROW_BYTES
RESERVED = 1024
"""Bytes of shared memory before the ring, for its barriers."""
LAUNCHES = 4
PAUSED = 4
"""Bytes into which a counter of draws is put, apart from the next launch's: a launch does not put it back."""


@dataclass(frozen=True)
class Variant:
    """A way to deal tiles.

    deal: "ranges", equal ones, a block; "turns", item by item; "drawn", from a counter, as blocks get there. chunk:
    tiles of an item. heads: KV heads whose rows a tile holds. slots: tiles on their way. store: bytes of a part that is
    stored after each item. keep: the part with L2's evict_last. late: items after which a part is discarded from L2,
    before which that may have written it back; -1 for never. once: tiles with L2's evict_first. cluster: blocks that
    are launched side by side.
    """

    name: str
    deal: str = "ranges"
    chunk: int = 1
    heads: int = 1
    slots: int = 6
    store: int = 0
    keep: bool = False
    late: int = -1
    once: bool = False
    cluster: int = 1


VARIANTS = (
    Variant("equal ranges"),
    Variant("equal ranges, 4 slots", slots=4),
    Variant("equal ranges, clusters of 2", cluster=2),
    Variant("equal ranges, clusters of 2, tiles once", once=True, cluster=2),
    Variant("tile by tile", "turns"),
    *(Variant(f"by {n} in turns", "turns", n) for n in (2, 4, 8)),
    *(Variant(f"drawn by {n}", "drawn", n) for n in (4, 8, 16, 32)),
    *(Variant(f"drawn by {n}, {h} heads", "drawn", n, h) for h in (2, 8) for n in (4, 8)),
    *(Variant(f"drawn by {n}, parts", "drawn", n, store=4096) for n in (4, 8, 16)),
    *(Variant(f"drawn by {n}, small parts", "drawn", n, store=512) for n in (4, 8, 16)),
    *(Variant(f"drawn by {n}, parts kept", "drawn", n, store=4096, keep=True) for n in (4, 8)),
    *(Variant(f"drawn by {n}, parts kept, tiles once", "drawn", n, store=4096, keep=True, once=True) for n in (4, 8)),
    *(Variant(f"drawn by {n}, parts discarded", "drawn", n, store=4096, late=0) for n in (4, 8)),
    *(Variant(f"drawn by 4, discarded {n} late", "drawn", 4, store=4096, late=n) for n in (1, 2, 4)),
    *(Variant(f"drawn by 4, kept, discarded {n} late", "drawn", 4, store=4096, keep=True, late=n) for n in (1, 2, 4)),
    Variant("drawn by 4, kept, discarded 2 late, tiles once", "drawn", 4, store=4096, keep=True, late=2, once=True),
)
CASES = {
    "B1 S32768 H8": (1, 32768, 8),
    "B16 S8192 H8": (16, 8192, 8),
    "B64 S4096 H8": (64, 4096, 8),
    "B128 S2048 H32": (128, 2048, 32),
}


def ptx(variant: Variant) -> str:
    """The kernel: maps of K and V, head groups, tiles of a head group and of a sequence, times, counter, parts."""
    hint, policy = (".L2::cache_hint", ", %once") if variant.once else ("", "")
    loads = "".join(
        f"""
    add.u32 %to, %slot, {half};
    cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{hint}
        [%to], [{cache}, {{%zero, %zero, %row, %head, %sequence}}], [%full]{policy};"""
        for cache, half in (("%k", 0), ("%v", TILE_BYTES // 2))
    )
    next_item = {
        "ranges": "mov.u32 %item, %items;",
        "turns": "add.u32 %item, %item, %blocks;",
        "drawn": "mov.u32 %item, %drawn; atom.global.add.u32 %drawn, [%counter], 1;",
    }[variant.deal]
    first_item = {
        "ranges": """mul.lo.u32 %n, %team, %tiles; div.u32 %tile, %n, %teams; add.u32 %n, %n, %tiles;
    div.u32 %end, %n, %teams; rem.u32 %head, %block, %groups;""",
        "turns": "",
        "drawn": "atom.global.add.u32 %item, [%counter], 1; atom.global.add.u32 %drawn, [%counter], 1;",
    }[variant.deal]
    of_item = (
        ""
        if variant.deal == "ranges"
        else f"""rem.u32 %head, %item, %groups; div.u32 %tile, %item, %groups; mul.lo.u32 %tile, %tile, {variant.chunk};
    add.u32 %end, %tile, {variant.chunk};"""
    )
    store = ""
    if variant.store:
        keep, kept = (".L2::cache_hint", ", %kept") if variant.keep else ("", "")
        store = f"""
    mul.wide.u32 %part, %item, {variant.store}; add.u64 %part, %part, %parts;
    cp.async.bulk.global.shared::cta.bulk_group{keep} [%part], [%ring], {variant.store}{kept};
    cp.async.bulk.commit_group;"""
        if variant.late >= 0:
            given_up = f"%before{variant.late}"
            shifts = (f"\n    mov.u64 %before{n}, %before{n - 1};" for n in range(variant.late, 0, -1))
            discards = (f"\n    discard.global.L2 [{given_up}+{at}], 128;" for at in range(0, variant.store, 128))
            store += f"""{"".join(shifts)}
    mov.u64 %before0, %part; setp.eq.u64 %p, {given_up}, 0; @%p bra STORED;
    cp.async.bulk.wait_group {variant.late};{"".join(discards)}
STORED:"""
    clustered = f".reqntid 32, 1, 1\n.reqnctapercluster {variant.cluster}, 1, 1\n" if variant.cluster > 1 else ""
    return f"""
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 shared[];
.visible .entry reads(.param .u64 p_k, .param .u64 p_v, .param .u32 p_groups, .param .u32 p_tiles,
    .param .u32 p_sequence_tiles, .param .u64 p_times, .param .u64 p_counter, .param .u64 p_parts)
{clustered}{{
    .reg .pred %p;
    .reg .b32 %n, %block, %blocks, %team, %teams, %groups, %tiles, %of_sequence, %items, %item, %drawn, %tile, %end;
    .reg .b32 %head, %first_head, %sequence, %row, %zero, %issued, %index, %lap, %bars, %ring, %full, %slot, %to;
    .reg .b64 %k, %v, %counter, %parts, %part, %times, %at, %begun, %ended, %once, %kept, %before<{variant.late + 2}>;
    mov.u32 %n, %tid.x; setp.ne.u32 %p, %n, 0; @%p bra DONE;
    ld.param.u64 %k, [p_k]; ld.param.u64 %v, [p_v]; ld.param.u32 %groups, [p_groups]; ld.param.u32 %tiles, [p_tiles];
    ld.param.u32 %of_sequence, [p_sequence_tiles]; ld.param.u64 %times, [p_times];
    ld.param.u64 %counter, [p_counter]; ld.param.u64 %parts, [p_parts];
    mov.u64 %begun, %globaltimer;{"".join(f" mov.u64 %before{n}, 0;" for n in range(variant.late + 1))}
    createpolicy.fractional.L2::evict_first.b64 %once, 1.0; createpolicy.fractional.L2::evict_last.b64 %kept, 1.0;
    mov.u32 %block, %ctaid.x; mov.u32 %blocks, %nctaid.x; mov.u32 %zero, 0; mov.u32 %issued, 0;
    div.u32 %team, %block, %groups; div.u32 %teams, %blocks, %groups;
    mov.u32 %bars, shared; add.u32 %ring, %bars, {RESERVED};
    mov.u32 %n, 0;
INIT:
    shl.b32 %full, %n, 3; add.u32 %full, %full, %bars; mbarrier.init.shared.b64 [%full], 1;
    add.u32 %n, %n, 1; setp.lt.u32 %p, %n, {variant.slots}; @%p bra INIT;
    fence.proxy.async.shared::cta;
    div.u32 %items, %tiles, {variant.chunk}; mul.lo.u32 %items, %items, %groups;
    mov.u32 %item, %block; {first_item}
ITEM:
    setp.ge.u32 %p, %item, %items; @%p bra DRAIN;
    {of_item}
    mul.lo.u32 %first_head, %head, {variant.heads}; mov.u32 %head, %first_head;
TILE:
    rem.u32 %index, %issued, {variant.slots}; div.u32 %lap, %issued, {variant.slots};
    shl.b32 %full, %index, 3; add.u32 %full, %full, %bars;
    setp.eq.u32 %p, %lap, 0; @%p bra ISSUE;
    sub.u32 %lap, %lap, 1; and.b32 %lap, %lap, 1;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p, [%full], %lap; @!%p bra WAIT;
ISSUE:
    div.u32 %sequence, %tile, %of_sequence; rem.u32 %row, %tile, %of_sequence;
    mul.lo.u32 %row, %row, {KEYS // variant.heads};
    mad.lo.u32 %slot, %index, {TILE_BYTES}, %ring;
    mbarrier.arrive.expect_tx.shared.b64 _, [%full], {TILE_BYTES};{loads}
    add.u32 %issued, %issued, 1; add.u32 %tile, %tile, 1; setp.lt.u32 %p, %tile, %end; @%p bra TILE;{store}
    {next_item}
    bra ITEM;
DRAIN:
    max.u32 %n, %issued, {variant.slots}; sub.u32 %n, %n, {variant.slots};
LAST:
    setp.ge.u32 %p, %n, %issued; @%p bra END;
    rem.u32 %index, %n, {variant.slots}; div.u32 %lap, %n, {variant.slots}; and.b32 %lap, %lap, 1;
    shl.b32 %full, %index, 3; add.u32 %full, %full, %bars;
LAST_WAIT:
    mbarrier.try_wait.parity.shared.b64 %p, [%full], %lap; @!%p bra LAST_WAIT;
    add.u32 %n, %n, 1; bra LAST;
END:
    cp.async.bulk.wait_group 0;
    mov.u64 %ended, %globaltimer;
    mul.wide.u32 %at, %block, 16; add.u64 %times, %times, %at; st.global.v2.u64 [%times], {{%begun, %ended}};
DONE:
    ret;
}}
"""


class Kernel:
    """A variant, loaded on the current device."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._shared = RESERVED + variant.slots * TILE_BYTES
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(self._driver.cuModuleLoadData(ctypes.byref(module), ptx(variant).encode()), variant.name)
        _check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"reads"), variant.name)
        _check(self._driver.cuFuncSetAttribute(self._function, 8, self._shared), "shared memory")

    def map_of(self, cache: torch.Tensor) -> torch.Tensor:
        """The tensor map of a (B, S, H, D) cache, on the device: boxes of whole rows, in halves of 64 columns."""
        batch, rows, heads, dim = cache.shape
        sizes, box = (
            (64, dim // 64, rows, heads, batch),
            (64, dim // 64, KEYS // self.variant.heads, self.variant.heads, 1),
        )
        strides = (128, heads * ROW_BYTES, ROW_BYTES, rows * heads * ROW_BYTES)
        buffer = (ctypes.c_uint8 * 256)()
        aligned = (ctypes.addressof(buffer) + 63) // 64 * 64
        status = self._driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned),
            9,
            5,
            ctypes.c_void_p(cache.data_ptr()),
            (ctypes.c_uint64 * 5)(*sizes),
            (ctypes.c_uint64 * 4)(*strides),
            (ctypes.c_uint32 * 5)(*box),
            (ctypes.c_uint32 * 5)(*[1] * 5),
            0,
            3,
            2,
            0,
        )  # fmt: skip  (bf16, no interleave, 128-byte swizzle, L2 promotion to 128 bytes)
        _check(status, f"tensor map of {tuple(cache.shape)}")
        return torch.tensor(list((ctypes.c_uint8 * 128).from_address(aligned)), dtype=torch.uint8).to(cache.device)

    def blocks(self, groups: int, sms: int) -> int:
        """One a multiprocessor, in whole clusters; ranges are of one head group each."""
        blocks = sms // groups * groups if self.variant.deal == "ranges" else sms
        return blocks // self.variant.cluster * self.variant.cluster

    def launch(self, blocks: int, *arguments: Any) -> None:
        """Launches on the current stream."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = self._driver.cuLaunchKernel(
            self._function, blocks, 1, 1, 32, 1, 1, self._shared, stream, pointers, None
        )
        _check(status, self.variant.name)


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: the CUDA driver returned error {status}")


def measure(case: str, kernels: list[Kernel], pool: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """Microseconds a launch, the median of rounds of `LAUNCHES` after one that is not timed, and blocks' spread."""
    batch, rows, heads = CASES[case]
    size = batch * rows * heads * DIM
    k, v = (pool[at * size : (at + 1) * size].view(batch, rows, heads, DIM) for at in (0, 1))
    sms = torch.cuda.get_device_properties(pool.device).multi_processor_count
    times = torch.zeros(sms, 2, dtype=torch.int64, device=pool.device)
    counters = torch.zeros(len(kernels) * rounds * (LAUNCHES + 1) * PAUSED, dtype=torch.int32, device=pool.device)
    parts = torch.empty(2 * size // TILE_BYTES * 4096, dtype=torch.uint8, device=pool.device)
    prepared, launched = [(kernel, kernel.map_of(k), kernel.map_of(v)) for kernel in kernels], 0
    elapsed: dict[str, list[float]] = {kernel.variant.name: [] for kernel in kernels}
    spread: dict[str, float] = {}

    for _ in range(rounds):
        for kernel, map_k, map_v in prepared:
            together = kernel.variant.heads
            groups, tiles = heads // together, batch * rows * together // KEYS
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for turn in range(LAUNCHES + 1):
                if turn == 1:
                    events[0].record()
                counter = counters.data_ptr() + 4 * PAUSED * launched
                launched += 1
                addresses = [ctypes.c_uint64(a) for a in (map_k.data_ptr(), map_v.data_ptr())]
                sizes = [ctypes.c_uint32(n) for n in (groups, tiles, rows * together // KEYS)]
                places = [ctypes.c_uint64(a) for a in (times.data_ptr(), counter, parts.data_ptr())]
                kernel.launch(kernel.blocks(groups, sms), *addresses, *sizes, *places)
            events[1].record()
            torch.cuda.synchronize()
            elapsed[kernel.variant.name].append(1e3 * events[0].elapsed_time(events[1]) / LAUNCHES)
            ended = times[: kernel.blocks(groups, sms), 1]
            spread[kernel.variant.name] = (ended.max() - ended.min()).item() / 1e3

    rows_of_case = []
    for kernel in kernels:
        us = statistics.median(elapsed[kernel.variant.name])
        figures = {
            "us": round(us, 2),
            "gb_per_s": round(4 * size / us / 1e3),
            "ends_apart_us": spread[kernel.variant.name],
        }
        rows_of_case.append({"case": case, **asdict(kernel.variant), **figures})
    return rows_of_case


def main(
    out: Annotated[Path, typer.Option(help="The result file.")] = RESULTS / "h100_cache_reads.json",
    rounds: Annotated[int, typer.Option(help="Rounds over all variants.")] = 5,
) -> None:
    """Measures every variant on every case, prints GB/s and how far apart blocks end, and writes the result file."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise typer.BadParameter("needs a GPU of compute capability 9.0 or later")
    device = torch.device("cuda", torch.cuda.current_device())
    # The pool first: PyTorch makes the device's context, without which the driver loads no kernel.
    pool = torch.zeros(2 * max(b * s * h for b, s, h in CASES.values()) * DIM, dtype=torch.bfloat16, device=device)
    kernels = [Kernel(variant) for variant in VARIANTS]
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows += measure(case, kernels, pool, rounds)
    for variant in VARIANTS:
        mine = [row for row in rows if row["name"] == variant.name]
        figures = "  ".join(f"{row['gb_per_s']:5d} ({row['ends_apart_us']:4.0f} us)" for row in mine)
        typer.echo(f"{variant.name:46s} {figures}")
    content = {**provenance(device), "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
