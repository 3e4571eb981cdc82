"""Generated faults: every synchronisation instruction of a kernel, broken one way at a time, and data-path faults.

A fault is applied to the parsed instruction list, so it needs no text editing and no list kept by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .lowering import NotSimple, lower
from .program import Program
from .ptx import FloatImm, Imm, Instruction, Kernel, Label, Mem, Reg, Sum, registers

SYNCHRONISATION = (
    "mbarrier.",
    "bar.",
    "barrier.",
    "fence.",
    "tcgen05.commit",
    "tcgen05.wait",
    "cp.async.bulk.commit_group",
    "cp.async.bulk.wait_group",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
)
"""Prefixes of the instructions that are broken. `tcgen05.fence` is left out: its absence is no verdict
(docs/emulator.md)."""

MINUS_INFINITY = 0xFF800000


@dataclass(frozen=True)
class Fault:
    """One mutation of the instruction at index `at`."""

    kind: str
    at: int
    line: int
    text: str
    apply: Callable[[Kernel], None]

    def __str__(self) -> str:
        return f"{self.kind} at line {self.line}: {self.text[:90]}"


def program_with(kernel: Kernel, fault: Fault) -> Program:
    """The kernel with one fault, executable."""
    broken = copy.copy(kernel)
    broken.instructions = [copy.copy(i) for i in kernel.instructions]
    broken.register_counts = dict(kernel.register_counts)
    fault.apply(broken)
    return Program(broken)


def synchronisation_faults(kernel: Kernel) -> Iterator[Fault]:
    """delete, flip parity, count +-1, tx +-16 and swap with the neighbour, wherever each makes sense."""
    for at, i in enumerate(kernel.instructions):
        if not i.op.startswith(SYNCHRONISATION) or i.op.startswith("mbarrier.inval"):
            continue
        yield Fault("delete", at, i.line, i.text, lambda k, at=at: _delete(k, at))
        if "wait.parity" in i.op:
            yield Fault("flip parity", at, i.line, i.text, lambda k, at=at: _alter(k, at, 2, "xor.b32", 1))
        if i.op.startswith("mbarrier.init"):
            for step in (1, -1):
                if not (isinstance(i.operands[1], Imm) and i.operands[1].value + step < 1):
                    yield Fault(f"count {step:+}", at, i.line, i.text,
                                lambda k, at=at, step=step: _alter(k, at, 1, "add.s32", step))  # fmt: skip
        if i.op.startswith(("bar.", "barrier.")) and len(i.operands) == 2 and "warp" not in i.op:
            for step in (32, -32):
                yield Fault(f"threads {step:+}", at, i.line, i.text,
                            lambda k, at=at, step=step: _alter(k, at, 1, "add.s32", step))  # fmt: skip
        if "expect_tx" in i.op:
            for step in (16, -16):
                position = len(i.operands) - 1
                yield Fault(f"tx {step:+}", at, i.line, i.text,
                            lambda k, at=at, n=position, step=step: _alter(k, at, n, "add.s32", step))  # fmt: skip
        neighbour = _neighbour(kernel, at)
        if neighbour is not None:
            yield Fault("swap", at, i.line, f"{i.text[:60]} <-> {kernel.instructions[neighbour].text[:60]}",
                        lambda k, a=at, b=neighbour: _swap(k, a, b))  # fmt: skip


def idle(fault: Fault, result) -> bool:
    """Whether the unbroken run (`result`) shows that nothing depends on the broken instruction.

    That is a wait that only ever found a fresh barrier (the first pass of a ring) or that only the warp's end follows
    (a producer's tail), and an operation on phases of barriers that nobody waits for (the release of the last stage, a
    stage that this configuration does not use).
    """
    if not fault.text.startswith(("mbarrier.", "tcgen05.commit")) or fault.kind == "swap":
        return False
    if "wait.parity" in fault.text:
        return fault.line not in result.real_waits or fault.line not in result.consequential
    awaited = set().union(*result.real_waits.values())
    used = result.barrier_uses.get(fault.line, set())
    if fault.text.startswith("mbarrier.init"):
        return not {offset for offset, _ in used} & {offset for offset, _ in awaited}
    return not used & awaited


def data_path_faults(kernel: Kernel) -> Iterator[Fault]:
    """Descriptors off by 32 bytes, TMEM columns off by one."""
    for at, i in enumerate(kernel.instructions):
        if i.op.startswith("tcgen05.mma.") or i.op.startswith("wgmma.mma_async"):
            for position in (1, 2):
                if isinstance(i.operands[position], Reg):
                    yield Fault(f"descriptor {position} +32 bytes", at, i.line, i.text,
                                lambda k, at=at, n=position: _alter(k, at, n, "add.s64", 2))  # fmt: skip
        if i.op.startswith(("tcgen05.ld", "tcgen05.st")):
            position = 1 if i.op.startswith("tcgen05.ld") else 0
            yield Fault("column +1", at, i.line, i.text, lambda k, at=at, n=position: _shift_address(k, at, n))


def mask_faults(kernel: Kernel) -> Iterator[Fault]:
    """Masks turned round: a choice between a score and minus infinity takes the other one."""
    for at, i in enumerate(kernel.instructions):
        if i.op.startswith("selp.") and any(isinstance(x, FloatImm) and x.bits == MINUS_INFINITY for x in i.operands):
            yield Fault("mask inverted", at, i.line, i.text, lambda k, at=at: _exchange_sources(k, at))


def reached(fault: Fault, result) -> bool:
    """Whether the unbroken run (`result`) executed the instruction."""
    nodes = result.program.nodes
    return bool(result.executed[next(pc for pc in range(fault.at, -1, -1) if nodes[pc] is not None)])


def _exchange_sources(kernel: Kernel, at: int) -> None:
    i = kernel.instructions[at]
    i.operands = [i.operands[0], i.operands[2], i.operands[1], *i.operands[3:]]


def _delete(kernel: Kernel, at: int) -> None:
    old = kernel.instructions[at]
    if "_wait.parity" in old.op:  # the wait succeeds at once
        kernel.instructions[at] = Instruction(
            "setp.eq.u32", [old.operands[0], Imm(0), Imm(0)], old.line, old.text, old.guard, old.guard_negated
        )
    else:
        kernel.instructions[at] = Instruction("nanosleep.u32", [Imm(0)], old.line, old.text)


def _insert(kernel: Kernel, at: int, new: Instruction) -> None:
    """Puts an instruction before index `at`; branches to `at` execute it too."""
    for i in kernel.instructions:
        if i.operands and isinstance(i.operands[0], Label) and i.operands[0].target > at:
            i.operands = [Label(i.operands[0].target + 1)]
    kernel.instructions.insert(at, new)


def _new_register(kernel: Kernel, bank: int) -> Reg:
    row = kernel.register_counts[bank]
    kernel.register_counts[bank] += 1
    return Reg(bank, row)


def _alter(kernel: Kernel, at: int, position: int, op: str, constant: int) -> None:
    """Replaces an operand by `op operand, constant`."""
    i = kernel.instructions[at]
    operand = i.operands[position]
    operands = list(i.operands)
    if isinstance(operand, Imm):
        operands[position] = Imm(operand.value ^ constant if op.startswith("xor") else operand.value + constant)
    else:
        register = _new_register(kernel, operand.bank)
        operands[position] = register
        _insert(kernel, at, Instruction(op, [register, operand, Imm(constant)], i.line, f"fault before: {i.text}"))
    i.operands = operands


def _shift_address(kernel: Kernel, at: int, position: int) -> None:
    i = kernel.instructions[at]
    (place,) = i.operands[position].items
    moved = Sum(place.base, place.offset + 1) if isinstance(place, Sum) else Sum(place, 1)
    i.operands = [*i.operands[:position], Mem((moved,)), *i.operands[position + 1 :]]


def _swap(kernel: Kernel, a: int, b: int) -> None:
    code = kernel.instructions
    code[a], code[b] = code[b], code[a]


def _touched(i: Instruction) -> set:
    return set().union({i.guard} - {None}, *map(registers, i.operands))


def _is_simple(i: Instruction) -> bool:
    try:
        lower(i)
    except NotSimple:
        return i.parts[0] == "bra"
    return True


def _neighbour(kernel: Kernel, at: int) -> int | None:
    """The next memory or synchronisation instruction in the same straight line, if the two may be exchanged: what lies
    between computes nothing that either needs, and they share no register that one writes."""
    targets = {i.operands[0].target for i in kernel.instructions if i.operands and isinstance(i.operands[0], Label)}
    first = kernel.instructions[at]
    written_between: set = set()
    for n in range(at + 1, min(at + 40, len(kernel.instructions))):
        i = kernel.instructions[n]
        if n in targets or i.parts[0] in ("bra", "ret", "exit"):
            return None
        if not _is_simple(i):
            fixed = (_touched(first) | _touched(i)) & written_between
            destinations = set(registers(first.operands[0])) if "wait.parity" in first.op else set()
            if any(first.op.startswith(p) and i.op.startswith(p) for p in ("mbarrier.init", "mbarrier.arrive")):
                return None  # two of a kind by one thread, nothing between: their order is free
            if fixed or destinations & _touched(i) or i.parts[0] in ("ld", "elect", "shfl", "vote"):
                return None
            return n
        written_between |= set(registers(i.operands[0])) if i.operands else set()
    return None
