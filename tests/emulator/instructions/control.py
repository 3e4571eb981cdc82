"""Control flow, warp collectives, named and cluster barriers (PTX ISA 9.7.9.5-6, 9.7.12, 9.7.13)."""

from __future__ import annotations

import numpy as np

from ..errors import EmulatorError
from ..ptx import Imm, Pair, Reg, Sink
from . import handles, unsupported

LANES = np.arange(32)


def machine_module():
    from .. import machine  # the machine imports this package while it loads

    return machine


@handles("ret", "exit")
def leave(i, program):
    def execute(frame, mask):
        for warp, _ in frame.active(mask):
            if warp.bulk.open or len(warp.bulk.groups) > warp.bulk.waited:
                frame.machine.note(f"line {i.line}: warp {warp.index} exits with a bulk store that it did not wait for")
        return machine_module().EXIT

    return execute


@handles("trap", "brkpt")
def trap(i, program):
    def execute(frame, mask):
        raise EmulatorError(f"line {i.line}: trap executed by CTA {frame.cta.ctaid} warp {frame.lo}")

    return execute


@handles(
    "prefetch",
    "prefetchu",
    "applypriority",
    "nanosleep",
    "pmevent",
    "griddepcontrol",
    "cp.async.bulk.prefetch",
    "tcgen05.fence",
)
def no_effect(i, program):
    """Hints. And `tcgen05.fence` orders the tensor pipe against barriers; kernels known to
    be good on hardware have none, so its absence is no verdict (docs/emulator.md).
    """
    return lambda frame, mask: None


@handles("membar", "fence.sc", "fence.acq_rel", "fence.acquire", "fence.release")
def memory_fence(i, program):
    """fence, membar (PTX ISA 9.7.13.4): accesses are sequentially consistent here, so all that a fence changes is what
    the race check of global memory lets the warp's relaxed accesses publish and take over."""
    inside = i.has("cta")

    def execute(frame, mask):
        races = frame.machine.global_races
        if races is not None and not inside:
            for warp, _ in frame.active(mask):
                races.fence(warp)

    return execute


@handles("createpolicy")
def cache_policy(i, program):
    return lambda frame, mask: frame.write(i.operands[0], np.uint64(0), mask)


@handles("setmaxnreg")
def set_max_registers(i, program):
    """setmaxnreg (PTX ISA 9.7.19.5): counts of all warps may never exceed what the block was launched with."""
    count = i.operands[0].value
    if count % 8 or not 24 <= count <= 256:
        raise unsupported(i)

    def execute(frame, mask):
        cta, machine = frame.cta, frame.machine
        allowed = machine.register_pool
        for warp, _ in frame.active(mask):
            if allowed is not None:
                before = warp.registers or machine.launch_registers
                if i.has("inc") != (count >= before) and count != before:
                    raise EmulatorError(f"line {i.line}: setmaxnreg from {before} to {count} in the wrong direction")
            warp.registers = count
        if allowed is not None:
            used = sum(w.registers or machine.launch_registers for w in cta.warps) * 32
            if used > allowed:
                # `inc` blocks until other warps have released theirs; only a total that never fits is an error.
                warps = [w for w, _ in frame.active(mask)]

                def fits(_):
                    return sum(w.registers or machine.launch_registers for w in cta.warps) * 32 <= allowed

                return machine_module().Blocked(
                    fits,
                    lambda: f"setmaxnreg {count} for {len(warps)} warps: pool of {allowed} registers exceeded",
                    True,
                )
            machine.dirty = True
        return None

    return execute


# Warp collectives --------------------------------------------------------------------------------------------------


def whole_warp(operand) -> bool:
    return isinstance(operand, Imm) and operand.value & 0xFFFFFFFF == 0xFFFFFFFF


def participants(frame, mask, operand) -> np.ndarray:
    """For each lane, [warps, 32, 32], the active lanes that its membermask names."""
    active = np.ones((frame.hi - frame.lo, 32), bool) if mask is None else mask.reshape(-1, 32)
    if whole_warp(operand):
        return np.broadcast_to(active[:, None, :], (len(active), 32, 32))
    named = frame.read(operand, np.uint32).reshape(-1, 32, 1)
    return (named >> LANES.astype(np.uint32) & 1).astype(bool) & active[:, None, :]


