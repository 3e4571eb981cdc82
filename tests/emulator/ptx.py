"""PTX text to instruction lists.

Reads the PTX that Triton (LLVM's NVPTX back end) and the CuTe DSL (NVVM) emit: one or more `.entry` functions, no
`.func`. The grammar is PTX ISA 4 (Syntax) and 5 (State Spaces); two details of it shape this module:

- Inline assembly arrives wrapped in `{ }`. Such a block is a scope for registers *and* labels, and it may declare
  registers after its first instruction, so names are resolved while reading, against a stack of scopes.
- A register is typed only by width for most purposes (`.b32` and `.f32` registers hold the same 32 bits). A register
  becomes a `Reg(bank, row)`: one bank per width, one row per register, which is how the machine stores them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import PtxSyntaxError

TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8", "e4m3", "e5m2"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
    "b128": 16,
}
"""Bytes of a fundamental type (PTX ISA 5.2)."""

BANKS = ("pred", 16, 32, 64, 128)
"""Register banks: predicates, then one per width in bits. 8-bit registers live in the 16-bit bank."""

REGISTER_FILE = 65536
"""32-bit registers of a multiprocessor."""

SHARED_BASE = 0x400
"""First shared address handed out: the driver keeps the first KiB of a block's window for itself."""


class Reg(NamedTuple):
    """A register: `row` of the bank of its width."""

    bank: str | int
    row: int


class NotReg(NamedTuple):
    """A negated predicate operand, `!%p1`."""

    row: int


class Imm(NamedTuple):
    """An integer literal."""

    value: int


class FloatImm(NamedTuple):
    """A float literal given by its bits (`0f3F800000`, `0d...`)."""

    bits: int
    width: int


class SpecialReg(NamedTuple):
    """A special register (PTX ISA 10), `%tid.x`."""

    name: str


class Symbol(NamedTuple):
    """The address of a variable: a byte offset in its state space."""

    space: str
    offset: int


class Param(NamedTuple):
    """The address of a kernel parameter: a byte offset in the parameter block."""

    offset: int


class Sum(NamedTuple):
    """Register plus constant, inside an address."""

    base: Reg
    offset: int


class Vec(NamedTuple):
    """`{a, b, ...}`."""

    items: tuple


class Mem(NamedTuple):
    """`[a]`, or for a tensor `[map, {c0, c1}]`."""

    items: tuple


class Pair(NamedTuple):
    """`d|p`."""

    first: object
    second: object


class Label(NamedTuple):
    """A branch target: an index in the instruction list."""

    target: int


class Sink(NamedTuple):
    """`_`, a destination that is dropped."""


Operand = Reg | NotReg | Imm | FloatImm | SpecialReg | Symbol | Param | Sum | Vec | Mem | Pair | Label | Sink


@dataclass(eq=False)
class Instruction:
    """One instruction. `op` keeps its modifiers (`add.rn.f32`), `parts` is `op` split at the dots."""

    op: str
    operands: list
    line: int
    text: str
    guard: Reg | None = None
    guard_negated: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.parts = tuple(self.op.split("."))

    @property
    def type(self) -> str:
        """The last modifier: the type the instruction computes in."""
        return self.parts[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.parts


def registers(operand) -> list[Reg]:
    """The registers that occur in an operand."""
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, NotReg):
        return [Reg("pred", operand.row)]
    if isinstance(operand, Sum):
        return [operand.base]
    if isinstance(operand, Pair):
        return registers(operand.first) + registers(operand.second)
    if isinstance(operand, (Vec, Mem)):
        return [r for item in operand.items for r in registers(item)]
    return []


_NO_DESTINATION = ("bar", "barrier", "wgmma", "setmaxnreg", "nanosleep", "fence", "bra")


def destinations(i: Instruction) -> list[Reg]:
    """The registers that an instruction writes: those of its first operand, unless that is an address or a source."""
    if not i.operands or isinstance(i.operands[0], Mem) or i.parts[0] in _NO_DESTINATION:
        return []
    return [] if i.op.startswith("tcgen05.dealloc") else registers(i.operands[0])


