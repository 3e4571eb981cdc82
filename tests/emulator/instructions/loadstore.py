"""Loads, stores, atomics, cp.async, ldmatrix and stmatrix (PTX ISA 9.7.9, 9.7.13.12, 9.7.14.5.15)."""

from __future__ import annotations

import numpy as np

from ..errors import EmulatorError, OutOfBounds
from ..lowering import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..ptx import TYPE_BYTES, Imm, Param, Reg, Sink, Symbol, Vec
from . import handles, unsupported
from .control import unconverged

_RANK_SHIFT = 24
_OFFSET = np.uint64((1 << _RANK_SHIFT) - 1)
_U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def state_space(i) -> str:
    for part in i.parts[1:]:
        name = part.split("::")[0]
        if name in ("shared", "global", "param", "local", "const"):
            return name
    return "generic"


def resolve(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """Turns generic addresses into a state space and addresses in it (lanes of one instruction share the space)."""
    if space != "generic":
        return space, addresses
    first = int(addresses[0])
    for name, window in (("param", PARAM_WINDOW), ("local", LOCAL_WINDOW), ("shared", SHARED_WINDOW)):
        if first >= window:
            return name, addresses - np.uint64(window)
    return "global", addresses


class SharedAccess:
    """Shared addresses of active lanes, checked: which CTA, which byte offsets; and their race bookkeeping."""

    def __init__(self, frame, addresses: np.ndarray, size: int, line: int, what: str, align: int | None = None) -> None:
        rank = int(addresses[0]) >> _RANK_SHIFT
        offsets = (addresses & _OFFSET).astype(np.int64)
        self.frame, self.line, self.what, self.size, self.offsets = frame, line, what, size, offsets
        if (addresses >> np.uint64(_RANK_SHIFT) != rank).any():
            raise EmulatorError(f"line {line}: lanes of one {what} address different CTAs")
        self.cta, _ = frame.cluster.locate(int(addresses[offsets.argmax()]), size, line)
        if (offsets & ((align or size) - 1)).any():
            raise OutOfBounds(f"line {line}: misaligned shared {what} of {size} bytes at 0x{int(offsets.max()):x}")

    def record(self, mask, write: bool, same_value=None, atomic: bool = False) -> None:
        """Tells the race check about the access; `same_value` is a flag per lane, for stores."""
        frame = self.frame
        if not frame.machine.check_races:
            return
        shadow = self.cta.shared_shadow
        cells = shadow.spans(self.offsets[:, None], self.size)
        cells = cells.reshape(len(self.offsets), -1)
        if mask is None:
            self._record(
                shadow, cells.reshape(len(frame.warps), -1), slice(0, len(frame.warps)), write, same_value, atomic
            )
            return
        owner = np.flatnonzero(mask) // 32
        for w in np.unique(owner):
            mine = owner == w
            same = None if same_value is None else same_value[mine]
            self._record(shadow, cells[mine].reshape(1, -1), slice(w, w + 1), write, same, atomic)

    def _record(self, shadow, cells, rows, write, same_value, atomic) -> None:
        frame = self.frame
        slots = frame.warp_ids[rows]
        seen = frame.clocks[rows]
        clocks = seen[np.arange(len(slots)), slots]
        if write:
            per_lane = cells.size // max(1, 0 if same_value is None else len(same_value))
            same = None if same_value is None else (lambda: np.repeat(same_value, per_lane).reshape(cells.shape))
            shadow.write(cells, slots, clocks, seen, self.line, self.what, True, same, atomic)
        else:
            shadow.read(cells, slots, clocks, seen, self.line, self.what)


def memory_order(i) -> str:
    """The semantics of a load, store or atomic: weak, relaxed (or stronger than weak), acquire, release or acq_rel."""
    named = next((p for p in i.parts if p in ("acquire", "release", "acq_rel")), None)
    strong = i.parts[0] in ("atom", "red") or i.has("relaxed") or i.has("volatile") or i.has("mmio")
    return named or ("relaxed" if strong else "weak")


def by_warp(frame, lanes, addresses: np.ndarray):
    """The active warps, each with the set of addresses that its lanes access."""
    rows = (np.arange(frame.lanes) if lanes is None else lanes) // 32
    for row in np.unique(rows):
        yield frame.warps[row], set(addresses[rows == row].tolist())


def _vector(i) -> int:
    return {"v2": 2, "v4": 4, "v8": 8}.get(next((p for p in i.parts if p in ("v2", "v4", "v8")), ""), 1)


def _items(operand) -> tuple:
    return operand.items if isinstance(operand, Vec) else (operand,)


class _Destinations:
    """Registers that a vector load fills, and how a loaded element is extended to them."""

    def __init__(self, operand, ty: str) -> None:
        self.items = _items(operand)
        self.signed = ty[0] == "s"
        banks = {r.bank for r in self.items if isinstance(r, Reg)}
        self.rows = np.array([r.row for r in self.items if isinstance(r, Reg)], np.intp)
        self.uniform = len(banks) == 1 and not any(isinstance(r, Sink) for r in self.items)
        self.bank = banks.pop() if len(banks) == 1 else None

    def fill(self, frame, values: np.ndarray, lanes) -> None:
        """`values`: (active lanes, items)."""
        if self.signed:
            values = values.view(f"i{values.dtype.itemsize}")
        if self.uniform and self.bank in (16, 32, 64):
            bank = {16: frame.H, 32: frame.W, 64: frame.D}[self.bank]
            if values.dtype != bank.dtype:
                values = values.astype(bank.dtype)
            if lanes is None:
                bank[self.rows] = values.T
            else:
                bank[self.rows[:, None], lanes[None, :]] = values.T
            return
        for n, item in enumerate(self.items):
            if isinstance(item, Sink):
                continue
            wide = values[:, n].astype(f"u{item.bank // 8}")
            if lanes is None:
                frame.write(item, wide, None)
            else:
                full = np.zeros(frame.lanes, wide.dtype)
                full[lanes] = wide
                mask = np.zeros(frame.lanes, bool)
                mask[lanes] = True
                frame.write(item, full, mask)


def _split(raw: np.ndarray, width: int, count: int) -> np.ndarray:
    """Loaded units of a vector access as (lanes, count) elements of `width` bytes."""
    return np.ascontiguousarray(raw).view(_U[width]).reshape(-1, count)


@handles("ld", "ldu", "ld.global.nc")
def load(i, program):
    """ld (PTX ISA 9.7.9.8) from param, shared, global, local and generic addresses."""
    if i.type not in TYPE_BYTES or i.type == "b128":
        raise unsupported(i)
    width, count, space = TYPE_BYTES[i.type], _vector(i), state_space(i)
    size = width * count
    destinations = _Destinations(i.operands[0], i.type)
    address, order = i.operands[1].items[0], memory_order(i)
    constant_param = isinstance(address, Param) and space == "param"

    def execute(frame, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        if constant_param:
            raw = frame.machine.params[address.offset : address.offset + size].view(_U[width])
            n = frame.lanes if lanes is None else len(lanes)
            destinations.fill(frame, np.broadcast_to(raw, (n, count)), lanes)
            return
        addresses = frame.read(address, np.uint64)
        if lanes is not None:
            addresses = addresses[lanes]
        where, addresses = resolve(space, addresses)
        if where == "shared":
            access = SharedAccess(frame, addresses, size, i.line, "ld")
            access.record(mask, write=False)
            if size == 32:
                raise unsupported(i)
            raw = access.cta.shared_views[size][access.offsets // size]
        elif where == "global":
            races = frame.machine.global_races
            if races is not None:
                if order != "weak":
                    for warp, places in by_warp(frame, lanes, addresses):
                        races.strong_read(warp, places, order == "acquire")
                races.access(frame, lanes, addresses, size, i.line, "ld", write=False, strong=order != "weak")
            if size == 32:
                first = frame.machine.memory.load(addresses, 16, i.line)
                raw = np.concatenate((first, frame.machine.memory.load(addresses + np.uint64(16), 16, i.line)), 1)
            else:
                raw = frame.machine.memory.load(addresses, size, i.line)
        elif where == "param":
            offsets = addresses & np.uint64(PARAM_WINDOW - 1)
            raw = frame.machine.params[offsets[:, None].astype(np.int64) + np.arange(size)]
        elif where == "local":
            raw = _local(frame, lanes, addresses, size, i)
        else:
            raise unsupported(i)
        destinations.fill(frame, _split(raw, width, count), lanes)

    return execute


def _local(frame, lanes, addresses, size, i, values=None):
    """Per-lane local memory. Returns the bytes, or stores `values`."""
    offsets = addresses.astype(np.int64)
    if (offsets < 0).any() or (offsets + size > frame.cta.local.shape[1]).any():
        raise OutOfBounds(f"line {i.line}: local access at {int(offsets.max())} of {frame.cta.local.shape[1]} bytes")
    rows = 32 * frame.lo + (np.arange(frame.lanes) if lanes is None else lanes)
    index = rows[:, None], offsets[:, None] + np.arange(size)
    if values is None:
        return frame.cta.local[index]
    frame.cta.local[index] = values
    return None


@handles("st")
def store(i, program):
    """st (PTX ISA 9.7.9.12)."""
    if i.type not in TYPE_BYTES or i.type == "b128" or i.has("async"):
        raise unsupported(i)
    width, count, space = TYPE_BYTES[i.type], _vector(i), state_space(i)
    size = width * count
    address, sources = i.operands[0].items[0], _items(i.operands[1])
    order = memory_order(i)

    def execute(frame, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        addresses = frame.read(address, np.uint64)
        if lanes is not None:
            addresses = addresses[lanes]
        values = np.empty((len(addresses), count), _U[width])
        for n, source in enumerate(sources):
            value = frame.read(source, _U[width])
            values[:, n] = value if lanes is None else value[lanes]
        where, addresses = resolve(space, addresses)
        units = values.view(_U[size]).reshape(-1) if size <= 8 else values.view(np.uint64).reshape(len(values), -1)
        if where == "shared":
            if size == 32:
                raise unsupported(i)
            access = SharedAccess(frame, addresses, size, i.line, "st")
            view, index = access.cta.shared_views[size], access.offsets // size
            if frame.machine.check_races:
                same = view[index] == units
                access.record(mask, write=True, same_value=same.all(1) if same.ndim == 2 else same)
            view[index] = units
        elif where == "global":
            races = frame.machine.global_races
            if races is not None:
                changes = None if size == 32 else frame.machine.memory.load(addresses, size, i.line, "store") != units
                races.access(frame, lanes, addresses, size, i.line, "st", write=True, strong=order != "weak",
                             changes=changes.any(1) if size == 16 else changes)  # fmt: skip
                if order != "weak":
                    for warp, places in by_warp(frame, lanes, addresses):
                        races.strong_write(warp, places, order == "release")
            if size == 32:
                frame.machine.memory.store(addresses, 16, units[:, :2], i.line)
                frame.machine.memory.store(addresses + np.uint64(16), 16, units[:, 2:], i.line)
            else:
                frame.machine.memory.store(addresses, size, units, i.line)
        elif where == "local":
            _local(frame, lanes, addresses, size, i, values.view(np.uint8).reshape(len(values), size))
        else:
            raise unsupported(i)

    return execute


@handles("discard")
def discard(i, program):
    """discard (PTX ISA 9.7.9.19): a weak write of 128 bytes of anything, here of NaNs."""
    address = i.operands[0].items[0]
    nothing = np.full(2, ~np.uint64(0))

    def execute(frame, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        addresses = frame.read(address, np.uint64)
        if lanes is not None:
            addresses = addresses[lanes]
        _, addresses = resolve("global", addresses)
        races = frame.machine.global_races
        for after in range(0, 128, 16):
            places = addresses + np.uint64(after)
            if races is not None:
                races.access(frame, lanes, places, 16, i.line, "discard", write=True, strong=False)
            frame.machine.memory.store(places, 16, np.tile(nothing, (len(places), 1)), i.line)

    return execute


@handles("mapa")
def map_address(i, program):
    """mapa: the address of the same shared variable in another CTA of the cluster (PTX ISA 9.7.9.24)."""

    def execute(frame, mask):
        wide = isinstance(i.operands[0], Reg) and i.operands[0].bank == 64
        address, rank = frame.read(i.operands[1], np.uint64), frame.read(i.operands[2], np.uint64)
        window = address & ~np.uint64(0xFFFFFFFF) if wide else np.uint64(0)
        value = window | address & _OFFSET | rank << np.uint64(_RANK_SHIFT)
        frame.write(i.operands[0], value.astype(np.uint64 if wide else np.uint32), mask)

    return execute


# Atomics -----------------------------------------------------------------------------------------------------------

_ATOMIC_DTYPE = {"u32": np.uint32, "s32": np.int32, "f32": np.float32, "b32": np.uint32, "u64": np.uint64,
                 "s64": np.int64, "b64": np.uint64, "f64": np.float64, "f16": np.float16, "f16x2": np.float16,
                 "b16": np.uint16}  # fmt: skip


def atomic_update(name: str, dtype, old, operand, compare=None):
    """The new value of one atomic operation, elementwise (PTX ISA 9.7.13.5)."""
    if name == "add":
        return (old + operand).astype(dtype)
    if name in ("min", "max"):
        return (np.minimum if name == "min" else np.maximum)(old, operand)
    if name == "exch":
        return operand
    if name == "cas":
        return np.where(old == compare, operand, old)
    if name in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](old, operand)
    if name == "inc":
        return np.where(old >= operand, dtype(0), old + dtype(1))
    if name == "dec":
        return np.where((old == 0) | (old > operand), operand, old - dtype(1))
    raise ValueError(name)


@handles("atom", "red")
def atomic(i, program):
    """atom and red, scalar and vector, on global and shared memory (PTX ISA 9.7.13.5-6).

    Lanes act one after the other in lane order; two halves of a packed type are separate elements.
    """
    if i.has("async"):
        raise unsupported(i)
    returns = i.parts[0] == "atom"
    name = next(
        (p for p in i.parts if p in ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")), None
    )
    ty, count, space = i.type, _vector(i), state_space(i)
    bf16 = ty in ("bf16", "bf16x2")
    if name is None or not (ty in _ATOMIC_DTYPE or bf16):
        raise unsupported(i)
    register_bytes = TYPE_BYTES[ty]
    size = register_bytes * count
    dtype = np.uint16 if bf16 else _ATOMIC_DTYPE[ty]
    at = 1 if returns else 0
    address, operands = i.operands[at].items[0], _items(i.operands[at + 1])
    swap = i.operands[at + 2] if name == "cas" else None
    order = memory_order(i)

    def update(old, value, compare):
        if bf16:
            from ..lanes import bf16_bits, bf16_value

            return bf16_bits(atomic_update(name, np.float32, bf16_value(old), bf16_value(value)))
        return atomic_update(name, dtype, old, value, compare)

    def _order_atomic(races, frame, lanes, addresses):
        races.access(frame, lanes, addresses, size, i.line, i.parts[0], write=True, strong=True)
        publishes = order in ("release", "acq_rel")
        if not publishes and not races.published and all(w.seen_at_fence is None for w in frame.warps):
            return
        for warp, places in by_warp(frame, lanes, addresses):
            if returns:
                races.strong_read(warp, places, order in ("acquire", "acq_rel"))
            races.strong_write(warp, places, publishes)

    def execute(frame, mask):
        lanes = np.arange(frame.lanes) if mask is None else np.flatnonzero(mask)
        addresses = frame.read(address, np.uint64)[lanes]
        where, addresses = resolve(space, addresses)
        element = np.dtype(dtype).itemsize
        values = np.empty((len(lanes), count), _U[register_bytes])
        for n, source in enumerate(operands):
            values[:, n] = frame.read(source, _U[register_bytes])[lanes]
        values = values.view(dtype).reshape(len(lanes), -1)
        compare = None
        if swap is not None:
            compare, values = values, frame.read(swap, _U[register_bytes])[lanes].view(dtype).reshape(len(lanes), -1)
        if where == "shared":
            access = SharedAccess(frame, addresses, size, i.line, i.parts[0], register_bytes)
            access.record(mask, write=True, atomic=True)
            memory, index = access.cta.shared.view(dtype), access.offsets // element
        elif where == "global":
            machine = frame.machine
            allocation, start = machine.memory.locate_elements(addresses, size, element, i.line, i.parts[0])
            if machine.global_races is not None:
                _order_atomic(machine.global_races, frame, lanes, addresses)
            memory, index = allocation.view(element).view(dtype), start
        else:
            raise unsupported(i)
        places = index[:, None] + np.arange(size // element)
        if returns or name != "add" or bf16:
            old = np.empty_like(values)
            for n, place in enumerate(places):
                old[n] = memory[place]
                memory[place] = update(old[n], values[n], None if compare is None else compare[n])
        else:
            np.add.at(memory, places, values)
            return
        if returns:
            destinations = _Destinations(i.operands[0], "b")
            full = lanes if mask is not None else None
            destinations.fill(frame, np.ascontiguousarray(old).view(_U[register_bytes]).reshape(len(lanes), -1), full)

    return execute


# cp.async ----------------------------------------------------------------------------------------------------------


class AsyncCopy:
    """State of asynchronous work that a warp waits for in groups: `read` when the source has been read, `done` at the
    end, `waited` when a wait has covered it, `stamp` for the race check."""

    __slots__ = ("done", "read", "stamp", "waited")

    def __init__(self, stamp: int) -> None:
        self.read = self.done = self.waited = False
        self.stamp = stamp


def wait_for_groups(i, frame, mask, groups_of, pending: int, attribute: str, slots_of, what: str, then=None):
    """The common wait: all but the youngest `pending` groups of each active warp have `attribute` set. slots_of: the
    actors whose work the warp has then seen. then: called with each warp that has waited."""
    from ..machine import Blocked

    def passed(current):
        warps = current.warps
        for warp in warps:
            groups = groups_of(warp)
            if not all(getattr(op, attribute) for op in groups.older_than_last(pending)):
                return False
        for warp in warps:
            groups = groups_of(warp)
            finished = groups.older_than_last(pending)
            groups.waited = max(groups.waited, len(groups.groups) - pending)
            for op in finished:
                op.waited = True
                for slot in slots_of(warp):
                    warp.clock[slot] = max(warp.clock[slot], op.stamp)
            if pending == 0:
                groups.groups.clear()
                groups.waited = 0
            if then is not None:
                then(warp)
        return True

    if passed(frame):
        return None
    return Blocked(passed, f"{what} with at most {pending} groups pending (line {i.line})", True, (what, pending))


@handles("cp.async.cg", "cp.async.ca")
def copy_async(i, program):
    """cp.async: 4, 8 or 16 bytes a lane, global to shared, zero-filled past `src-size` (PTX ISA 9.7.9.25.3.1)."""
    size = i.operands[2].value
    source_size = i.operands[3] if len(i.operands) > 3 and not _is_cache_policy(i.operands[3]) else None
    if size not in (4, 8, 16):
        raise unsupported(i)

    def execute(frame, mask):
        machine = frame.machine
        lanes = np.arange(frame.lanes) if mask is None else np.flatnonzero(mask)
        target = frame.read(i.operands[0].items[0], np.uint64)[lanes]
        source = frame.read(i.operands[1].items[0], np.uint64)[lanes]
        given = np.full(len(lanes), size) if source_size is None else frame.read(source_size)[lanes].astype(np.int64)
        given = np.minimum(given, size)
        access = SharedAccess(frame, target, size, i.line, "cp.async")
        ops = []
        for warp, _ in frame.active(mask):
            warp.copies.stamp += 1
            op = AsyncCopy(warp.copies.stamp)
            warp.copies.open.append(op)
            ops.append(op)
            mine = lanes // 32 == warp.index - frame.lo
            if machine.check_races:
                shadow = access.cta.shared_shadow
                cells = shadow.spans(access.offsets[mine][:, None], size).reshape(1, -1)
                slot = np.array([frame.cluster.actors.copy(warp.id)])
                shadow.write(cells, slot, np.array([op.stamp]), warp.clock[None], i.line, "cp.async", True)
                reads = mine & (given > 0)  # a lane that only fills with zeros may hold any address
                if reads.any():
                    machine.global_races.bulk(warp, int(slot[0]), op.stamp, source[reads], int(given[reads].min()),
                                              i.line, "cp.async", write=False)  # fmt: skip
            warp.tick()
        view, index = access.cta.shared_views[size], access.offsets // size

        def land():
            whole = given == size
            if whole.all():
                view[index] = machine.memory.load(source, size, i.line)
            else:
                data = np.zeros((len(lanes), size), np.uint8)
                for n in np.flatnonzero(given):
                    at = int(source[n])
                    data[n, : given[n]] = machine.memory.find(at, int(given[n]), i.line, "cp.async").bytes(
                        at, int(given[n])
                    )
                units = data.view(_U[size]).reshape(-1) if size <= 8 else data.view(np.uint64).reshape(-1, 2)
                view[index] = units
            for op in ops:
                op.read = op.done = True
            machine.dirty = True
            return True

        frame.cluster.loose.append(land)

    return execute


def _is_cache_policy(operand) -> bool:
    return isinstance(operand, Reg) and operand.bank == 64


@handles("cp.async.commit_group")
def commit_copies(i, program):
    def execute(frame, mask):
        for warp, _ in frame.active(mask):
            warp.copies.commit()

    return execute


@handles("cp.async.wait_group", "cp.async.wait_all")
def wait_copies(i, program):
    everything = "wait_all" in i.parts
    pending = 0 if everything else i.operands[0].value

    def execute(frame, mask):
        if everything:
            for warp, _ in frame.active(mask):
                warp.copies.commit()
        slot_of = frame.cluster.actors.copy
        return wait_for_groups(i, frame, mask, lambda w: w.copies, pending, "done", lambda w: [slot_of(w.id)],
                               "cp.async.wait_group")  # fmt: skip

    return execute


@handles("cp.async.mbarrier.arrive")
def arrive_after_copies(i, program):
    """cp.async.mbarrier.arrive: an arrival once the thread's earlier cp.async have landed (PTX ISA 9.7.13.15.13)."""
    no_increment = i.has("noinc")

    def execute(frame, mask):
        from .mbarrier import barrier_at

        machine = frame.machine
        for warp, first in frame.active(mask):
            lanes = [n for n in frame.active_lanes(mask) if n // 32 == first // 32]
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[0].items[0], first), i.line)
            if not no_increment:
                barrier.pending += len(lanes)
            ops = [op for group in (*warp.copies.groups, warp.copies.open) for op in group]
            clock, proxy = warp.release(), warp.async_clock.copy()
            clock[frame.cluster.actors.copy(warp.id)] = warp.copies.stamp

            count = len(lanes)

            def arrive(ops=ops, barrier=barrier, count=count, clock=clock, proxy=proxy):
                if not all(op.done for op in ops):
                    return None
                barrier.arrive(count, clock, proxy, i.line)
                machine.dirty = True
                return True

            frame.cluster.loose.append(arrive)

    return execute


# ldmatrix / stmatrix -----------------------------------------------------------------------------------------------


def _matrices(i) -> int:
    count = {"x1": 1, "x2": 2, "x4": 4}.get(next((p for p in i.parts if p in ("x1", "x2", "x4")), ""))
    if count is None or not i.has("m8n8") or i.type != "b16":
        raise unsupported(i)
    return count


def _row_addresses(frame, operand, count: int) -> np.ndarray:
    """Row addresses, shape (warps, count, 8): lane 8j + r holds row r of matrix j (PTX ISA 9.7.14.5.15)."""
    return frame.read(operand, np.uint64).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


@handles("ldmatrix")
def load_matrix(i, program):
    count, transpose = _matrices(i), i.has("trans")
    destinations = _items(i.operands[0])
    rows = np.array([r.row for r in destinations], np.intp)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        addresses = _row_addresses(frame, i.operands[1].items[0], count)
        access = SharedAccess(frame, addresses.reshape(-1), 16, i.line, "ldmatrix")
        access.record(None, write=False)
        data = access.cta.shared_views[16][access.offsets // 16]  # (warps * count * 8, 2) of uint64
        halves = data.view(np.uint16).reshape(-1, count, 8, 8)
        if transpose:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
        frame.W[rows] = words.transpose(1, 0, 2).reshape(count, -1)

    return execute


@handles("stmatrix")
def store_matrix(i, program):
    count, transpose = _matrices(i), i.has("trans")
    sources = _items(i.operands[1])
    rows = np.array([r.row for r in sources], np.intp)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        addresses = _row_addresses(frame, i.operands[0].items[0], count)
        access = SharedAccess(frame, addresses.reshape(-1), 16, i.line, "stmatrix")
        words = frame.W[rows].reshape(count, -1, 32).transpose(1, 0, 2)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if transpose:
            halves = np.ascontiguousarray(halves.transpose(0, 1, 3, 2))
        units = halves.reshape(-1, 8).view(np.uint64)
        view, index = access.cta.shared_views[16], access.offsets // 16
        access.record(None, write=True, same_value=(view[index] == units).all(1))
        view[index] = units

    return execute


__all__ = ["AsyncCopy", "Imm", "SharedAccess", "Symbol", "wait_for_groups"]
