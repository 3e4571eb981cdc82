"""A kernel made executable: compiled runs, branches, and instructions with handlers.

A node is what the machine executes in one go. Straight-line register code between labels, branches and handled
instructions becomes one `Run` node; the rest is a node each.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import instructions
from .errors import Unsupported
from .hazards import Access, RegisterHazards
from .lowering import NotSimple, lower
from .ptx import BANKS, TYPE_BYTES, Instruction, Kernel, Label
from .runs import Run

RUN, BRANCH, HANDLED, UNSUPPORTED = range(4)

MAX_RUN = 2000
"""Longest run in instructions: bounds the generated function, not the meaning."""


@dataclass
class Node:
    kind: int
    pc: int
    next_pc: int
    instruction: Instruction
    run: Run | None = None
    target: int = -1
    execute: object = None
    problem: str = ""
    access: Access | None = None


class Program:
    """Executable form of a `Kernel`. Building one decodes every instruction, so unsupported ones are known up front
    (`unsupported`); executing one raises `Unsupported`."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.nodes: list[Node | None] = [None] * len(kernel.instructions)
        self.joins = bytearray(len(kernel.instructions) + 1)
        self.hazards = RegisterHazards.of(kernel)
        self.shared_cell = _smallest_access(kernel, {"global", "param", "local", "const"})
        self.global_cell = _smallest_access(kernel, {"shared", "param", "local", "const"})
        self.banks = {bank: max(kernel.register_counts[bank], 1) for bank in BANKS}
        self._build()

    def _build(self) -> None:
        code = self.kernel.instructions
        for instruction in code:
            if instruction.operands and isinstance(instruction.operands[0], Label):
                self.joins[instruction.operands[0].target] = 1
        pending: list = []
        first = 0

        def close(pc: int) -> None:
            if pending:
                self.nodes[first] = Node(RUN, first, pc, code[first], run=Run(list(pending), code[first].line))
                pending.clear()

        for pc, instruction in enumerate(code):
            if self.joins[pc] or pc - first >= MAX_RUN:
                close(pc)
            if instruction.parts[0] == "bra":
                close(pc)
                self.nodes[pc] = Node(BRANCH, pc, pc + 1, instruction, target=instruction.operands[0].target)
                continue
            try:
                ops = lower(instruction)
            except NotSimple:
                close(pc)
                self.nodes[pc] = self._handled(pc, instruction)
                self.joins[pc + 1] = 1
                continue
            except Unsupported as problem:
                close(pc)
                self.nodes[pc] = Node(UNSUPPORTED, pc, pc + 1, instruction, problem=str(problem))
                continue
            if not pending:
                first = pc
            pending.extend(ops)
        close(len(code))

    def _handled(self, pc: int, instruction: Instruction) -> Node:
        try:
            execute = instructions.decode(instruction, self)
        except Unsupported as problem:
            return Node(UNSUPPORTED, pc, pc + 1, instruction, problem=str(problem))
        return Node(HANDLED, pc, pc + 1, instruction, execute=execute)

    @property
    def unsupported(self) -> list[str]:
        """One message, with its line, for each instruction that the emulator does not model."""
        return [n.problem for n in self.nodes if n is not None and n.kind == UNSUPPORTED]

    def not_executed(self, executed: bytearray) -> list[Instruction]:
        """Coverage: memory and synchronisation instructions that never ran."""
        return [n.instruction for n in self.nodes if n is not None and n.kind == HANDLED and not executed[n.pc]]


def _smallest_access(kernel: Kernel, other_spaces: set[str]) -> int:
    """Bytes of a race-check cell: 4, or less if the kernel accesses halves or bytes that neighbours may share."""
    smallest = 4
    for i in kernel.instructions:
        if i.parts[0] in ("ld", "st", "atom", "red") and not other_spaces & {part.split("::")[0] for part in i.parts}:
            smallest = min(smallest, TYPE_BYTES.get(i.type, 4))
    return smallest
