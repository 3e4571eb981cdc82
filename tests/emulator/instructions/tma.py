"""Bulk and tensor copies of the async proxy, and cluster launch control (PTX ISA 9.7.9.25.4-5, 9.7.13.16).

A load is queued with its barrier; a store is two events, reading shared memory and writing global memory, which
`wait_group.read` and `wait_group` tell apart. The race check treats a load's write as if it happened from issue on, by
the actor of its mbarrier.
"""

from __future__ import annotations

import numpy as np

from ..barriers import MBarrier
from ..errors import EmulatorError, OutOfBounds
from ..layouts import swizzle
from ..lowering import PARAM_WINDOW
from ..ptx import Mem
from ..tensor_map import MAP_BYTES, TensorMap, decode
from . import handles, unsupported
from .loadstore import AsyncCopy, _is_cache_policy, wait_for_groups
from .mbarrier import barrier_at, used_by_async_proxy

_WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_REDUCED = {"f32": np.float32, "f16": np.float16, "f64": np.float64, "u32": np.uint32, "s32": np.int32,
            "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64}  # fmt: skip


def tensor_map(frame, address: int, line: int) -> TensorMap:
    """The tensor map behind a generic address. Raises `EmulatorError` if the bytes are none of the launch's maps."""
    machine = frame.machine
    if address >= PARAM_WINDOW:
        raw = machine.params[address - PARAM_WINDOW :][:MAP_BYTES].tobytes()
    else:
        raw = machine.memory.find(address, MAP_BYTES, line, "tensor map").bytes(address, MAP_BYTES).tobytes()
    index = decode(raw)
    if index is None or index not in machine.tensor_maps:
        raise EmulatorError(f"line {line}: 0x{address:x} holds no tensor map of this launch")
    return machine.tensor_maps[index]


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _box_chunks(tmap: TensorMap, offset: int) -> np.ndarray:
    """Indices of the 16-byte chunks of shared memory that hold a box, in the box's own order."""
    return swizzle(offset + 16 * np.arange(tmap.box_bytes // 16), tmap.swizzle) >> 4


def _global_window(machine, tmap: TensorMap, coordinates, line: int):
    """(slices of the box, strided view of global memory) of the part inside the tensor, or None."""
    window = tmap.window(coordinates)
    if window is None:
        return None
    slices, first, shape, strides = window
    size = tmap.element_bytes
    extent = sum((n - 1) * s for n, s in zip(shape, strides)) + size
    allocation = machine.memory.find(first, extent, line, "tensor copy")
    start = allocation.view(size)[(first - allocation.aligned) // size :]
    return slices, np.lib.stride_tricks.as_strided(start, shape, strides)


def _global_rows(tmap: TensorMap, coordinates) -> tuple[np.ndarray, int]:
    """Addresses of a box's innermost rows inside the tensor, and their bytes."""
    window = tmap.window(coordinates)
    if window is None:
        return np.zeros(0, np.uint64), 0
    _, first, shape, strides = window
    rows = sum(np.ix_(*(np.arange(n) * s for n, s in zip(shape[:-1], strides[:-1])))) if len(shape) > 1 else 0
    return (np.asarray(rows).reshape(-1) + first).astype(np.uint64), shape[-1] * tmap.element_bytes


def _reads_global(machine, warp, barrier, addresses: np.ndarray, size: int, line: int, what: str) -> None:
    """Race bookkeeping of a bulk load's source."""
    if machine.global_races is not None and len(addresses):
        stamp = barrier.stamp_base + barrier.phase + 1
        machine.global_races.bulk(warp, barrier.slot, stamp, addresses, size, line, what, write=False)


def _sixteen_byte_cells(cta, chunks: np.ndarray) -> np.ndarray:
    per = 16 // cta.shared_shadow.cell_bytes
    return (chunks[:, None] * per + np.arange(per)).reshape(1, -1)


def _record_load(frame, warp, cta, barrier: MBarrier, chunks: np.ndarray, line: int, what: str) -> tuple:
    """Race bookkeeping of an asynchronous write that completes on `barrier`; returns the issuer's clocks."""
    generic, proxy = warp.clock.copy(), warp.async_clock.copy()
    if frame.machine.check_races:
        seen = generic[None].copy()
        seen[0, barrier.slot] = 1 << 30  # copies on one barrier are one actor
        stamp = np.array([barrier.stamp_base + barrier.phase + 1])
        cta.shared_shadow.write(
            _sixteen_byte_cells(cta, chunks), np.array([barrier.slot]), stamp, seen, line, what, False
        )
    warp.tick()
    return generic, proxy


def _complete(barrier: MBarrier, size: int, clocks: tuple) -> None:
    barrier.complete_tx(size, *clocks)


def _check_shared(frame, address: int, size: int, alignment: int, line: int):
    cta, offset = frame.cluster.locate(address, size, line)
    if offset % alignment:
        raise OutOfBounds(f"line {line}: shared address 0x{offset:x} of a bulk copy is not {alignment}-byte aligned")
    return cta, offset


@handles("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def tensor_copy(i, program):
    """cp.async.bulk.tensor, tiled mode: load with optional multicast, store, reduction (PTX ISA 9.7.9.25.5)."""
    if any(p.startswith(("im2col", "tile::gather4", "tile::scatter4")) for p in i.parts):
        raise unsupported(i)
    to_shared = next(p for p in i.parts if p.startswith(("shared::", "global"))).startswith("shared::")
    if to_shared:
        return _tensor_load(i)
    return _tensor_store(i, _reduction(i) if i.op.startswith("cp.reduce") else None)


def _reduction(i):
    name = next((p for p in i.parts if p in ("add", "min", "max", "and", "or", "xor", "inc", "dec")), None)
    if name is None:
        raise unsupported(i)
    return name


def _coordinates(frame, operand: Mem, lane: int, tmap: TensorMap, line: int) -> list[int]:
    """The box's first element. A GPU traps (illegal instruction) where it is not 16-byte aligned along the innermost
    dimension: seen on an H100, and reported by others (triton-lang/triton#9112)."""
    found = [_signed(frame.lane_scalar(x, lane)) for x in operand.items[1].items]
    if len(found) != len(tmap.dims):
        raise EmulatorError(f"line {line}: {len(found)} coordinates for a map of rank {len(tmap.dims)}")
    if found[0] * tmap.element_bytes % 16:
        raise OutOfBounds(
            f"line {line}: misaligned tensor copy: innermost coordinate {found[0]} of {tmap.element} is not a multiple "
            "of 16 bytes"
        )
    return found


def _tensor_load(i):
    multicast = i.operands[3] if i.has("multicast::cluster") else None

    def execute(frame, mask):
        machine, cluster = frame.machine, frame.cluster
        for lane in frame.active_lanes(mask):
            warp = frame.lane_warp(lane)
            tmap = tensor_map(frame, frame.lane_scalar(i.operands[1].items[0], lane), i.line)
            coordinates = _coordinates(frame, i.operands[1], lane, tmap, i.line)
            # 16 bytes suffice without a swizzle (PTX ISA 5.5); the swizzled modes repeat every 128 bytes and more.
            alignment = 128
            cta, offset = _check_shared(
                frame, frame.lane_scalar(i.operands[0].items[0], lane), tmap.box_bytes, alignment, i.line
            )
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[2].items[0], lane), i.line)
            if multicast is None:
                targets = [(cta, barrier)]
            else:
                ranks = frame.lane_scalar(multicast, lane)
                targets = [(c, _same_barrier(c, barrier, i.line)) for c in cluster.ctas if ranks >> c.rank & 1]
            for target, target_barrier in targets:
                used_by_async_proxy(frame, target_barrier, i.line)
                chunks = _box_chunks(tmap, offset)
                _reads_global(machine, warp, target_barrier, *_global_rows(tmap, coordinates), i.line, "TMA load")
                clocks = _record_load(frame, warp, target, target_barrier, chunks, i.line, "TMA load")
                cluster.loose.append(
                    _load_op(machine, tmap, coordinates, target, chunks, target_barrier, clocks, i.line)
                )

    return execute


def _same_barrier(cta, barrier: MBarrier, line: int) -> MBarrier:
    found = cta.mbarriers.get(barrier.offset)
    if found is None:
        raise EmulatorError(f"line {line}: multicast to CTA {cta.rank}, which has no mbarrier at 0x{barrier.offset:x}")
    return found


def _load_op(machine, tmap, coordinates, cta, chunks, barrier, clocks, line):
    def land() -> bool:
        box = np.zeros(tmap.box[::-1], _WORD[tmap.element_bytes])
        part = _global_window(machine, tmap, coordinates, line)
        if part is not None:
            box[part[0]] = part[1]
        cta.shared_views[16][chunks] = box.reshape(-1).view(np.uint64).reshape(-1, 2)
        _complete(barrier, tmap.box_bytes, clocks)
        machine.count("bulk copies")
        return True

    return land


def _tensor_store(i, reduction):
    def execute(frame, mask):
        machine = frame.machine
        lanes = frame.active_lanes(mask)
        if len(lanes) > 1 and reduction is None:
            # Some kernels let all lanes issue the same store, which writes the same bytes 32 times.
            places = {(frame.lane_warp(n).id, frame.lane_scalar(i.operands[1].items[0], n)) for n in lanes}
            if len(places) == len({frame.lane_warp(n).id for n in lanes}):
                machine.note(f"line {i.line}: TMA store issued by {len(lanes)} lanes")
                lanes = [first for _, first in frame.active(mask)]
        for lane in lanes:
            tmap = tensor_map(frame, frame.lane_scalar(i.operands[0].items[0], lane), i.line)
            coordinates = _coordinates(frame, i.operands[0], lane, tmap, i.line)
            cta, offset = _check_shared(
                frame, frame.lane_scalar(i.operands[1].items[0], lane), tmap.box_bytes, 128, i.line
            )
            chunks = _box_chunks(tmap, offset)

            def write(raw, tmap=tmap, coordinates=coordinates, cta=cta):
                part = _global_window(machine, tmap, coordinates, i.line)
                if part is None:
                    return
                slices, view = part
                box = raw.view(_WORD[tmap.element_bytes]).reshape(tmap.box[::-1])[slices]
                _combine(view, box, reduction, tmap.element, i)

            _queue_store(frame, lane, cta, chunks, write, i, *_global_rows(tmap, coordinates), reduction is not None)

    return execute


def _combine(view, data, reduction, element: str, i) -> None:
    """Stores or reduces words into global memory."""
    if reduction is None:
        view[...] = data
        return
    if element in ("bf16",):
        from ..lanes import bf16_bits, bf16_value

        if reduction != "add":
            raise unsupported(i)
        view[...] = bf16_bits(bf16_value(view) + bf16_value(data))
        return
    typed, other = view.view(_REDUCED[element]), data.view(_REDUCED[element])
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}.get(reduction)  # fmt: skip
    if function is None:
        raise unsupported(i)
    typed[...] = function(typed, other)


def _queue_store(frame, lane: int, cta, chunks: np.ndarray, write, i, rows: np.ndarray, size: int, adds: bool) -> None:
    """Queues a bulk store of 16-byte chunks: first it reads shared memory, later `write(bytes)` hits global memory:
    `size` bytes at each of `rows`. adds: it is a reduction."""
    machine, warp = frame.machine, frame.lane_warp(lane)
    warp.bulk.stamp += 1
    op = AsyncCopy(warp.bulk.stamp)
    if machine.check_races:
        slot = np.array([frame.cluster.actors.bulk(warp.id)])
        cta.shared_shadow.read(_sixteen_byte_cells(cta, chunks), slot, np.array([op.stamp]), warp.clock[None], i.line,
                               "bulk store", warp.async_clock[None])  # fmt: skip
        if len(rows):
            machine.global_races.bulk(warp, frame.cluster.actors.bulk_write(warp.id), op.stamp, rows, size, i.line,
                                      "bulk store", write=True, strong=adds)  # fmt: skip
    warp.tick()
    held = []

    def advance() -> bool:
        machine.dirty = True
        if not op.read:
            held.append(cta.shared_views[16][chunks].reshape(-1))
            op.read = True
            return False
        write(held[0])
        op.done = True
        machine.count("bulk copies")
        return True

    warp.bulk.open.append(op)
    frame.cluster.loose.append(advance)


@handles("cp.async.bulk", "cp.reduce.async.bulk")
def bulk_copy(i, program):
    """cp.async.bulk and cp.reduce.async.bulk: contiguous bytes between global, shared and another CTA's shared
    memory.
    """
    spaces = [p for p in i.parts if p.startswith(("shared::", "global"))]
    reduction = _reduction(i) if i.op.startswith("cp.reduce") else None
    if spaces[:2] in (["shared::cluster", "global"], ["shared::cta", "global"]) and reduction is None:
        return _bulk_load(i)
    if spaces[:2] == ["shared::cluster", "shared::cta"] and reduction is None:
        return _bulk_to_cluster(i)
    if spaces[:2] == ["global", "shared::cta"]:
        return _bulk_store(i, reduction)
    raise unsupported(i)


def _bulk_size(frame, operand, lane: int, line: int) -> int:
    size = frame.lane_scalar(operand, lane)
    if size % 16:
        raise OutOfBounds(f"line {line}: bulk copy of {size} bytes, not a multiple of 16")
    return size


def _bulk_load(i):
    multicast = i.operands[4] if i.has("multicast::cluster") else None

    def execute(frame, mask):
        machine = frame.machine
        for lane in frame.active_lanes(mask):
            size = _bulk_size(frame, i.operands[2], lane, i.line)
            cta, offset = _check_shared(frame, frame.lane_scalar(i.operands[0].items[0], lane), size, 16, i.line)
            source = frame.lane_scalar(i.operands[1].items[0], lane)
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[3].items[0], lane), i.line)
            targets = [(cta, barrier)]
            if multicast is not None:
                ranks = frame.lane_scalar(multicast, lane)
                targets = [(c, _same_barrier(c, barrier, i.line)) for c in frame.cluster.ctas if ranks >> c.rank & 1]
            for target, target_barrier in targets:
                used_by_async_proxy(frame, target_barrier, i.line)
                chunks = np.arange(offset >> 4, (offset + size) >> 4)
                warp = frame.lane_warp(lane)
                _reads_global(machine, warp, target_barrier, np.array([source], np.uint64), size, i.line, "bulk load")
                clocks = _record_load(frame, warp, target, target_barrier, chunks, i.line, "bulk load")

                def land(target=target, offset=offset, source=source, size=size, barrier=target_barrier, clocks=clocks):
                    data = machine.memory.find(source, size, i.line, "bulk load").bytes(source, size)
                    target.shared[offset : offset + size] = data
                    _complete(barrier, size, clocks)
                    machine.count("bulk copies")
                    return True

                frame.cluster.loose.append(land)

    return execute


