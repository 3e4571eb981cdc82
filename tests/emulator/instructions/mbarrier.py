"""mbarrier instructions and the proxy fences (PTX ISA 9.7.13.15, 9.7.13.4)."""

from __future__ import annotations

import numpy as np

from ..barriers import MBarrier
from ..errors import BarrierMisuse, EmulatorError
from ..ptx import Mem, Sink
from . import handles, unsupported

INITIALISED_AGAIN = "mbarrier initialised again"


def barrier_at(frame, address: int, line: int):
    """The live mbarrier at a shared address. Raises `BarrierMisuse`."""
    cta, offset = frame.cluster.locate(address, 8, line)
    barrier = cta.mbarriers.get(offset)
    if barrier is None:
        raise BarrierMisuse(f"line {line}: no mbarrier was initialised at 0x{offset:x} of CTA {cta.rank}")
    frame.machine.barrier_uses.setdefault(line, set()).add((offset, barrier.phase + 1))
    return barrier


def used_by_async_proxy(frame, barrier, line: int) -> None:
    """Reports a barrier whose initialisation was never fenced for the async proxy (PTX ISA 9.7.13.15.9).

    Triton leaves the fence out for some barriers and runs on hardware all the same; see `tolerate` of `Machine`.
    """
    machine = frame.machine
    if machine.check_races and not barrier.visible_to_async:
        machine.races.add("missing mbarrier init fence", line, barrier.offset,
                          f"line {line} hands {barrier} to the async proxy, its init was not fenced")  # fmt: skip


@handles("fence.proxy.async", "fence.proxy.alias", "fence.proxy.tensormap")
def proxy_fence(i, program):
    def execute(frame, mask):
        for warp, _ in frame.active(mask):
            np.maximum(warp.async_clock, warp.clock, out=warp.async_clock)
            for barrier in frame.cta.mbarriers.values():
                if barrier.owner is warp:
                    barrier.visible_to_async = True

    return execute


@handles("fence.mbarrier_init")
def init_fence(i, program):
    def execute(frame, mask):
        for warp, _ in frame.active(mask):
            for cta in frame.cluster.ctas:
                for barrier in cta.mbarriers.values():
                    if barrier.owner is warp:
                        barrier.visible_to_async = True

    return execute


def _mark(cta, offset: int, warp, line: int, what: str, live: bool) -> None:
    """Race bookkeeping where an mbarrier is made or unmade: while it is live its memory serves for nothing else."""
    if cta.machine.check_races:
        shadow, slot = cta.shared_shadow, np.array([warp.id])
        cells = shadow.spans(np.array([[offset]]), 8)
        shadow.barriers[cells] = False
        shadow.write(cells, slot, warp.clock[slot], warp.clock[None], line, what, True)
        shadow.barriers[cells] = live


@handles("mbarrier.init")
def init(i, program):
    def execute(frame, mask):
        machine = frame.machine
        made: set = set()
        for lane in frame.active_lanes(mask):
            address = frame.lane_scalar(i.operands[0].items[0], lane)
            count = frame.lane_scalar(i.operands[1], lane)
            if not 1 <= count < 1 << 20:
                raise BarrierMisuse(f"line {i.line}: mbarrier count {count}")
            cta, offset = frame.cluster.locate(address, 8, i.line)
            if offset % 8:
                raise BarrierMisuse(f"line {i.line}: mbarrier at misaligned 0x{offset:x}")
            old = cta.mbarriers.get(offset)
            warp = frame.lane_warp(lane)
            if old is not None:
                again = f"line {i.line}: {old} is initialised again while it is live"
                if not (old.owner is warp and old.phase == 0 and old.pending == old.count == count):
                    raise BarrierMisuse(again)
                if old not in made and machine.check_races:  # lanes of a warp may say the same at once
                    machine.races.add(INITIALISED_AGAIN, i.line, offset, again + ", though nothing has used it")
            slot = cta.mbarrier_slots.get(offset)
            if slot is None:
                slot = frame.cluster.actors.new_mbarrier(f"mbarrier 0x{offset:x} of CTA {cta.rank}")
                cta.mbarrier_slots[offset] = slot
            barrier = MBarrier(cta, offset, count, frame.cluster.actors.count, slot, warp)
            # A slot outlives its barrier when the memory is reused: stamps must keep rising.
            barrier.stamp_base = cta.mbarrier_stamps.get(offset, 0)
            cta.mbarriers[offset] = barrier
            made.add(barrier)
            machine.barrier_uses.setdefault(i.line, set()).add((offset, 0))
            _mark(cta, offset, warp, i.line, "mbarrier.init", live=True)

    return execute