def sources(i: Instruction) -> list[Reg]:
    """The registers that an instruction reads: operands, addresses and the guard."""
    start = 1 if destinations(i) else 0
    found = [r for operand in i.operands[start:] for r in registers(operand)]
    return found if i.guard is None else [*found, i.guard]


@dataclass
class KernelParam:
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An `.entry`: parameters, instructions, register counts, and the static shape that its directives state."""

    name: str
    params: list[KernelParam] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    register_counts: dict = field(default_factory=lambda: dict.fromkeys(BANKS, 0))
    required_threads: tuple[int, int, int] | None = None
    cluster: tuple[int, int, int] | None = None
    max_registers: int | None = None
    min_ctas: int = 1
    shared_symbols: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    dynamic_shared: int = SHARED_BASE
    local_bytes: int = 0
    line: int = 0
    text: str = ""

    @property
    def launch_registers(self) -> int | None:
        """Registers of a thread at launch, from which setmaxnreg's pool follows; None where the text does not say.

        `.maxnreg` states them. Else the assembler gives a block of known size all that the register file holds, in
        steps of 8: 168 for 384 threads, so that the pool is 64,512 and not the file's 65,536 (seen on an H100).
        """
        if self.max_registers or not self.required_threads:
            return self.max_registers
        x, y, z = self.required_threads
        return min(256, REGISTER_FILE // (self.min_ctas * x * y * z) // 8 * 8)

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.size for p in self.params), default=0)


SPECIAL_REGISTERS = frozenset(
    [f"%{base}.{axis}" for base in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid",
                                    "cluster_nctaid") for axis in "xyz"]
    + ["%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%cluster_ctarank", "%cluster_nctarank",
       "%is_explicit_cluster", "%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi",
       "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size",
       "%total_smem_size"]
)  # fmt: skip

_VARIABLE = re.compile(
    r"^\s*(?:\.(?:visible|weak|common)\s+)*(?P<extern>\.extern\s+)?\.(?P<space>shared|global|const)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$.%]+)(?P<dims>\[(?P<count>\d*)\])?",
    re.M,
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr(?:\s+\.(?!align)\w+)*(?:\s+\.align\s+\d+)?)?\s+(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?$"
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?")


def parse(text: str) -> dict[str, Kernel]:
    """Reads a PTX module.

    Returns one `Kernel` per `.entry`, by name, in the order of the text.
    Raises `PtxSyntaxError`, naming the line, on text outside the subset.
    """
    original = text
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    shared, dynamic = _module_shared(text)
    kernels = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        kernel = Kernel(match.group(1), shared_symbols=shared, static_shared=dynamic - SHARED_BASE,
                        dynamic_shared=dynamic, line=text.count("\n", 0, match.start()) + 1, text=original)  # fmt: skip
        end = text.index(")", match.end())
        _read_params(kernel, text[match.end() : end])
        body = text.index("{", end)
        _read_directives(kernel, text[end:body])
        _BodyReader(kernel, text, body).read()
        kernels[kernel.name] = kernel
    if not kernels:
        raise PtxSyntaxError("no .entry found")
    return kernels


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _module_shared(text: str) -> tuple[dict[str, int], int]:
    """Places the module's shared variables; extern ones all name the dynamic part, as in PTX ISA 5.1.7."""
    symbols, extern, offset, alignment = {}, [], SHARED_BASE, 16
    for match in _VARIABLE.finditer(text):
        if match["space"] != "shared":
            continue
        align = int(match["align"] or TYPE_BYTES[match["type"]])
        if match["extern"] or (match["dims"] and not match["count"]):
            extern.append(match["name"])
            alignment = max(alignment, align)
            continue
        offset = _align(offset, align)
        symbols[match["name"]] = offset
        offset += TYPE_BYTES[match["type"]] * int(match["count"] or 1)
    # Kernels align their dynamic memory for 128-byte swizzles, which act on the absolute address: hardware hands out
    # the first KiB-aligned address when no static variable precedes it.
    dynamic = _align(offset, max(alignment, 1024))
    symbols.update(dict.fromkeys(extern, dynamic))
    return symbols, dynamic


