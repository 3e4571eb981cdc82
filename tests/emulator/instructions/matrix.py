"""mma.sync and wgmma: matrix multiply on register fragments and shared-memory descriptors (PTX ISA 9.7.14, 9.7.15).

Products are exact in float32 and sums are float32; the order of a GPU's sums is unspecified, so results agree with
hardware up to accumulation order.
"""

from __future__ import annotations

import re

import numpy as np

from ..lanes import FP8_VALUE, bf16_value
from ..layouts import SharedDescriptor, fragment_a, fragment_b, fragment_c
from ..ptx import Imm, NotReg, Reg, Vec
from . import handles, unsupported
from .control import unconverged
from .loadstore import AsyncCopy, wait_for_groups

ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def decode_elements(bits: np.ndarray, ty: str) -> np.ndarray:
    """float32 values of matrix elements given as unsigned words of their width."""
    if ty == "bf16":
        return bf16_value(bits)
    if ty == "f16":
        return bits.view(np.float16).astype(np.float32)
    if ty == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return FP8_VALUE[ty][bits]


def _fragment(words: np.ndarray, ty: str) -> np.ndarray:
    """(registers, warps * 32) words to decoded elements (warps, registers, 32, elements a register)."""
    size = ELEMENT_BYTES[ty]
    elements = np.ascontiguousarray(words).view(WORD[size]).reshape(len(words), -1, 32, 4 // size)
    return decode_elements(elements, ty).transpose(1, 0, 2, 3)


def _rows(operand) -> np.ndarray:
    return np.array([r.row for r in operand.items], np.intp)


def read_accumulator(words: np.ndarray, ty: str, n: int) -> np.ndarray:
    """Accumulator registers (registers, warps * 32) to matrices (warps, 16, n)."""
    row, column = fragment_c(n)
    out = np.empty((words.shape[1] // 32, 16, n), np.float32)
    if ty == "f32":
        values = np.ascontiguousarray(words).view(np.float32).reshape(len(words), -1, 32).transpose(1, 0, 2)
    else:  # f16: a register holds two neighbouring columns
        halves = np.ascontiguousarray(words).view(np.float16).reshape(len(words), -1, 32, 2)
        values = halves.transpose(1, 0, 3, 2).reshape(-1, 2 * len(words), 32).astype(np.float32)
    out[:, row, column] = values
    return out


def write_accumulator(matrices: np.ndarray, ty: str) -> np.ndarray:
    """The inverse of `read_accumulator`: (warps, 16, n) to register words (registers, warps * 32)."""
    row, column = fragment_c(matrices.shape[2])
    values = matrices[:, row, column]
    if ty == "f32":
        words = values.astype(np.float32).view(np.uint32)
    else:
        pairs = values.astype(np.float16).reshape(len(values), -1, 2, 32).transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(pairs).view(np.uint32)[..., 0]
    return words.transpose(1, 0, 2).reshape(words.shape[1], -1)


@handles("mma.sync")
def mma_sync(i, program):
    """mma.sync m16n8kK on bf16, f16, tf32 and fp8 (PTX ISA 9.7.14.5.14)."""
    match = re.search(r"\.m16n8k(\d+)\.row\.col\.(f32|f16)\.(\w+)\.(\w+)\.(f32|f16)$", i.op)
    if not match or match[3] not in ELEMENT_BYTES or match[4] not in ELEMENT_BYTES or match[2] != match[5]:
        raise unsupported(i)
    if any("block_scale" in p or p.startswith("sp") for p in i.parts):
        raise unsupported(i)
    k, accumulator, a_type, b_type = int(match[1]), match[2], match[3], match[4]
    d, a, b, c = (_rows(x) if all(not isinstance(r, Imm) for r in x.items) else None for x in i.operands)
    a_at, b_at = fragment_a(k, ELEMENT_BYTES[a_type]), fragment_b(k, ELEMENT_BYTES[b_type])

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        warps = frame.hi - frame.lo
        left = np.zeros((warps, 16, k), np.float32)
        left[:, a_at[0], a_at[1]] = _fragment(frame.W[a], a_type)
        right = np.zeros((warps, k, 8), np.float32)
        right[:, b_at[0], b_at[1]] = _fragment(frame.W[b], b_type)
        result = left @ right
        if c is not None:
            result += read_accumulator(frame.W[c], accumulator, 8)
        frame.W[d] = write_accumulator(result, accumulator)

    return execute


# wgmma -------------------------------------------------------------------------------------------------------------


def element_cells(cell_bytes: int, offsets: np.ndarray, size: int) -> np.ndarray:
    """Race cells, shape (1, n), of elements of `size` bytes at byte `offsets`."""
    parts = range(0, size, min(size, cell_bytes))
    return np.unique([(offsets + part) // cell_bytes for part in parts]).reshape(1, -1)


def operand_index(machine, descriptor: SharedDescriptor, rows: int, depth: int, size: int, mn_major: bool):
    """(element indices (rows, depth), race cells) of an operand in shared memory; cached per machine."""
    key = (descriptor, rows, depth, size, mn_major)
    found = machine.cache.get(key)
    if found is None:
        offsets = descriptor.offsets(rows, depth, size, mn_major)
        found = machine.cache[key] = (offsets // size, element_cells(machine.program.shared_cell, offsets, size))
    return found


def check_operand_bounds(machine, index: np.ndarray, size: int, line: int) -> None:
    from ..errors import OutOfBounds

    if (int(index.max()) + 1) * size > machine.shared_bytes:
        raise OutOfBounds(f"line {line}: a matrix descriptor reaches byte {(int(index.max()) + 1) * size} of "
                          f"{machine.shared_bytes} bytes of shared memory")  # fmt: skip


@handles("wgmma.mma_async")
def wgmma(i, program):
    """wgmma.mma_async m64nNkK, A from registers or shared memory (PTX ISA 9.7.15.5).

    Warp w of a warpgroup owns rows 16w to 16w+15. Operations run in order on the warpgroup's pipe, later.
    """
    match = re.search(r"\.m64n(\d+)k(\d+)\.(f32|f16)\.(\w+)\.(\w+)$", i.op)
    if not match or match[4] not in ELEMENT_BYTES or match[5] not in ELEMENT_BYTES or ".sp" in i.op:
        raise unsupported(i)
    n, k, accumulator, a_type, b_type = int(match[1]), int(match[2]), match[3], match[4], match[5]
    size = ELEMENT_BYTES[a_type]
    d = _rows(i.operands[0])
    from_registers = isinstance(i.operands[1], Vec)
    a_rows = _rows(i.operands[1]) if from_registers else None
    scale_d = i.operands[3] if len(i.operands) > 3 else Imm(1)
    flags = [x.value for x in i.operands[4:]]
    negate_a, negate_b = (flag == -1 for flag in [*flags, 1, 1][:2])
    if from_registers:
        a_mn, b_mn = False, bool(flags[2]) if len(flags) > 2 else False
    else:
        a_mn, b_mn = (bool(flags[2]), bool(flags[3])) if len(flags) > 3 else (False, False)
    a_at = fragment_a(k, size) if from_registers else None
    accumulators, fragments = program.hazards.wgmma_registers(i)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        cta = frame.cta
        for first, last in _alike(frame):
            _issue_wgmma(frame.machine, cta, cta.frame(first, last))
        return None

    uniform = [x for x in i.operands[1:4] if isinstance(x, (Reg, NotReg))]

    def _alike(frame):
        """Ranges of warps of one warpgroup that agree on descriptors and scale-d: one may be an iteration ahead."""
        values = np.stack([frame.read(x, np.uint64)[::32] for x in uniform])
        starts = [w for w in range(frame.hi - frame.lo)
                  if w == 0 or (frame.lo + w) % 4 == 0 or (values[:, w] != values[:, w - 1]).any()]  # fmt: skip
        return zip((frame.lo + w for w in starts), [*(frame.lo + w for w in starts[1:]), frame.hi])

    def _quarter_cells(machine, a, quarter):
        """Race cells of the 16 rows of A that one warp reads: kernels rely on a warp's own rows being its own."""
        key = ("wgmma A", a, k, size, a_mn, quarter)
        if key not in machine.cache:
            whole, _ = operand_index(machine, a, 64, k, size, a_mn)
            rows = whole[16 * quarter : 16 * quarter + 16]
            machine.cache[key] = element_cells(machine.program.shared_cell, rows * size, size)
        return machine.cache[key]

    def _issue_wgmma(machine, cta, part):
        b = SharedDescriptor.decode_sm90(part.scalar(i.operands[2], None, i.line), i.line)
        b_index, b_cells = operand_index(machine, b, n, k, size, b_mn)
        check_operand_bounds(machine, b_index, size, i.line)
        if not from_registers:
            a = SharedDescriptor.decode_sm90(part.scalar(i.operands[1], None, i.line), i.line)
            quarter = [16 * (w.index % 4) for w in part.warps]
            whole, _ = operand_index(machine, a, 64, k, size, a_mn)
            a_index = whole[quarter[0] : quarter[-1] + 16]
            check_operand_bounds(machine, a_index, size, i.line)
        accumulate = bool(scale_d.value) if isinstance(scale_d, Imm) else bool(part.read(scale_d)[0])
        op = AsyncCopy(0)
        if machine.hazards is not None:
            for warp in part.warps:
                machine.hazards.multiply(warp, i, op, accumulators, fragments, machine.races)
        for warp in part.warps:
            slot = part.cluster.actors.pipe(warp.id)
            warp.pipe_stamp += 1
            np.maximum(warp.pipe_clock, warp.clock, out=warp.pipe_clock)
            warp.pipe_clock[slot] = warp.pipe_stamp
            if machine.check_races:
                one, stamp = np.array([slot]), np.array([warp.pipe_stamp])
                operands = [("wgmma B", b_cells)]
                if not from_registers:
                    operands.append(("wgmma A", _quarter_cells(machine, a, warp.index % 4)))
                for what, cells in operands:
                    cta.shared_shadow.read(
                        cells, one, stamp, warp.pipe_clock[None], i.line, what, warp.async_clock[None]
                    )
            warp.tick()
            warp.wgmma.open.append(op)
        op.stamp = max(w.pipe_stamp for w in part.warps)

        def run():
            memory = cta.shared_views[size]
            right = decode_elements(memory[b_index], b_type)
            warps = part.hi - part.lo
            if from_registers:
                left = np.empty((warps, 16, k), np.float32)
                left[:, a_at[0], a_at[1]] = _fragment(part.W[a_rows], a_type)
                left = left.reshape(-1, k)
            else:
                left = decode_elements(memory[a_index], a_type)
            # In float64, for bits of a float32 product depend on how many warps are joined here.
            product = np.matmul(left, -right.T if negate_a != negate_b else right.T, dtype=np.float64)
            product = product.astype(np.float32).reshape(warps, 16, n)
            if accumulate:
                product += read_accumulator(part.W[d], accumulator, n)
            part.W[d] = write_accumulator(product, accumulator)
            op.read = op.done = True
            machine.dirty = True
            machine.count("MMAs")

        cta.wgmma_pipes[part.lo // 4].append(run)

    return execute


@handles("wgmma.fence")
def wgmma_fence(i, program):
    """wgmma.fence: what the warp did to registers so far is ordered before its next wgmma (PTX ISA 9.7.15.7.1)."""

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        for warp in frame.warps:
            warp.marks.unfenced, warp.marks.fenced = 0, True
        return None

    return execute


@handles("wgmma.commit_group")
def wgmma_commit(i, program):
    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        for warp, _ in frame.active(mask):
            warp.wgmma.commit()
        return None

    return execute


@handles("wgmma.wait_group")
def wgmma_wait(i, program):
    pending = i.operands[0].value

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        slot_of = frame.cluster.actors.pipe
        return wait_for_groups(i, frame, mask, lambda w: w.wgmma, pending, "done", lambda w: [slot_of(w.id)],
                               "wgmma.wait_group", lambda w: w.marks.waited())  # fmt: skip

    return execute