def _bulk_to_cluster(i):
    def execute(frame, mask):
        machine = frame.machine
        for lane in frame.active_lanes(mask):
            size = _bulk_size(frame, i.operands[2], lane, i.line)
            cta, offset = _check_shared(frame, frame.lane_scalar(i.operands[0].items[0], lane), size, 16, i.line)
            origin, start = _check_shared(frame, frame.lane_scalar(i.operands[1].items[0], lane), size, 16, i.line)
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[3].items[0], lane), i.line)
            warp = frame.lane_warp(lane)
            used_by_async_proxy(frame, barrier, i.line)
            if machine.check_races:
                seen = warp.clock[None].copy()
                seen[0, barrier.slot] = 1 << 30
                cells = _sixteen_byte_cells(origin, np.arange(start >> 4, (start + size) >> 4))
                stamp = np.array([barrier.stamp_base + barrier.phase + 1])
                origin.shared_shadow.read(cells, np.array([barrier.slot]), stamp, seen, i.line, "DSMEM copy",
                                          warp.async_clock[None])  # fmt: skip
            chunks = np.arange(offset >> 4, (offset + size) >> 4)
            clocks = _record_load(frame, warp, cta, barrier, chunks, i.line, "DSMEM copy")

            def land(cta=cta, offset=offset, origin=origin, start=start, size=size, barrier=barrier, clocks=clocks):
                cta.shared[offset : offset + size] = origin.shared[start : start + size]
                _complete(barrier, size, clocks)
                machine.count("bulk copies")
                return True

            frame.cluster.loose.append(land)

    return execute


