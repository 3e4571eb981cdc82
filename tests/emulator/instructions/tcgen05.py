"""The fifth-generation tensor core: TMEM allocation, loads and stores, MMA, commit (PTX ISA 9.7.16).

`tcgen05.mma` and `tcgen05.commit` of one warp run in order on that warp's pipe. `tcgen05.st` becomes visible at
`wait::st` at the latest; an `ld` reads at issue, but `hazards.py` reports who uses its registers before `wait::ld`,
which also tells the race check how long the read lasted.
"""

from __future__ import annotations

import re

import numpy as np

from ..errors import BarrierMisuse, EmulatorError, TensorMemoryError
from ..hazards import end_load
from ..layouts import InstructionDescriptor, SharedDescriptor, accumulator_lanes, tmem_cells
from ..ptx import Imm, Mem, Vec
from ..races import PENDING, TensorMemoryShadow
from . import handles, unsupported
from .control import unconverged
from .loadstore import _items
from .matrix import WORD, check_operand_bounds, decode_elements, operand_index
from .mbarrier import barrier_at, used_by_async_proxy
from .tma import _same_barrier


def _one_warp(frame):
    """SPLIT if the group holds several warps: these instructions act per warp."""
    from ..machine import SPLIT

    return SPLIT if frame.hi - frame.lo > 1 else None


