"""TMEM, the tensor memory of a CTA, and its allocator."""

from __future__ import annotations

import numpy as np

from .errors import TensorMemoryError


class TensorMemory:
    """TMEM of one CTA: 128 lanes by 512 columns of 32 bits, and its column allocator (PTX ISA 9.7.16.7)."""

    LANES, COLUMNS = 128, 512

    def __init__(self) -> None:
        self.cells = np.full((self.LANES, self.COLUMNS), 0x7FBADBAD, np.uint32)
        self.free = np.ones(self.COLUMNS, bool)
        self.allocations: dict[int, int] = {}
        self.permit_relinquished = False
        # cta_group::2 allocates in both CTAs of a pair, once a warp of each asks: columns that a warp here waits for,
        # and what the other CTA's warp then allocated here for it.
        self.requested: int | None = None
        self.granted: list[int] = []

    def place(self, columns: int) -> int | None:
        """Where an allocation would go; None if it has to wait."""
        starts = range(0, self.COLUMNS + 1 - columns, 32)
        return next((start for start in starts if self.free[start : start + columns].all()), None)

    def allocate(self, columns: int) -> int:
        start = self.place(columns)
        if start is None:
            raise TensorMemoryError(f"{columns} columns do not fit beside {self.allocations}")
        self.free[start : start + columns] = False
        self.allocations[start] = columns
        return start

    def release(self, start: int, columns: int, line: int) -> None:
        if self.allocations.get(start) != columns:
            raise TensorMemoryError(
                f"line {line}: dealloc of {columns} columns at {start}; allocated: {self.allocations}"
            )
        del self.allocations[start]
        self.free[start : start + columns] = True

    def check(self, first: int, last: int, line: int, what: str) -> None:
        if first < 0 or last >= self.COLUMNS or self.free[first : last + 1].any():
            raise TensorMemoryError(
                f"line {line}: {what} touches columns {first}..{last}; allocated: {self.allocations}"
            )