def _bulk_store(i, reduction):
    element = i.type if reduction else "u8"
    if reduction and element not in _REDUCED and element != "bf16":
        raise unsupported(i)

    def execute(frame, mask):
        machine = frame.machine
        for lane in frame.active_lanes(mask):
            size = _bulk_size(frame, i.operands[2], lane, i.line)
            target = frame.lane_scalar(i.operands[0].items[0], lane)
            cta, offset = _check_shared(frame, frame.lane_scalar(i.operands[1].items[0], lane), size, 16, i.line)
            machine.memory.find(target, size, i.line, "bulk store")

            def write(raw, target=target, size=size):
                view = machine.memory.find(target, size, i.line, "bulk store").bytes(target, size)
                if reduction is None:
                    view[...] = raw.view(np.uint8)
                else:
                    word = np.uint16 if element in ("bf16", "f16") else np.dtype(_REDUCED[element])
                    _combine(view.view(word), raw.view(word), reduction, element, i)

            _queue_store(frame, lane, cta, np.arange(offset >> 4, (offset + size) >> 4), write, i,
                         np.array([target], np.uint64), size, reduction is not None)  # fmt: skip

    return execute


@handles("cp.async.bulk.commit_group")
def commit_bulk(i, program):
    def execute(frame, mask):
        for warp, _ in frame.active(mask):
            warp.bulk.commit()

    return execute


