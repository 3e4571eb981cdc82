"""Handlers of instructions that are more than register arithmetic, by family.

A handler is a decoder: called once per instruction when a program is built, it checks every modifier and returns
`execute(frame, mask)`. So an unsupported form is found before anything runs. `execute` returns None (done), a
`machine.Blocked`, `machine.EXIT`, or `machine.SPLIT` (run the warps of this group one by one).
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Unsupported

_HANDLERS: dict[str, Callable] = {}


def handles(*prefixes: str):
    """Registers a decoder for opcodes that equal a prefix or continue it with a dot. The longest prefix wins."""

    def register(function):
        for prefix in prefixes:
            _HANDLERS[prefix] = function
        return function

    return register


def unsupported(instruction) -> Unsupported:
    return Unsupported(f"line {instruction.line}: unsupported: {instruction.text}")


def decode(instruction, program) -> Callable:
    """The `execute` of an instruction. Raises `Unsupported`, naming the line."""
    parts = instruction.parts
    for n in range(len(parts), 0, -1):
        decoder = _HANDLERS.get(".".join(parts[:n]))
        if decoder is not None:
            return decoder(instruction, program)
    raise unsupported(instruction)


from . import control, loadstore, matrix, mbarrier, tcgen05, tma  # noqa: E402,F401  (they register their handlers)