def waiting_lanes(i, frame, mask, operand) -> np.ndarray:
    """Which active lanes wait for others at a `.sync` instruction, by each lane's own membermask.

    A lane waits for all that its mask names and that have not exited; those must give the same mask (PTX ISA 9.7.9.6,
    9.7.13.2-6). So what the mask's register holds in lanes that have not come is not read, and lanes whose masks do
    not overlap do not wait for each other. Raises `EmulatorError` where the masks contradict each other.
    """
    active = np.ones(frame.lanes, bool) if mask is None else mask
    together, named = participants(frame, mask, operand), participants(frame, None, operand)
    if not named.diagonal(axis1=1, axis2=2).reshape(-1)[active].all():
        raise EmulatorError(f"line {i.line}: a lane executes with a membermask that does not name it")
    masks = frame.read(operand, np.uint32).reshape(-1, 32)
    if (together & (masks[:, :, None] != masks[:, None, :])).reshape(-1, 32)[active].any():
        raise EmulatorError(f"line {i.line}: lanes that name each other give different membermasks")
    alive = frame.cta.alive[frame.columns].reshape(-1, 1, 32)
    return active & (named & alive & ~together).any(2).reshape(-1)


def unconverged(i, frame, mask, operand):
    """What a `.sync` instruction returns while it waits for lanes that are elsewhere, else None.

    operand: the membermask; None: the whole warp, aligned.
    """
    if mask is None and (operand is None or whole_warp(operand)):
        return None
    waiting = None if operand is None else waiting_lanes(i, frame, mask, operand)
    if not (frame.cta.missing_lanes(frame, mask) if waiting is None else waiting.any()):
        return None
    why = f"waits for the other lanes of its warp (line {i.line})"
    return machine_module().Blocked(None, why, False, lanes=waiting)


@handles("bar.warp.sync")
def warp_sync(i, program):
    return lambda frame, mask: unconverged(i, frame, mask, i.operands[0])


@handles("elect.sync")
def elect(i, program):
    destination = i.operands[0]

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, i.operands[1]):
            return blocked
        leader = participants(frame, mask, i.operands[1]).argmax(2).reshape(-1)
        frame.write(destination.first, leader.astype(np.uint32), mask)
        frame.write(destination.second, np.tile(LANES, frame.hi - frame.lo) == leader, mask)

    return execute


@handles("shfl.sync")
def shuffle(i, program):
    mode = i.parts[2]
    destination, predicate = i.operands[0], Sink()
    if isinstance(destination, Pair):
        destination, predicate = destination
    if mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(i)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, i.operands[4]):
            return blocked
        warps = frame.hi - frame.lo
        lane = np.tile(LANES, warps)
        b, c = frame.read(i.operands[2]).astype(np.int64), frame.read(i.operands[3]).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        high, low = lane & segment | clamp & ~segment, lane & segment
        if mode == "up":
            source = lane - b
            inside = source >= high
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": low | b & ~segment}[mode]
            inside = source <= high
        source = np.where(inside, source, lane) + 32 * (np.arange(len(lane)) // 32)
        frame.write(destination, frame.read(i.operands[1])[source], mask)
        frame.write(predicate, inside, mask)

    return execute


@handles("vote.sync")
def vote(i, program):
    mode = i.parts[2]

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, i.operands[2]):
            return blocked
        together = participants(frame, mask, i.operands[2])
        votes = together & frame.read(i.operands[1]).reshape(-1, 1, 32)
        if mode == "ballot":
            value = (votes.astype(np.uint64) << LANES.astype(np.uint64)).sum(2).astype(np.uint32)
        elif mode == "any":
            value = votes.any(2)
        elif mode == "all":
            value = (votes | ~together).all(2)
        else:  # uni
            value = (votes | ~together).all(2) | ~votes.any(2)
        frame.write(i.operands[0], value.reshape(-1), mask)

    return execute


@handles("activemask")
def active_mask(i, program):
    def execute(frame, mask):
        lanes = np.ones(frame.lanes, bool) if mask is None else mask
        bits = (lanes.reshape(-1, 32).astype(np.uint64) << LANES.astype(np.uint64)).sum(1)
        frame.write(i.operands[0], np.repeat(bits, 32).astype(np.uint32), mask)

    return execute