@handles("tcgen05.alloc")
def allocate(i, program):
    """tcgen05.alloc (PTX ISA 9.7.16.7.1). Waits until the columns fit; with cta_group::2, until a warp of each CTA of
    the pair asks, and then allocates in both."""
    pair = i.has("cta_group::2")

    def execute(frame, mask):
        from ..machine import Blocked

        if split := _one_warp(frame):
            return split
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        cta, warp, tmem = frame.cta, frame.warps[0], frame.cta.tmem
        columns = frame.scalar(i.operands[1], mask, i.line)
        if columns not in (32, 64, 128, 256, 512):
            raise TensorMemoryError(f"line {i.line}: tcgen05.alloc of {columns} columns")
        if tmem.permit_relinquished:
            raise TensorMemoryError(f"line {i.line}: tcgen05.alloc after relinquish_alloc_permit")
        if pair and tmem.granted:
            start = tmem.granted.pop()
        else:
            other = frame.cluster.ctas[cta.rank ^ 1].tmem if pair else None
            if other is not None and other.requested is None:
                tmem.requested = columns
                frame.machine.dirty = True
                return Blocked(lambda _: bool(tmem.granted), f"tcgen05.alloc of {columns} columns: for the other CTA",
                               False)  # fmt: skip
            if other is not None and other.requested != columns:
                raise TensorMemoryError(f"line {i.line}: one CTA of a pair allocates {columns} columns, the other "
                                        f"{other.requested}")  # fmt: skip
            both = [tmem] if other is None else [tmem, other]
            if any(each.place(columns) is None for each in both):
                return Blocked(
                    lambda _: all(each.place(columns) is not None for each in both),
                    lambda: f"tcgen05.alloc of {columns} columns; allocated: {tmem.allocations}",
                    False,
                )
            start = tmem.allocate(columns)
            if other is not None:
                other.granted.append(other.allocate(columns))
                other.requested = None
                frame.machine.dirty = True
        address = frame.scalar(i.operands[0].items[0], mask, i.line)
        target, offset = frame.cluster.locate(address, 4, i.line)
        target.shared_views[4][offset // 4] = start
        if frame.machine.check_races:
            cells = target.shared_shadow.spans(np.array([[offset]]), 4).reshape(1, -1)
            slot = np.array([warp.id])
            target.shared_shadow.write(cells, slot, warp.clock[slot], warp.clock[None], i.line, "tcgen05.alloc", True)
        return None

    return execute


@handles("tcgen05.dealloc")
def deallocate(i, program):
    def execute(frame, mask):
        if split := _one_warp(frame):
            return split
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        start, columns = frame.scalar(i.operands[0], mask, i.line) & 0xFFFF, frame.scalar(i.operands[1], mask, i.line)
        frame.cta.tmem.release(start, columns, i.line)
        if frame.machine.check_races:  # whoever still works there races with it
            warp, shadow = frame.warps[0], frame.cta.tmem_shadow
            slot = np.array([warp.id])
            cells = shadow.cells(np.arange(0, 128, 16)[:, None], start + np.arange(columns))[None]
            shadow.write(cells, slot, warp.clock[slot], warp.clock[None], i.line, "tcgen05.dealloc", True)
        frame.machine.dirty = True

    return execute


@handles("tcgen05.relinquish_alloc_permit")
def relinquish(i, program):
    def execute(frame, mask):
        frame.cta.tmem.permit_relinquished = True

    return execute


class _TransferShape:
    """What a tcgen05.ld or st addresses: decoded once, checked per execution."""

    def __init__(self, i, registers: int) -> None:
        self.i, self.registers = i, registers
        self.shape = next((p for p in i.parts if re.fullmatch(r"\d+x\d+bx?2?", p)), None)
        if self.shape is None or any(p.startswith(("pack::", "unpack::", "red")) for p in i.parts):
            raise unsupported(i)

    def locate(self, frame, operand, split: int = 0):
        """Cells per warp: lists of (warp, lanes, columns), after bounds checks."""
        out = []
        for w, warp in enumerate(frame.warps):
            address = frame.lane_scalar(operand, 32 * w)
            quarter = 32 * (warp.index % 4)
            lane, column = address >> 16, address & 0xFFFF
            if lane // 32 * 32 not in (0, quarter):
                raise TensorMemoryError(
                    f"line {self.i.line}: warp {warp.index} reaches lanes "
                    f"{quarter}..{quarter + 31}, the address says {lane}"
                )
            if self.shape == "32x32b" and lane % 32:
                raise TensorMemoryError(f"line {self.i.line}: 32x32b from lane {lane}")
            if lane // 32 * 32 != quarter:
                frame.machine.note(
                    f"line {self.i.line}: TMEM address names lane {lane} for warp {warp.index}; its own quarter is used"
                )
            lanes, columns = self._cells(frame.machine, quarter + lane % 32, column, split)
            frame.cta.tmem.check(int(columns.min()), int(columns.max()), self.i.line, self.i.parts[1])
            out.append((warp, lanes, columns))
        return out

    def _cells(self, machine, lane: int, column: int, split: int):
        key = ("tmem", self.shape, self.registers, lane, column, split)
        if key not in machine.cache:
            machine.cache[key] = tmem_cells(self.shape, self.registers, lane, column, split)
        return machine.cache[key]


def _register_rows(operand) -> np.ndarray:
    return np.array([r.row for r in _items(operand)], np.intp)


@handles("tcgen05.ld")
def load(i, program):
    rows = _register_rows(i.operands[0])
    shape = _TransferShape(i, len(rows))
    split = i.operands[2].value if len(i.operands) > 2 else 0
    loaded = program.hazards.bits(_items(i.operands[0]))

    def execute(frame, mask):
        if answer := unconverged(i, frame, mask, None):
            return answer
        machine, cta = frame.machine, frame.cta
        for w, (warp, lanes, columns) in enumerate(shape.locate(frame, i.operands[1].items[0], split)):
            if warp.pending_tmem_stores:
                _flush_stores(warp)
            if machine.check_races:
                cells = TensorMemoryShadow.cells(lanes, columns).reshape(1, -1)
                slot = np.array([warp.id])
                stamp = warp.clock[slot] + PENDING
                cta.tmem_shadow.read(cells, slot, stamp, warp.clock[None], i.line, "tcgen05.ld")
                warp.marks.loading.append([loaded, cells])
            frame.W[rows, 32 * w : 32 * w + 32] = cta.tmem.cells[lanes, columns]
        return None

    return execute


def _flush_stores(warp) -> None:
    for lanes, columns, values in warp.pending_tmem_stores:
        warp.cta.tmem.cells[lanes, columns] = values
    warp.pending_tmem_stores.clear()


@handles("tcgen05.st")
def store(i, program):
    sources = i.operands[-1].items if isinstance(i.operands[-1], Vec) else (i.operands[-1],)
    shape = _TransferShape(i, len(sources))
    split = i.operands[1].value if len(i.operands) > 2 else 0

    def execute(frame, mask):
        if answer := unconverged(i, frame, mask, None):
            return answer
        machine, cta = frame.machine, frame.cta
        values = np.stack([frame.read(s) for s in sources])
        for w, (warp, lanes, columns) in enumerate(shape.locate(frame, i.operands[0].items[0], split)):
            if machine.check_races:
                slot = np.array([warp.id])
                cells = TensorMemoryShadow.cells(lanes, columns).reshape(1, -1)
                cta.tmem_shadow.write(
                    cells, slot, warp.clock[slot] + PENDING, warp.clock[None], i.line, "tcgen05.st", False
                )
            warp.pending_tmem_stores.append((lanes, columns, values[:, 32 * w : 32 * w + 32]))
            if machine.schedule.asynchrony == "eager":
                _flush_stores(warp)

    return execute


@handles("tcgen05.wait::st")
def wait_store(i, program):
    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        for warp, _ in frame.active(mask):
            _flush_stores(warp)
            if frame.machine.check_races:
                shadow = frame.cta.tmem_shadow
                shadow.write_clock[(shadow.writer == warp.id) & (shadow.write_clock >= PENDING)] = warp.clock[warp.id]
                shadow.last_write[warp.id] = warp.clock[warp.id]

    return execute


@handles("tcgen05.wait::ld")
def wait_load(i, program):
    """Ends the warp's loads: their registers may be used, and what comes after is behind their reads."""

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        for warp in frame.warps:
            for each in list(warp.marks.loading):
                end_load(warp, each)
        return None

    return execute


# MMA ---------------------------------------------------------------------------------------------------------------

_KINDS = {"f16": (2, {0: "f16", 1: "bf16"}), "tf32": (4, {2: "tf32"}), "f8f6f4": (1, {0: "e4m3", 1: "e5m2"})}


@handles("tcgen05.mma")
def mma(i, program):
    """tcgen05.mma, dense, one CTA or a pair, A in shared memory or TMEM (PTX ISA 9.7.16.10.9)."""
    kind = next((p[6:] for p in i.parts if p.startswith("kind::")), "")
    if kind not in _KINDS or any(p in ("ws", "sp") or "block_scale" in p or "block" in p for p in i.parts):
        raise unsupported(i)
    size, formats = _KINDS[kind]
    depth = 32 // size
    pair = "cta_group::2" in i.parts
    a_in_tmem = isinstance(i.operands[1], Mem)
    rest = list(i.operands[4:])
    disable = rest.pop(0) if rest and isinstance(rest[0], Vec) else None
    enable = rest.pop(0) if rest else Imm(1)
    input_scale = rest.pop(0) if rest else None

    def execute(frame, mask):
        lanes_active = frame.active_lanes(mask)
        if len(lanes_active) != 1:
            if frame.hi - frame.lo > 1:
                return _one_warp(frame)
            raise EmulatorError(
                f"line {i.line}: tcgen05.mma issued by {len(lanes_active)} lanes, it would run that often"
            )
        lane = lanes_active[0]
        machine, cta, warp = frame.machine, frame.cta, frame.lane_warp(lane)
        instruction = InstructionDescriptor.decode(frame.lane_scalar(i.operands[3], lane), i.line)
        m, n = instruction.m, instruction.n
        if instruction.d_format != 1 and not (instruction.d_format == 0 and kind != "tf32"):
            raise unsupported(i)
        if instruction.d_format == 0:
            raise unsupported(i)
        if instruction.a_format not in formats or instruction.b_format not in formats:
            raise unsupported(i)
        if m not in ((128, 256) if pair else (64, 128)) or not 8 <= n <= 256 or n % (16 if m == 128 else 8):
            raise EmulatorError(f"line {i.line}: tcgen05.mma of shape {m}x{n}")
        a_type, b_type = formats[instruction.a_format], formats[instruction.b_format]
        address = frame.lane_scalar(i.operands[0].items[0], lane)
        d_lane, d_column = address >> 16, address & 0xFFFF
        ctas = [cta]
        if pair:
            if cta.rank & 1:
                raise EmulatorError(f"line {i.line}: cta_group::2 issued by the odd CTA of the pair")
            ctas = [cta, frame.cluster.ctas[cta.rank ^ 1]]
        rows, b_rows = (m // 2, n // 2) if pair else (m, n)
        halves = pair and m == 128
        lanes = accumulator_lanes(m, pair, d_lane)
        if d_lane and rows != 64:
            raise TensorMemoryError(f"line {i.line}: accumulator at lane {d_lane}")
        width = n // 2 if halves else n
        for each in ctas:
            each.tmem.check(d_column, d_column + width - 1, i.line, "tcgen05.mma")
        b = SharedDescriptor.decode_sm100(frame.lane_scalar(i.operands[2], lane), i.line)
        b_index, b_cells = operand_index(machine, b, b_rows, depth, size, instruction.b_mn_major)
        check_operand_bounds(machine, b_index, size, i.line)
        a_index = a_cells = None
        a_column = a_columns = 0
        if a_in_tmem:
            if instruction.a_mn_major:
                raise EmulatorError(f"line {i.line}: A in TMEM must be K-major")
            a_column = frame.lane_scalar(i.operands[1].items[0], lane) & 0xFFFF
            a_columns = depth * size // 4
            for each in ctas:
                each.tmem.check(a_column, a_column + a_columns - 1, i.line, "tcgen05.mma A")
        else:
            a = SharedDescriptor.decode_sm100(frame.lane_scalar(i.operands[1], lane), i.line)
            a_index, a_cells = operand_index(machine, a, rows, depth, size, instruction.a_mn_major)
            check_operand_bounds(machine, a_index, size, i.line)
        accumulate = bool(frame.lane_scalar(enable, lane))
        scale = 2.0 ** -frame.lane_scalar(input_scale, lane) if input_scale is not None else 1.0
        keep = None
        if disable is not None:
            words = [frame.lane_scalar(x, lane) for x in disable.items]
            bits = np.array([words[j // 32] >> (j % 32) & 1 for j in range(32 * len(words))], bool)
            keep = bits if bits.any() else None
            if keep is not None and (halves or pair):
                raise unsupported(i)

        slot = frame.cluster.actors.pipe(warp.id)
        warp.pipe_stamp += 1
        np.maximum(warp.pipe_clock, warp.clock, out=warp.pipe_clock)
        warp.pipe_clock[slot] = warp.pipe_stamp
        if machine.check_races:
            _record(i, ctas, warp, slot, lanes if not halves else np.arange(128), d_column, width, accumulate, a_cells,
                    (lanes, a_column, a_columns) if a_in_tmem else None, b_cells)  # fmt: skip
        warp.tick()

        def run():
            right = [decode_elements(c.shared_views[size][b_index], b_type) for c in ctas]
            right = np.concatenate(right) if pair else right[0]
            if instruction.negate_a != instruction.negate_b:
                right = -right
            for each in ctas:
                if a_in_tmem:
                    words = np.ascontiguousarray(each.tmem.cells[lanes, a_column : a_column + a_columns])
                    left = decode_elements(words.view(WORD[size]), a_type)
                else:
                    left = decode_elements(each.shared_views[size][a_index], a_type)
                product = left @ right.T
                target = lanes
                if halves:
                    product = np.concatenate((product[:, :width], product[:, width:]))
                    target = np.arange(128)
                accumulators = each.tmem.cells.view(np.float32)
                part = accumulators[:, d_column : d_column + width]
                old = part if len(target) == 128 else part[target]
                if accumulate:
                    product += old * np.float32(scale) if scale != 1.0 else old
                if keep is not None:
                    product = np.where(keep[target][:, None], old, product)
                if len(target) == 128:
                    part[...] = product
                else:
                    part[target] = product
            machine.count("MMAs")

        warp.pipe.append(run)

    return execute


def _record(i, ctas, warp, slot: int, d_lanes, d_column, width, accumulate, a_cells, a_tmem, b_cells) -> None:
    """Race bookkeeping of one MMA: it reads operands through the async proxy and owns its accumulator from issue on."""
    one, stamp, seen = np.array([slot]), np.array([warp.pipe_stamp]), warp.pipe_clock[None]
    proxy = warp.async_clock[None]
    d_cells = (np.unique(d_lanes // 16)[:, None] * 512 + d_column + np.arange(width)).reshape(1, -1)
    for cta in ctas:
        cta.shared_shadow.read(b_cells, one, stamp, seen, i.line, "tcgen05.mma B", proxy)
        if a_tmem is None:
            cta.shared_shadow.read(a_cells, one, stamp, seen, i.line, "tcgen05.mma A", proxy)
        else:
            lanes, column, columns = a_tmem
            cells = (np.unique(lanes // 16)[:, None] * 512 + column + np.arange(columns)).reshape(1, -1)
            cta.tmem_shadow.read(cells, one, stamp, seen, i.line, "tcgen05.mma A in TMEM")
        if accumulate:
            cta.tmem_shadow.read(d_cells, one, stamp, seen, i.line, "tcgen05.mma accumulator")
        cta.tmem_shadow.write(d_cells, one, stamp, seen, i.line, "tcgen05.mma accumulator", False)


@handles("tcgen05.commit")
def commit(i, program):
    """tcgen05.commit: arrives on mbarriers once the warp's earlier MMAs are done (PTX ISA 9.7.16.11)."""
    multicast = i.operands[1] if i.has("multicast::cluster") else None

    def execute(frame, mask):
        machine = frame.machine
        for lane in frame.active_lanes(mask):
            warp = frame.lane_warp(lane)
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[0].items[0], lane), i.line)
            barriers = [barrier]
            if multicast is not None:
                ranks = frame.lane_scalar(multicast, lane)
                barriers = [_same_barrier(c, barrier, i.line) for c in frame.cluster.ctas if ranks >> c.rank & 1]
            for each in barriers:
                used_by_async_proxy(frame, each, i.line)
            generic = np.maximum(warp.pipe_clock, warp.clock)
            proxy = warp.async_clock.copy()
            warp.tick()

            def run(barriers=barriers, generic=generic, proxy=proxy):
                for each in barriers:
                    if each.pending < 1:
                        raise BarrierMisuse(f"line {i.line}: commit arrives on {each.state()}, nothing is pending")
                    each.arrive(1, generic, proxy, i.line)
                machine.dirty = True

            warp.pipe.append(run)

    return execute
