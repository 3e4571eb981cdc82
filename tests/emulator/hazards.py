"""Registers that asynchronous instructions still own.

`tcgen05.ld` fills registers at some time before `tcgen05.wait::ld`; `wgmma.mma_async` reads its A fragments and updates
its accumulators at some time before `wgmma.wait_group`, and sees what ordinary instructions did to those registers only
if `wgmma.fence` stands between (PTX ISA 9.7.16.8, 9.7.15.6-7). Whether a forgotten one gives a wrong value is a matter
of timing, so this module looks at the order alone: it follows, warp by warp, which registers are being loaded, in
flight, or not yet fenced, and reports the instruction that breaks the rule.

A set of registers is a Python integer, one bit a register. A `mov`, also one that packs or unpacks, only renames:
compilers place them on either side of a wait or fence, and the mark moves along with the content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .ptx import BANKS, Instruction, Kernel, Reg, Vec, destinations, registers, sources

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Node
    from .races import RaceLog

EARLY_LOAD = "register used before tcgen05.wait::ld"
"""A note unless a launch asks for it with `tolerate=()`: the published SM100 kernels, known to be good, never wait. The
assembler waits where a loaded register is needed, which ends the load here, too."""
EARLY_MMA = "register used before wgmma.wait_group"
UNFENCED = "missing wgmma.fence"

MADE = 1
"""Bit 0 of a set: content that the node itself computed. Registers have the bits from 1 on."""


@dataclass
class Access:
    """What one node does to registers.

    used: whose content at the node's start something other than a move reads. touched: read or written by anything.
    written: with other content, or a renamed one, at the end. made: holding what the node computed. renamed: (register,
    registers whose content at the start it holds at the end).
    """

    used: int = 0
    touched: int = 0
    written: int = 0
    made: int = 0
    renamed: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Marks:
    """The marks on one warp's registers.

    loading: the tcgen05.ld that were not waited for, as [registers, TMEM cells for the race check]. flight: wgmma
    operations that were not waited for, as (operation, accumulators, A registers); accumulators and fragments: their
    unions. unfenced: registers that ordinary instructions used since the last wgmma.fence, if there was one (fenced).
    """

    loading: list[list] = field(default_factory=list)
    flight: list[tuple] = field(default_factory=list)
    accumulators: int = 0
    fragments: int = 0
    unfenced: int = 0
    fenced: bool = False

    def issue(self, op, accumulators: int, fragments: int) -> None:
        self.flight.append((op, accumulators, fragments))
        self.accumulators |= accumulators
        self.fragments |= fragments

    def waited(self) -> None:
        """Drops the operations that a wait_group has covered."""
        self.flight = [each for each in self.flight if not each[0].waited]
        self.accumulators = self.fragments = 0
        for _, accumulators, fragments in self.flight:
            self.accumulators |= accumulators
            self.fragments |= fragments


def end_load(warp, load: list) -> None:
    """A tcgen05.ld is over: what its warp does next is behind its read of TMEM."""
    warp.marks.loading.remove(load)
    warp.cta.tmem_shadow.end_read(load[1], warp.id, warp.clock[warp.id], last=not warp.marks.loading)


class RegisterHazards:
    """The rules for one kernel. `None` stands for it where a kernel has neither tcgen05.ld nor wgmma."""

    def __init__(self, kernel: Kernel) -> None:
        self.code = kernel.instructions
        self._first = {}
        at = 1
        for bank in BANKS:
            self._first[bank] = at
            at += kernel.register_counts[bank]
        self.loads = any(i.op.startswith("tcgen05.ld") for i in self.code)
        self.multiplied = self._multiplied()

    @classmethod
    def of(cls, kernel: Kernel) -> RegisterHazards | None:
        watched = any(i.op.startswith(("tcgen05.ld", "wgmma.mma_async")) for i in kernel.instructions)
        return cls(kernel) if watched else None

    def bit(self, register: Reg) -> int:
        return 1 << (self._first[register.bank] + register.row)

    def bits(self, found: Iterable[Reg]) -> int:
        mask = 0
        for register in found:
            mask |= self.bit(register)
        return mask

    def wgmma_registers(self, i: Instruction) -> tuple[int, int]:
        """(accumulators, A fragments) of a wgmma.mma_async."""
        fragments = i.operands[1]
        return self.bits(registers(i.operands[0])), self.bits(registers(fragments)) if isinstance(fragments, Vec) else 0

    def _multiplied(self) -> int:
        """The registers of all wgmma, and those that moves make them from: only these can lack a fence."""
        mask = 0
        for i in self.code:
            if i.op.startswith("wgmma.mma_async"):
                mask |= sum(self.wgmma_registers(i))
        moves = [(self.bits(destinations(i)), self.bits(sources(i))) for i in self.code if i.parts[0] == "mov"]
        while True:
            grown = mask
            for destination, source in moves:
                if destination & grown:
                    grown |= source
            if grown == mask:
                return mask
            mask = grown

    def access(self, code: list[Instruction]) -> Access:
        """What straight-line code does to registers."""
        out = Access()
        content: dict[Reg, int] = {}

        def held(register: Reg) -> int:
            return content.get(register, self.bit(register))

        for i in code:
            if i.op.startswith("wgmma.mma_async"):  # its handler applies the rules
                continue
            read, written = list(sources(i)), list(destinations(i))
            out.touched |= self.bits(read) | self.bits(written)
            reached = 0
            for register in read:
                reached |= held(register)
            moves = i.parts[0] == "mov"
            if not moves:
                out.used |= reached & ~MADE
                reached = MADE
            for register in written:
                content[register] = (reached or MADE) | (held(register) if i.guard is not None else 0)
        for register, mask in content.items():
            bit = self.bit(register)
            out.written |= bit
            if mask & MADE:
                out.made |= bit
            if mask & ~MADE and (self.loads or bit & self.multiplied):
                out.renamed.append((bit, mask & ~MADE))
        return out

    def step(self, frame: Frame, node: Node, log: RaceLog) -> None:
        """A group executes a node: reports what it must not touch, and moves the marks along."""
        access = node.access
        if access is None:
            access = node.access = self.access(self.code[node.pc : node.next_pc])
        for warp in frame.warps:
            marks = warp.marks
            if marks.loading:
                self._load(warp, access, node, log)
            if marks.flight and (access.touched & marks.accumulators or access.written & marks.fragments):
                self._report(
                    log, EARLY_MMA, node, access.touched & marks.accumulators | access.written & marks.fragments
                )
            if self.multiplied and (marks.unfenced or (access.made | access.used) & self.multiplied):
                after = self._after(access, marks.unfenced)
                marks.unfenced = after | (access.made | access.used) & self.multiplied

    def _load(self, warp, access: Access, node: Node, log: RaceLog) -> None:
        """Ends the loads whose registers the node needs."""
        for load in list(warp.marks.loading):
            if access.used & load[0]:
                self._report(log, EARLY_LOAD, node, access.used & load[0])
                end_load(warp, load)
            else:
                load[0] = self._after(access, load[0])

    @staticmethod
    def _after(access: Access, marked: int) -> int:
        """Where the marks are after a node."""
        out = marked & ~access.written
        for register, content in access.renamed:
            if content & marked:
                out |= register
        return out

    def multiply(self, warp, i: Instruction, op, accumulators: int, fragments: int, log: RaceLog) -> None:
        """A warp issues a wgmma."""
        marks = warp.marks
        if not marks.fenced or marks.unfenced & (accumulators | fragments):
            log.add(UNFENCED, i.line, 0, f"line {i.line} wgmma (warp {warp.id}) uses registers that ordinary "
                    "instructions used, with no wgmma.fence after them")  # fmt: skip
        if marks.accumulators & fragments:
            log.add(EARLY_MMA, i.line, 0, f"line {i.line} wgmma (warp {warp.id}) takes for A what a wgmma in flight "
                    "computes")  # fmt: skip
        marks.issue(op, accumulators, fragments)

    def _report(self, log: RaceLog, kind: str, node: Node, mask: int) -> None:
        """Names the first instruction of the node that touches one of the registers, once."""
        if (kind, node.pc) in log.places:
            return
        log.places.add((kind, node.pc))
        for i in self.code[node.pc : node.next_pc]:
            if i.parts[0] != "mov" and self.bits([*sources(i), *destinations(i)]) & mask:
                break
        else:
            i = node.instruction
        log.add(kind, i.line, 0, f"line {i.line} {i.text[:60]}")