@handles("cp.async.bulk.wait_group")
def wait_bulk(i, program):
    attribute = "read" if i.has("read") else "done"
    pending = i.operands[0].value

    def execute(frame, mask):
        actors = frame.cluster.actors

        def slots(warp):
            return [actors.bulk(warp.id)] if attribute == "read" else [actors.bulk(warp.id), actors.bulk_write(warp.id)]

        return wait_for_groups(i, frame, mask, lambda w: w.bulk, pending, attribute, slots,
                               f"cp.async.bulk.wait_group{'.read' if attribute == 'read' else ''}")  # fmt: skip

    return execute


@handles("st.async", "red.async")
def store_async(i, program):
    """st.async: a store to another CTA that completes on its mbarrier (PTX ISA 9.7.9.13)."""
    from ..ptx import TYPE_BYTES, Vec

    if i.op.startswith("red") or not i.has("mbarrier::complete_tx::bytes") or i.type not in TYPE_BYTES:
        raise unsupported(i)
    width = TYPE_BYTES[i.type]
    sources = i.operands[1].items if isinstance(i.operands[1], Vec) else (i.operands[1],)

    def execute(frame, mask):
        machine = frame.machine
        for lane in frame.active_lanes(mask):
            size = width * len(sources)
            cta, offset = frame.cluster.locate(frame.lane_scalar(i.operands[0].items[0], lane), size, i.line)
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[2].items[0], lane), i.line)
            raw = np.array([frame.lane_scalar(x, lane) for x in sources], _WORD[width]).view(np.uint8)
            warp = frame.lane_warp(lane)
            clocks = warp.clock.copy(), warp.async_clock.copy()
            if machine.check_races:
                seen = clocks[0][None].copy()
                seen[0, barrier.slot] = 1 << 30
                cells = cta.shared_shadow.spans(np.array([[offset]]), size).reshape(1, -1)
                stamp = np.array([barrier.stamp_base + barrier.phase + 1])
                cta.shared_shadow.write(cells, np.array([barrier.slot]), stamp, seen, i.line, "st.async", False)
            warp.tick()

            def land(cta=cta, offset=offset, raw=raw, barrier=barrier, clocks=clocks):
                cta.shared[offset : offset + len(raw)] = raw
                _complete(barrier, len(raw), clocks)
                return True

            frame.cluster.loose.append(land)

    return execute


