"""Global memory: host arrays that a kernel may touch, at their host addresses.

Only what was registered exists. An access that is not wholly inside one registered array is an error with its lane and
address, which is stricter than a GPU and is the point.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .errors import OutOfBounds


class Allocation:
    """One registered span of bytes. `view(n)` is the memory as elements of n bytes, indexed from `aligned`.

    `content` stands in for the host memory at `address`, for launches replayed in another process.
    """

    def __init__(self, address: int, size: int, name: str, keep=None, content: bytes | None = None) -> None:
        self.address, self.size, self.name, self.keep = address, size, name, keep
        self.end = address + size
        # Widened to 16-byte boundaries so that one view per width serves; bounds are checked against the true span.
        self.aligned = address & ~15
        length = max(-(-(self.end - self.aligned) // 16) * 16, 16)
        if content is None:
            self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.aligned))
        else:
            self._bytes = np.zeros(length, np.uint8)
            self.bytes(address, size)[:] = np.frombuffer(content, np.uint8)
        self._views: dict[int, np.ndarray] = {}

    def view(self, width: int) -> np.ndarray:
        if width not in self._views:
            pairs = self._bytes.view(np.uint64).reshape(-1, 2) if width == 16 else self._bytes.view(f"u{width}")
            self._views[width] = pairs
        return self._views[width]

    def bytes(self, address: int, size: int) -> np.ndarray:
        start = address - self.aligned
        return self._bytes[start : start + size]

    def __repr__(self) -> str:
        return f"{self.name} [0x{self.address:x}, 0x{self.end:x})"


class GlobalMemory:
    """The arrays a launch registered."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []

    def add(self, allocation: Allocation) -> Allocation:
        at = bisect.bisect(self._starts, allocation.address)
        self._starts.insert(at, allocation.address)
        self._allocations.insert(at, allocation)
        return allocation

    def __iter__(self):
        return iter(self._allocations)

    def add_array(self, array, name: str) -> int:
        """Registers a numpy array or a CPU torch tensor, whole span between its lowest and highest element, once.

        Returns its address. Raises TypeError for anything else.
        """
        if isinstance(array, np.ndarray):
            address, itemsize = array.__array_interface__["data"][0], array.itemsize
            strides = [s // itemsize for s in array.strides]
            shape = array.shape
        elif hasattr(array, "data_ptr") and hasattr(array, "stride"):
            if array.device.type != "cpu":
                raise TypeError(f"{name}: the emulator reads CPU tensors, got {array.device}")
            address, itemsize, strides, shape = array.data_ptr(), array.element_size(), array.stride(), array.shape
        else:
            raise TypeError(f"{name}: expected a numpy array or a torch tensor, got {type(array).__name__}")
        if any(s < 0 for s in strides):
            raise TypeError(f"{name}: negative strides")
        if 0 in shape:
            return address
        size = (sum((n - 1) * s for n, s in zip(shape, strides)) + 1) * itemsize
        known = self.lookup(address)
        if known is None or known.end < address + size:
            self.add(Allocation(address, size, name, keep=array))
        return address

    def lookup(self, address: int) -> Allocation | None:
        at = bisect.bisect(self._starts, address) - 1
        while at >= 0:
            if self._allocations[at].address <= address < self._allocations[at].end:
                return self._allocations[at]
            at -= 1
        return None

    def find(self, address: int, size: int, line: int, what: str = "access") -> Allocation:
        """The allocation that holds all of [address, address + size). Raises `OutOfBounds`."""
        allocation = self.lookup(address)
        if allocation is None or address + size > allocation.end:
            near = min(
                self._allocations, key=lambda a: min(abs(address - a.address), abs(address - a.end)), default=None
            )
            raise OutOfBounds(
                f"line {line}: global {what} of {size} bytes at 0x{address:x} is outside every registered array; "
                f"nearest: {near}"
            )
        return allocation

    def load(self, addresses: np.ndarray, width: int, line: int, what: str = "load") -> np.ndarray:
        """Elements of `width` bytes (1 to 16) at each address; shape (n,), or (n, 2) of uint64 for 16 bytes."""
        allocation, index = self._locate(addresses, width, line, what)
        if allocation is not None:
            return allocation.view(width)[index]
        parts = [self.load(addresses[i : i + 1], width, line, what) for i in range(len(addresses))]
        return np.concatenate(parts)

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray, line: int) -> None:
        allocation, index = self._locate(addresses, width, line, "store")
        if allocation is not None:
            allocation.view(width)[index] = values
        else:
            for i in range(len(addresses)):
                self.store(addresses[i : i + 1], width, values[i : i + 1], line)

    def locate_elements(self, addresses: np.ndarray, size: int, element: int, line: int, what: str):
        """The allocation that holds `size` bytes at each address, and the index of each first element."""
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self.find(low, high - low + size, line, what)
        if (addresses & np.uint64(size - 1)).any():
            raise OutOfBounds(f"line {line}: misaligned global {what} of {size} bytes")
        return allocation, ((addresses - np.uint64(allocation.aligned)) // np.uint64(element)).astype(np.intp)

    def _locate(self, addresses: np.ndarray, width: int, line: int, what: str):
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self.lookup(low)
        if allocation is None or high + width > allocation.end:
            if len(addresses) == 1:
                self.find(low, width, line, what)
            for address in addresses.tolist():
                self.find(address, width, line, what)
            return None, None  # lanes reach several arrays
        if (addresses & np.uint64(width - 1)).any():
            bad = int(addresses[(addresses & np.uint64(width - 1)) != 0][0])
            raise OutOfBounds(f"line {line}: global {what} of {width} bytes at misaligned address 0x{bad:x}")
        return allocation, ((addresses - np.uint64(allocation.aligned)) // np.uint64(width)).astype(np.intp)