@handles("mbarrier.inval")
def invalidate(i, program):
    def execute(frame, mask):
        lane = frame.active_lanes(mask)[0]
        barrier = barrier_at(frame, frame.lane_scalar(i.operands[0].items[0], lane), i.line)
        barrier.cta.mbarrier_stamps[barrier.offset] = barrier.stamp_base + barrier.phase + 1
        del barrier.cta.mbarriers[barrier.offset]
        _mark(barrier.cta, barrier.offset, frame.lane_warp(lane), i.line, "mbarrier.inval", live=False)

    return execute


def _address_position(i) -> int:
    return next(n for n, operand in enumerate(i.operands) if isinstance(operand, Mem))


@handles("mbarrier.arrive.expect_tx", "mbarrier.arrive", "mbarrier.arrive_drop")
def arrive(i, program):
    """mbarrier.arrive, with an optional count and with expect_tx, which first raises the transaction count."""
    if i.has("noComplete") or i.has("arrive_drop"):
        raise unsupported(i)
    at = _address_position(i)
    if at == 1 and not isinstance(i.operands[0], Sink) and any(
            op is not i and i.operands[0] in op.operands for op in program.kernel.instructions):  # fmt: skip
        raise unsupported(i)  # the returned state is used: only parity waits are modelled
    expects = i.has("expect_tx")
    extra = i.operands[at + 1] if len(i.operands) > at + 1 else None

    def execute(frame, mask):
        totals: dict = {}
        for lane in frame.active_lanes(mask):
            address = frame.lane_scalar(i.operands[at].items[0], lane)
            value = 1 if extra is None else frame.lane_scalar(extra, lane)
            key = (frame.lane_warp(lane), address)
            count, size = totals.get(key, (0, 0))
            totals[key] = (count + 1, size + value) if expects else (count + value, size)
        for (warp, address), (count, size) in totals.items():
            barrier = barrier_at(frame, address, i.line)
            barrier.tx += size
            barrier.arrive(count, warp.release(), warp.async_clock, i.line)

    return execute


@handles("mbarrier.expect_tx")
def expect(i, program):
    def execute(frame, mask):
        for lane in frame.active_lanes(mask):
            barrier = barrier_at(frame, frame.lane_scalar(i.operands[0].items[0], lane), i.line)
            barrier.tx += frame.lane_scalar(i.operands[1], lane)

    return execute


@handles("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")
def wait(i, program):
    """try_wait.parity, test_wait.parity. A try_wait suspends its warp instead of spinning; a schedule may make it
    report false anyway, which PTX allows, to exercise the loop around it."""
    suspends = i.parts[1] == "try_wait"
    destination, place, phase = i.operands[:3]

    def execute(frame, mask):
        from ..machine import SPLIT, Blocked

        machine = frame.machine
        addresses, parities = frame.read(place.items[0], np.uint64), frame.read(phase)
        if mask is not None:
            addresses, parities = addresses[mask], parities[mask]
        address, parity = int(addresses[0]), int(parities[0]) & 1
        if len(addresses) > 1 and not ((addresses == addresses[0]).all() and (parities == parities[0]).all()):
            if frame.hi - frame.lo > 1:
                return SPLIT
            raise EmulatorError(f"line {i.line}: lanes of a warp wait for different mbarriers or phases")
        barrier = barrier_at(frame, address, i.line)
        spurious = machine.schedule.spurious and machine.rng.random() < machine.schedule.spurious
        if not barrier.passes(parity) and (not suspends or spurious):
            frame.write(destination, np.zeros(frame.lanes, bool), mask)
            return None
        frame.write(destination, np.ones(frame.lanes, bool), mask)
        for warp, _ in frame.active(mask):
            warp.open_waits.add(i.line)
        target = barrier.phase + (0 if barrier.passes(parity) else 1)

        def passed(current):
            if barrier.phase < target:
                return False
            if target > 0:
                machine.real_waits.setdefault(i.line, set()).add((barrier.offset, target))
            for warp in current.warps:
                warp.acquire(barrier.completed.generic, barrier.completed.proxy)
            return True

        if passed(frame):
            return None
        return Blocked(passed, lambda: f"parity {parity} of {barrier.state()}", True,
                       ("mbarrier", barrier.cta.rank, barrier.offset, barrier.phase, parity))  # fmt: skip

    return execute