# Cluster launch control ----------------------------------------------------------------------------------------------


@handles("clusterlaunchcontrol.try_cancel")
def try_cancel(i, program):
    """Takes a cluster that has not started from the grid and hands its first CTA's index over (PTX ISA 9.7.13.16.1)."""
    everywhere = any(p.startswith("multicast") for p in i.parts)

    def execute(frame, mask):
        machine, cluster = frame.machine, frame.cluster
        for lane in frame.active_lanes(mask):
            cta, offset = _check_shared(frame, frame.lane_scalar(i.operands[0].items[0], lane), 16, 16, i.line)
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[1].items[0], lane), i.line)
            taken: list = []
            for target in cluster.ctas if everywhere else [cta]:
                target_barrier = _same_barrier(target, barrier, i.line)
                chunks = np.array([offset >> 4])
                clocks = _record_load(
                    frame, frame.lane_warp(lane), target, target_barrier, chunks, i.line, "try_cancel"
                )

                def land(target=target, offset=offset, barrier=target_barrier, clocks=clocks, taken=taken):
                    if not taken:
                        taken.append(machine.waiting.popleft() if machine.waiting else None)
                    answer = np.array([1, *taken[0]] if taken[0] else [0, 0, 0, 0], np.uint32)
                    target.shared[offset : offset + 16] = answer.view(np.uint8)
                    _complete(barrier, 16, clocks)
                    return True

                cluster.loose.append(land)

    return execute


@handles("clusterlaunchcontrol.query_cancel")
def query_cancel(i, program):
    """Reads the answer of try_cancel. Its bits are opaque in PTX; here: flag, x, y, z."""
    cancelled = "is_canceled" in i.op
    axis = next((n for n, a in enumerate("xyz") if f"get_first_ctaid::{a}" in i.op), None)
    if not cancelled and axis is None:
        raise unsupported(i)

    def execute(frame, mask):
        words = np.ascontiguousarray(frame.Q[i.operands[1].row]).view(np.uint32).reshape(-1, 4)
        if cancelled:
            frame.write(i.operands[0], words[:, 0] == 1, mask)
        else:
            frame.write(i.operands[0], words[:, 1 + axis], mask)

    return execute


__all__ = ["_is_cache_policy", "tensor_map"]