@handles("redux.sync")
def reduce_warp(i, program):
    """redux.sync over the member lanes: integers and bits, on sm_100 also f32 (PTX ISA 9.7.13.6)."""
    name, ty = i.parts[2], i.type
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}.get(name)  # fmt: skip
    if function is None or ty not in ("s32", "u32", "b32", "f32") or i.has("abs"):
        raise unsupported(i)
    if ty == "f32" and not i.has("NaN"):
        function = {"min": np.fmin, "max": np.fmax}[name]
    dtype = {"s32": np.int32, "f32": np.float32}.get(ty, np.uint32)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, i.operands[2]):
            return blocked
        together = participants(frame, mask, i.operands[2]).reshape(-1, 32)
        values = frame.read(i.operands[1]).view(dtype).reshape(-1, 32)
        lanes = np.arange(frame.lanes)
        first = together.argmax(1) + lanes // 32 * 32  # stands for all that name the same lanes
        out = np.zeros(frame.lanes, dtype)
        for lane in np.flatnonzero((first == lanes) & together.any(1)):
            out[lane] = function.reduce(values[lane // 32][together[lane]])
        frame.write(i.operands[0], out[first].view(np.uint32), mask)

    return execute


# Barriers ----------------------------------------------------------------------------------------------------------


@handles("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.arrive", "barrier.arrive", "barrier.cta.arrive")
def named_barrier(i, program):
    """barrier.cta: 16 named barriers a CTA, counted in threads by whole warps (PTX ISA 9.7.13.1)."""
    waits = "sync" in i.parts
    if len(i.operands) > 2:
        raise unsupported(i)

    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        machine, cta = frame.machine, frame.cta
        warps = [warp for warp, _ in frame.active(mask)]
        identifiers = frame.read(i.operands[0]) if mask is None else frame.read(i.operands[0])[mask]
        if not (identifiers == identifiers[0]).all():
            if frame.hi - frame.lo > 1:
                return machine_module().SPLIT
            raise EmulatorError(f"line {i.line}: lanes of a warp name different barriers")
        number = int(identifiers[0])
        if number >= 16:
            raise EmulatorError(f"line {i.line}: barrier {number}")
        whole = 32 * machine.warps_per_cta
        expected = frame.scalar(i.operands[1], mask, i.line) if len(i.operands) > 1 else whole
        barrier = cta.named[number]
        name = f"named barrier {number}"
        generation = barrier.arrive(32 * len(warps), expected, warps, i.line, name)
        if not waits:
            return None

        def passed(current):
            if barrier.generation < generation:
                return False
            clocks = barrier.completed[generation]
            for warp in current.warps:
                warp.acquire(clocks.generic, clocks.proxy)
            return True

        if passed(frame):
            return None
        return machine_module().Blocked(
            passed,
            lambda: f"{name}, phase {barrier.generation}: {barrier.arrived} of {barrier.expected} threads arrived",
            True,
            ("named", number, generation),
        )

    return execute


@handles("barrier.cluster.arrive")
def cluster_arrive(i, program):
    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        warps = [warp for warp, _ in frame.active(mask)]
        total = 32 * len(frame.cluster.warps)
        generation = frame.cluster.barrier.arrive(32 * len(warps), total, warps, i.line, "cluster barrier")
        for warp in warps:
            warp.cluster_generation = generation

    return execute


@handles("barrier.cluster.wait")
def cluster_wait(i, program):
    def execute(frame, mask):
        if blocked := unconverged(i, frame, mask, None):
            return blocked
        barrier = frame.cluster.barrier
        generations = {warp.cluster_generation for warp, _ in frame.active(mask)}
        if len(generations) > 1:
            return machine_module().SPLIT
        generation = generations.pop()
        if generation is None:
            raise EmulatorError(f"line {i.line}: barrier.cluster.wait without an arrive")

        def passed(frame_now):
            if barrier.generation < generation:
                return False
            clocks = barrier.completed[generation]
            for warp in frame_now.warps:
                warp.acquire(clocks.generic, clocks.proxy)
            return True

        if passed(frame):
            return None
        return machine_module().Blocked(
            passed,
            lambda: (
                f"cluster barrier, phase {barrier.generation}: {barrier.arrived} of {barrier.expected} threads arrived"
            ),
            True,
            ("cluster", generation),
        )

    return execute


@handles("mov.b128")
def move_wide(i, program):
    """mov.b128 between a 128-bit register and a pair of 64-bit ones."""
    destination, source = i.operands

    def execute(frame, mask):
        if isinstance(destination, Reg):
            halves = (np.stack([frame.read(x, np.uint64) for x in source.items], 1) if not isinstance(source, Reg)
                      else frame.Q[source.row])  # fmt: skip
            if mask is None:
                frame.Q[destination.row] = halves
            else:
                frame.Q[destination.row][mask] = halves[mask]
        else:
            for n, item in enumerate(destination.items):
                frame.write(item, frame.Q[source.row][:, n], mask)

    return execute