def _read_params(kernel: Kernel, text: str) -> None:
    offset = 0
    for item in filter(None, (p.strip() for p in text.split(","))):
        match = _PARAM.match(" ".join(item.split()))
        if not match:
            raise PtxSyntaxError(f"line {kernel.line}: kernel parameter {item!r}")
        size = TYPE_BYTES[match["type"]] * int(match["count"] or 1)
        offset = _align(offset, int(match["align"] or TYPE_BYTES[match["type"]]))
        kernel.params.append(KernelParam(match["name"], offset, size))
        offset += size


def _read_directives(kernel: Kernel, text: str) -> None:
    def triple(name: str) -> tuple[int, int, int] | None:
        match = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
        return tuple(int(g or 1) for g in match.groups()) if match else None  # type: ignore[return-value]

    kernel.required_threads = triple("reqntid")
    kernel.cluster = triple("reqnctapercluster")
    registers, ctas = triple("maxnreg"), triple("minnctapersm")
    kernel.max_registers = registers[0] if registers else None
    kernel.min_ctas = ctas[0] if ctas else 1


def split_operands(text: str) -> list[str]:
    """Splits at top-level commas."""
    out, depth, current = [], 0, ""
    for char in text:
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        if char == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        out.append(current.strip())
    return out


class _BodyReader:
    """Reads one function body, `{` to its `}`, resolving names against the scopes open at each point."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.pos = kernel, text, start
        self.line = text.count("\n", 0, start) + 1
        self.names: list[dict[str, Operand]] = []
        self.labels: list[dict[str, int]] = []
        # Branches waiting for their label: (instruction, label, depth of the scope in which the branch stands).
        self.open_branches: list[tuple[Instruction, str, int]] = []
        self.params = {p.name: Param(p.offset) for p in kernel.params}

    def read(self) -> None:
        text = self.text
        while True:
            while text[self.pos].isspace():
                self.line += text[self.pos] == "\n"
                self.pos += 1
            char = text[self.pos]
            if char == "{":
                self.names.append({})
                self.labels.append({})
                self.pos += 1
            elif char == "}":
                self._close_scope()
                self.pos += 1
                if not self.names:
                    break
            elif char == ";":
                self.pos += 1
            elif match := _LABEL.match(text, self.pos):
                self.labels[-1][match.group(1)] = len(self.kernel.instructions)
                self.pos = match.end()
            else:
                self._statement()
        if self.open_branches:
            instruction, label, _ = self.open_branches[0]
            raise PtxSyntaxError(f"line {instruction.line}: no label {label!r}")

    def _close_scope(self) -> None:
        self.names.pop()
        labels = self.labels.pop()
        depth = len(self.labels)
        still_open = []
        for instruction, label, at in self.open_branches:
            if at > depth and label in labels:
                instruction.operands = [Label(labels[label])]
            else:
                still_open.append((instruction, label, min(at, depth)))
        self.open_branches = still_open

    def _statement(self) -> None:
        if self.text[self.pos] == "." and (match := re.compile(r"\.(loc|file)\b[^\n;]*").match(self.text, self.pos)):
            self.pos = match.end()  # line information ends with the line, not with a semicolon
            return
        end = self.text.index(";", self.pos)
        raw = self.text[self.pos : end]
        line = self.line
        self.line += raw.count("\n")
        self.pos = end + 1
        statement = " ".join(raw.split())
        if statement.startswith("."):
            self._directive(statement, line)
            return
        guard, negated = None, False
        if statement[0] == "@":
            name, statement = statement[1:].split(None, 1)
            negated = name[0] == "!"
            guard = self._lookup(name.lstrip("!"))
            if not isinstance(guard, Reg):
                raise PtxSyntaxError(f"line {line}: unknown guard {name}")
        op, _, rest = statement.partition(" ")
        instruction = Instruction(op, [], line, statement, guard, negated)
        if op == "bra" or op.startswith("bra."):
            self.open_branches.append((instruction, rest.strip(), len(self.labels)))
        else:
            try:
                instruction.operands = [self._operand(x) for x in split_operands(rest)]
            except PtxSyntaxError as error:
                raise PtxSyntaxError(f"line {line}: {error} in {statement!r}") from None
        self.kernel.instructions.append(instruction)

    def _directive(self, statement: str, line: int) -> None:
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            for name in match.group(2).split(","):
                family = re.match(r"([%\w$]+)<(\d+)>$", name.strip())
                names = [f"{family.group(1)}{i}" for i in range(int(family.group(2)))] if family else [name.strip()]
                for each in names:
                    self.names[-1][each] = self._new_register(match.group(1))
        elif match := _STATEMENT_VARIABLE.match(statement):
            space, align, ty, name, count = match.groups()
            size, alignment = TYPE_BYTES[ty] * int(count or 1), int(align or TYPE_BYTES[ty])
            if space == "shared":
                raise PtxSyntaxError(f"line {line}: shared variable inside a function")
            offset = _align(self.kernel.local_bytes, alignment)
            self.names[-1][name] = Symbol("local", offset)
            self.kernel.local_bytes = offset + size
        elif not statement.startswith((".pragma", ".loc", ".file")):
            raise PtxSyntaxError(f"line {line}: directive {statement!r}")

    def _new_register(self, ty: str) -> Reg:
        bank = "pred" if ty == "pred" else max(16, 8 * TYPE_BYTES[ty])
        row = self.kernel.register_counts[bank]
        self.kernel.register_counts[bank] += 1
        return Reg(bank, row)

    def _lookup(self, name: str) -> Operand | None:
        for scope in reversed(self.names):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vec(tuple(self._operand(x) for x in split_operands(text[1 : text.rindex("}")])))
        if text[0] == "[":
            return Mem(tuple(self._operand(x) for x in split_operands(text[1 : text.rindex("]")])))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if text[0] == "!":
            register = self._lookup(text[1:].strip())
            if not isinstance(register, Reg):
                raise PtxSyntaxError(f"unknown predicate {text!r}")
            return NotReg(register.row)
        found = self._lookup(text) or self.params.get(text)
        if found is not None:
            return found
        if text in SPECIAL_REGISTERS:
            return SpecialReg(text)
        if (literal := _literal(text)) is not None:
            return literal
        if text in self.kernel.shared_symbols:
            return Symbol("shared", self.kernel.shared_symbols[text])
        if match := re.match(r"(.+?)\s*([+-])\s*(-?\s*\w+)$", text):
            offset = int(match.group(3).replace(" ", "").rstrip("U"), 0) * (-1 if match.group(2) == "-" else 1)
            base = self._operand(match.group(1).strip())
            if isinstance(base, Reg):
                return Sum(base, offset)
            if isinstance(base, Imm):
                return Imm(base.value + offset)
            if isinstance(base, Param):
                return Param(base.offset + offset)
            if isinstance(base, Symbol):
                return Symbol(base.space, base.offset + offset)
        raise PtxSyntaxError(f"operand {text!r}")


def _literal(text: str) -> Imm | FloatImm | None:
    try:
        if text[:2] in ("0f", "0F") and len(text) == 10:
            return FloatImm(int(text[2:], 16), 32)
        if text[:2] in ("0d", "0D") and len(text) == 18:
            return FloatImm(int(text[2:], 16), 64)
        if re.fullmatch(r"-?0[0-7]+U?", text):
            return Imm(int(text.rstrip("U"), 8))
        return Imm(int(text.rstrip("U"), 0))
    except ValueError:
        return None
