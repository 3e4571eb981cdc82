"""The machine: clusters of CTAs, warps that diverge and rejoin, asynchronous agents, and a seeded scheduler.

Warps of a CTA that stand at the same instruction are executed together, as one `Group` whose registers are a column
range of the CTA's register banks; that is the emulator's vectorisation. A branch that warps decide differently splits
the group into ranges, one that lanes of a warp decide differently splits that warp off with a lane mask. Groups that
meet at one instruction join again. `Schedule.together` turns joining across warps off, so that every warp runs on its
own, which other seeds use to reach more interleavings.

Asynchronous work (bulk copies, MMAs, cp.async) is queued as closures. A scheduler draws, from the seed, whether
warps or agents move next, which copy ends first, and which are put off until most else has happened. Every drawn order
is one that hardware may show.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .barriers import Rendezvous
from .errors import Deadlock, EmulatorError, Livelock, OutOfBounds, TensorMemoryError, Unsupported
from .frame import SHARED_RANK_SHIFT, Frame
from .global_races import GlobalRaces
from .hazards import EARLY_LOAD, Marks
from .memory import GlobalMemory
from .program import BRANCH, HANDLED, RUN, Program
from .races import Actors, RaceLog, SharedShadow, TensorMemoryShadow
from .tensor_memory import TensorMemory

_WITHOUT_CONSEQUENCE = (
    "mbarrier.try_wait",
    "mbarrier.arrive.expect_tx",
    "elect.",
    "ret",
    "exit",
    "ld.param",
    "setmaxnreg",
)

LATEST = 500
"""Scheduler steps, at most, for which a copy is put off while something else can move."""

EXIT = object()
SPLIT = object()


@dataclass
class Blocked:
    """A handler's answer: the group waits until `condition(frame)` holds (which also takes over clocks).

    `advance`: continue behind the instruction then, instead of executing it again. `key`: groups that wait at one
    instruction for the same thing may join. `lanes`: those that wait, if the rest of their group need not.
    """

    condition: Callable
    why: Callable[[], str] | str
    advance: bool
    key: object = None
    lanes: np.ndarray | None = None


@dataclass(frozen=True)
class Schedule:
    """A legal way to interleave, drawn from a seed.

    asynchrony: "eager" completes asynchronous work as soon as it can, "lazy" only when no warp can run, "random" mixes.
    quantum: nodes a group executes before another may run. together: whether warps at one instruction run as one.
    spurious: probability that `try_wait` reports false though it need not. late: probability that a copy is put off
    when its turn comes, so that copies issued long after it may end before.
    """

    seed: int
    asynchrony: str
    quantum: int
    p_async: float
    together: bool
    spurious: float
    late: float

    @classmethod
    def from_seed(cls, seed: int) -> Schedule:
        rng = random.Random(seed)
        asynchrony = ("random", "lazy", "eager", "random")[seed % 4]
        return cls(seed, asynchrony, rng.choice((4, 20, 60)) if seed else 40, rng.choice((0.05, 0.3, 0.7)),
                   together=seed % 8 not in (2, 5), spurious=0.05 if seed % 3 == 2 else 0.0,
                   late=rng.choice((0.05, 0.2, 0.5)))  # fmt: skip


class Warp:
    """One warp: its clocks, its in-order tensor pipe, and its groups of asynchronous copies."""

    def __init__(self, cta: Cta, index: int) -> None:
        cluster = cta.cluster
        self.cta, self.index = cta, index
        self.id = cta.rank * cta.machine.warps_per_cta + index
        self.clock = cluster.clocks[self.id]
        self.async_clock = cluster.async_clocks[self.id]
        self.clock[self.id] = 1
        self.pipe_clock = np.zeros_like(self.clock)
        self.pipe_stamp = 0
        self.pipe: deque = deque()
        self.weight = cta.machine.rng.choice((1, 1, 4, 16))
        self.bulk = CopyGroups()
        self.copies = CopyGroups()
        self.wgmma = CopyGroups()
        self.pending_tmem_stores: list = []
        self.marks = Marks()
        # Global memory: what relaxed reads found published since the last fence, and what was seen at that fence.
        self.read_since_fence: dict = {}
        self.seen_at_fence: dict | None = None
        self.registers: int | None = None
        self.cluster_generation: int | None = None
        self.open_waits: set[int] = set()

    def tick(self) -> int:
        """Advances the warp's own stamp; returns the old one."""
        stamp = int(self.clock[self.id])
        self.clock[self.id] += 1
        return stamp

    def release(self) -> np.ndarray:
        """A copy of the clock for others to acquire; what the warp does next is not covered by it."""
        clock = self.clock.copy()
        self.clock[self.id] += 1
        return clock

    def acquire(self, generic: np.ndarray, proxy: np.ndarray) -> None:
        np.maximum(self.clock, generic, out=self.clock)
        np.maximum(self.async_clock, proxy, out=self.async_clock)


class CopyGroups:
    """Asynchronous operations in commit groups (cp.async, bulk stores, wgmma): open ones, then closed groups in order.
    An operation is any object with the attributes that the waiting instruction tests."""

    def __init__(self) -> None:
        self.open: list = []
        self.groups: list[list] = []
        self.waited = 0
        self.stamp = 0

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def older_than_last(self, n: int) -> list:
        groups = self.groups[: len(self.groups) - n] if n else self.groups
        return [op for group in groups for op in group]


class Group:
    """Warps `lo..hi` of a CTA at one instruction; with a `mask` only for a single, diverged warp."""

    __slots__ = ("blocked", "converging", "cta", "hi", "lo", "mask", "pc")

    def __init__(self, cta: Cta, lo: int, hi: int, pc: int, mask=None) -> None:
        self.cta, self.lo, self.hi, self.pc, self.mask = cta, lo, hi, pc, mask
        self.blocked: Blocked | None = None
        self.converging = False

    @property
    def frame(self) -> Frame:
        return self.cta.frame(self.lo, self.hi)


class Cta:
    """One thread block: register banks, shared memory, TMEM, barriers, groups of warps."""

    def __init__(self, cluster: Cluster, rank: int, ctaid: tuple[int, int, int]) -> None:
        machine = cluster.machine
        self.machine, self.cluster, self.rank, self.ctaid = machine, cluster, rank, ctaid
        self.first_warp = rank * machine.warps_per_cta
        self.shared = np.full(machine.shared_bytes, 0xFF, np.uint8)  # NaN in every float type
        self.shared_views = {w: self.shared.view(f"u{w}") for w in (1, 2, 4, 8)}
        self.shared_views[16] = self.shared.view(np.uint64).reshape(-1, 2)
        self.mbarriers: dict[int, object] = {}
        self.mbarrier_slots: dict[int, int] = {}
        self.mbarrier_stamps: dict[int, int] = {}
        self.named = [Rendezvous(machine, cluster.actors.count) for _ in range(16)]
        self.tmem = TensorMemory()
        lanes = 32 * machine.warps_per_cta
        self.local = np.zeros((lanes, machine.program.kernel.local_bytes), np.uint8)
        self.banks = machine.take_banks(lanes)
        self.warps = [Warp(self, i) for i in range(machine.warps_per_cta)]
        # One in-order wgmma pipe per warpgroup of four warps.
        self.wgmma_pipes = [deque() for _ in range(-(-machine.warps_per_cta // 4))]
        self.frames: dict[tuple[int, int], Frame] = {}
        self.special_values: dict[str, np.ndarray] = {}
        self.alive = np.arange(lanes) < machine.threads
        self.groups = self._initial_groups()
        if machine.check_races:
            name = f"shared memory of CTA {rank}"
            self.shared_shadow = SharedShadow(machine.shared_bytes, machine.program.shared_cell, cluster.actors,
                                              machine.races, name)  # fmt: skip
            self.tmem_shadow = TensorMemoryShadow(cluster.actors, machine.races, f"TMEM of CTA {rank}")

    def _initial_groups(self) -> list[Group]:
        full = self.machine.threads // 32
        if self.machine.schedule.together:
            groups = [Group(self, 0, full, 0)] if full else []
        else:
            groups = [Group(self, i, i + 1, 0) for i in range(full)]
        if self.machine.threads % 32:
            groups.append(Group(self, full, full + 1, 0, self.alive[32 * full : 32 * full + 32].copy()))
        return groups

    def frame(self, lo: int, hi: int) -> Frame:
        frame = self.frames.get((lo, hi))
        if frame is None:
            frame = self.frames[lo, hi] = Frame(self, lo, hi)
        return frame

    def special(self, name: str) -> np.ndarray:
        """Values of a special register for all lanes of the CTA (PTX ISA 10)."""
        if name in ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo"):
            return np.full(len(self.alive), self.machine.steps & 0xFFFFFFFF, np.uint32)
        values = self.special_values.get(name)
        if values is None:
            values = self.special_values[name] = self._special(name)
        return values

    def _special(self, name: str) -> np.ndarray:
        machine, thread = self.machine, np.arange(len(self.alive))
        lane = thread % 32
        per_lane = {
            "%laneid": lane,
            "%warpid": thread // 32,
            "%lanemask_eq": 1 << lane,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_gt": 0xFFFFFFFF & ~((2 << lane) - 1),
            "%lanemask_ge": 0xFFFFFFFF & ~((1 << lane) - 1),
        }
        if name in per_lane:
            return per_lane[name].astype(np.uint32)
        base, _, axis = name.partition(".")
        a = "xyz".index(axis) if axis else 0
        bx, by, _ = machine.block
        if base == "%tid":
            return (thread % bx, thread // bx % by, thread // (bx * by))[a].astype(np.uint32)
        grid, cluster = machine.grid, machine.cluster_shape
        uniform = {
            "%ntid": machine.block[a],
            "%ctaid": self.ctaid[a],
            "%nctaid": grid[a],
            "%cluster_ctaid": self.ctaid[a] % cluster[a],
            "%cluster_nctaid": cluster[a],
            "%clusterid": self.ctaid[a] // cluster[a],
            "%nclusterid": grid[a] // cluster[a],
            "%cluster_ctarank": self.rank,
            "%cluster_nctarank": len(self.cluster.shape_ranks),
            "%smid": self.cluster.index,
            "%nsmid": 148,
            "%nwarpid": machine.warps_per_cta,
            "%is_explicit_cluster": int(len(self.cluster.shape_ranks) > 1),
            "%dynamic_smem_size": machine.dynamic_shared,
            "%total_smem_size": machine.shared_bytes,
        }
        if base not in uniform:
            raise Unsupported(f"special register {name}")
        return np.full(len(thread), uniform[base], np.uint32)

    # Divergence
    def replace(self, group: Group, parts: list[Group]) -> None:
        self.groups.remove(group)
        self.groups.extend(parts)

    def branch(self, group: Group, taken: np.ndarray, target: int, fallthrough: int) -> None:
        """Splits a group whose lanes (`taken`, of the group's lanes) decide a branch differently."""
        if group.mask is not None:
            rest = group.mask & ~taken
            self.replace(group, [Group(self, group.lo, group.hi, target, taken & group.mask),
                                 Group(self, group.lo, group.hi, fallthrough, rest)])  # fmt: skip
            return
        by_warp = taken.reshape(-1, 32)
        parts: list[Group] = []
        for i, lanes in enumerate(by_warp):
            lo = group.lo + i
            if lanes.all() or not lanes.any():
                pc = target if lanes[0] else fallthrough
                last = parts[-1] if parts else None
                if last and self.machine.schedule.together and last.hi == lo and last.mask is None and last.pc == pc:
                    last.hi += 1
                else:
                    parts.append(Group(self, lo, lo + 1, pc))
            else:
                parts.append(Group(self, lo, lo + 1, target, lanes.copy()))
                parts.append(Group(self, lo, lo + 1, fallthrough, ~lanes))
        self.replace(group, parts)

    def split_warps(self, group: Group) -> None:
        self.replace(group, [Group(self, i, i + 1, group.pc) for i in range(group.lo, group.hi)])

    def hold(self, group: Group, blocked: Blocked, others: np.ndarray) -> Group:
        """Leaves the lanes that wait for more of their warp at the instruction; `group` is its `others` from now on."""
        held = Group(self, group.lo, group.hi, group.pc, blocked.lanes)
        held.blocked, held.converging = blocked, True
        group.mask = others
        self.groups.append(held)
        return held

    def retire(self, group: Group, leaving: np.ndarray | None) -> None:
        """Lanes of a group exit (None: all). The rest, if any, go on behind the instruction."""
        frame = group.frame
        alive = self.alive[frame.columns]
        active = alive if group.mask is None else group.mask
        gone = active.copy() if leaving is None else leaving & active
        alive[gone] = False
        stay = (active & ~gone).reshape(-1, 32)
        parts = []
        for i, lanes in enumerate(stay):
            if lanes.any():
                mask = None if lanes.all() else lanes.copy()
                parts.append(Group(self, group.lo + i, group.lo + i + 1, group.pc + 1, mask))
        self.replace(group, parts)
        for other in self.groups:
            if other.converging and group.lo <= other.lo < group.hi:  # nobody waits for lanes that have exited
                other.blocked, other.converging = None, False

    def join(self, group: Group) -> bool:
        """Joins a group with others at its instruction. True if `group` itself was absorbed or changed."""
        changed = False
        for other in list(self.groups):
            if other is group or other.pc != group.pc:
                continue
            if (other.blocked is None) != (group.blocked is None) and not (other.converging or group.converging):
                continue
            # A group that stands here but still waits for what the instruction before asked keeps its wait.
            if any(a.converging and b.blocked and not b.converging for a, b in ((group, other), (other, group))):
                continue
            both_wait = other.blocked and group.blocked and not (other.converging or group.converging)
            if both_wait and (other.blocked.key is None or other.blocked.key != group.blocked.key):
                continue
            if group.mask is not None and other.mask is not None and group.lo == other.lo:
                group.mask = group.mask | other.mask
                if group.mask.all():
                    group.mask = None
                if group.converging or other.converging:
                    group.blocked, group.converging = None, False
            elif (group.mask is None and other.mask is None and self.machine.schedule.together
                  and (group.hi == other.lo or group.lo == other.hi)):  # fmt: skip
                group.lo, group.hi = min(group.lo, other.lo), max(group.hi, other.hi)
            else:
                continue
            self.groups.remove(other)
            changed = True
        return changed

    def missing_lanes(self, frame: Frame, mask) -> bool:
        """Whether lanes are alive but not active, in warps that have active lanes."""
        if mask is None:
            return False
        per_warp = mask.reshape(-1, 32)
        missing = (self.alive[frame.columns] & ~mask).reshape(-1, 32).any(1) & per_warp.any(1)
        return bool(missing.any())


class Cluster:
    """CTAs that are resident together, their clocks, and the asynchronous operations in flight for them."""

    def __init__(self, machine: Machine, index: int, origin: tuple[int, int, int]) -> None:
        self.machine, self.index, self.origin = machine, index, origin
        cx, cy, cz = machine.cluster_shape
        self.shape_ranks = [(i, j, k) for k in range(cz) for j in range(cy) for i in range(cx)]
        warps = machine.warps_per_cta * len(self.shape_ranks)
        self.actors = Actors(warps, len(self.shape_ranks))
        self.clocks = np.zeros((warps, self.actors.count), np.int32)
        self.async_clocks = np.zeros((warps, self.actors.count), np.int32)
        # Work that may move in any order. It answers True when it is over, False when there is more of it to do, and
        # None when it cannot move yet. `late`: what is put off, with the step until which it is.
        self.loose: list[Callable[[], bool | None]] = []
        self.late: list[tuple[int, Callable[[], bool | None]]] = []
        # What warps learned of other clusters through global memory: (warp's slot, its clock then, clocks by cluster).
        self.acquired: list[tuple[int, int, dict]] = []
        self.barrier = Rendezvous(machine, self.actors.count)
        self.ctas: list[Cta] = []
        for rank, (i, j, k) in enumerate(self.shape_ranks):
            self.ctas.append(Cta(self, rank, (origin[0] + i, origin[1] + j, origin[2] + k)))
        self.warps = [w for c in self.ctas for w in c.warps]
        self.pipes = [w.pipe for w in self.warps] + [p for c in self.ctas for p in c.wgmma_pipes]

    @property
    def finished(self) -> bool:
        return not any(c.groups for c in self.ctas) and not self.late and not self.has_async()

    def has_async(self) -> bool:
        """Whether asynchronous work may move, rather than none or what is put off."""
        return bool(self.loose) or any(self.pipes)

    def put_off(self, work: Callable[[], bool | None]) -> None:
        self.loose.remove(work)
        self.late.append((self.machine.steps + self.machine.rng.randrange(LATEST), work))

    def take_back(self, at: int) -> None:
        self.loose.append(self.late.pop(at)[1])

    def take_back_due(self) -> None:
        for at in reversed(range(len(self.late))):
            if self.late[at][0] <= self.machine.steps:
                self.take_back(at)

    def locate(self, address: int, size: int, line: int) -> tuple[Cta, int]:
        """The CTA and byte offset of a shared::cluster address. Raises `OutOfBounds`."""
        rank, offset = address >> SHARED_RANK_SHIFT, address & ((1 << SHARED_RANK_SHIFT) - 1)
        if rank >= len(self.ctas) or offset + size > self.machine.shared_bytes:
            raise OutOfBounds(f"line {line}: shared address 0x{address:x} (+{size}); the CTA has "
                              f"{self.machine.shared_bytes} bytes, the cluster {len(self.ctas)} CTAs")  # fmt: skip
        return self.ctas[rank], offset


@dataclass
class Result:
    """What a launch did. `races` are errors, `notes` are observations that hardware tolerates."""

    races: list[str]
    notes: list[str]
    executed: bytearray
    program: Program
    steps: int
    async_steps: int
    counts: dict = field(default_factory=dict)
    barrier_uses: dict = field(default_factory=dict)
    real_waits: dict = field(default_factory=dict)
    consequential: set = field(default_factory=set)

    def not_executed(self) -> list[str]:
        """Barrier and memory instructions that never ran, as `line: text`."""
        return [f"{i.line}: {i.text}" for i in self.program.not_executed(self.executed)]


class Machine:
    """Executes one launch. See `launcher.launch` for the usual way in.

    resident: clusters in flight at once. max_steps: scheduler steps before `Livelock`. register_budget: registers a
    thread at launch, for the setmaxnreg pool, if not those that the kernel's directives imply. tolerate: kinds of race
    reports ("missing proxy fence", ...) that become notes.
    """

    def __init__(self, program: Program, memory: GlobalMemory, params: bytes, grid, block, *, cluster=(1, 1, 1),
                 dynamic_shared: int = 0, tensor_maps=None, schedule: Schedule | None = None, check_races: bool = True,
                 resident: int = 4, max_steps: int = 5_000_000, register_budget: int | None = None,
                 tolerate: tuple[str, ...] = (EARLY_LOAD,)) -> None:  # fmt: skip
        if program.unsupported:
            raise Unsupported("; ".join(program.unsupported[:5]))
        self.program, self.memory = program, memory
        self.params = np.frombuffer(bytes(params) + bytes(256), np.uint8)
        self.grid, self.block, self.cluster_shape = tuple(grid), tuple(block), tuple(cluster)
        if any(g % c for g, c in zip(self.grid, self.cluster_shape)):
            raise ValueError(f"grid {self.grid} is not a multiple of the cluster {self.cluster_shape}")
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.warps_per_cta = -(-self.threads // 32)
        self.dynamic_shared = dynamic_shared
        self.shared_bytes = -(-(program.kernel.dynamic_shared + dynamic_shared) // 16) * 16
        self.tensor_maps = tensor_maps or {}
        self.schedule = schedule or Schedule.from_seed(0)
        self.rng = random.Random(self.schedule.seed)
        self.check_races = check_races
        self.notes: list[str] = []
        self.races = RaceLog(self.notes, tuple(tolerate))
        self.hazards = program.hazards if check_races else None
        self.global_races = GlobalRaces(memory, program.global_cell, self.races) if check_races else None
        self.resident, self.max_steps = resident, max_steps
        self.executed = bytearray(len(program.nodes))
        self.counts: dict[str, int] = {}
        # By line, as (offset, phase): which phase of which mbarrier an instruction worked on (0: initialised it), and
        # which waits waited for a phase that had to happen first. Fault injection tells idle instructions by them.
        self.barrier_uses: dict[int, set[tuple[int, int]]] = {}
        self.real_waits: dict[int, set[tuple[int, int]]] = {}
        # Lines of waits behind which their warp did something that could depend on them.
        self.consequential: set[int] = set()
        self.steps = self.async_steps = 0
        self.dirty = True
        self.clusters: list[Cluster] = []
        self.cache: dict = {}
        self._spare_banks: list[dict] = []
        self.launch_registers = register_budget or program.kernel.launch_registers
        self.register_pool = None if not self.launch_registers else self.launch_registers * self.warps_per_cta * 32

    def take_banks(self, lanes: int) -> dict:
        if self._spare_banks:
            return self._spare_banks.pop()
        rows = self.program.banks
        banks = {16: np.zeros((rows[16], lanes), np.uint16), 32: np.zeros((rows[32], lanes), np.uint32),
                 64: np.zeros((rows[64], lanes), np.uint64), "pred": np.zeros((rows["pred"], lanes), bool),
                 128: np.zeros((rows[128], lanes, 2), np.uint64)}  # fmt: skip
        return banks

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def run(self) -> Result:
        """Runs the grid to its end. Raises an `EmulatorError` for whatever a GPU would fault or hang on."""
        (gx, gy, gz), (cx, cy, cz) = self.grid, self.cluster_shape
        origins = ((x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx))
        self.waiting = deque(origins)
        started = 0
        with np.errstate(all="ignore"):
            while self.waiting or self.clusters:
                while self.waiting and len(self.clusters) < self.resident:
                    self.clusters.append(Cluster(self, started, self.waiting.popleft()))
                    started += 1
                self.dirty = True
                self._run_until_a_cluster_ends()
        return Result(
            self.races.reports,
            self.notes,
            self.executed,
            self.program,
            self.steps,
            self.async_steps,
            self.counts,
            self.barrier_uses,
            self.real_waits,
            self.consequential,
        )

    def _run_until_a_cluster_ends(self) -> None:
        rng, schedule = self.rng, self.schedule
        while True:
            if self.dirty:
                self._poll()
            ready = [g for cluster in self.clusters for c in cluster.ctas for g in c.groups if g.blocked is None]
            for cluster in self.clusters:
                cluster.take_back_due()
            busy = [c for c in self.clusters if c.has_async()]
            if not ready and not busy:
                late = [c for c in self.clusters if c.late]
                if late:
                    cluster = rng.choice(late)
                    cluster.take_back(rng.randrange(len(cluster.late)))
                    continue
                finished = [c for c in self.clusters if c.finished]
                if finished:
                    for cluster in finished:
                        self._end(cluster)
                    return
                if self.dirty:
                    continue
                raise Deadlock(self._who_waits())
            if busy and (not ready or schedule.asynchrony == "eager"
                         or (schedule.asynchrony == "random" and rng.random() < schedule.p_async)):  # fmt: skip
                moved = rng.choice(busy)
                self._advance_async(moved)
            else:
                group = self._choose(ready)
                moved = group.cta.cluster
                self.steps += 1
                if self.steps > self.max_steps:
                    raise Livelock(f"no end after {self.max_steps} steps\n{self._who_waits()}")
                self._step(group)
            if (len(self.clusters) > 1 or self.waiting) and moved.finished:
                self._end(moved)
                return

    def _end(self, cluster: Cluster) -> None:
        self.clusters.remove(cluster)
        for cta in cluster.ctas:
            if self.hazards is not None and self.hazards.multiplied:
                self._check_warpgroups(cta)
            if cta.tmem.allocations:
                raise TensorMemoryError(f"CTA {cta.ctaid} ended with TMEM allocated: {cta.tmem.allocations}")
            for barrier in cta.mbarriers.values():
                if barrier.tx:
                    self.note(f"{barrier} left with transaction count {barrier.tx}")
            self._spare_banks.append(cta.banks)

    def _check_warpgroups(self, cta: Cta) -> None:
        """wgmma is the work of four warps: one that takes another path would hang them on a GPU (PTX ISA 9.7.15)."""
        for first in range(0, len(cta.warps), 4):
            issued = [warp.pipe_stamp for warp in cta.warps[first : first + 4]]
            if len(set(issued)) > 1:
                raise EmulatorError(
                    f"CTA {cta.ctaid}: the warps from {first} on, one warpgroup, executed {issued} wgmma"
                )

    def _poll(self) -> None:
        self.dirty = False
        for cluster in self.clusters:
            for cta in cluster.ctas:
                for group in cta.groups:
                    if group.blocked is not None and not group.converging and group.blocked.condition(group.frame):
                        group.blocked = None

    def _choose(self, ready: list[Group]) -> Group:
        rng = self.rng
        group = ready[0] if len(ready) == 1 else rng.choices(ready, [g.frame.warps[0].weight for g in ready])[0]
        if group.mask is not None and rng.random() > 0.06:
            # Lanes of one warp: let the ones that are behind catch up, so that they meet again.
            same = [g for g in ready if g.cta is group.cta and g.lo == group.lo and g.mask is not None]
            group = min(same, key=lambda g: g.pc)
        return group

    def _advance_async(self, cluster: Cluster) -> None:
        self.async_steps += 1
        choices: list = list(cluster.loose)
        choices += [p for p in cluster.pipes if p]
        pick = choices[self.rng.randrange(len(choices))] if len(choices) > 1 else choices[0]
        if isinstance(pick, deque):
            pick.popleft()()
            self.dirty = True
        elif self.rng.random() < self.schedule.late:
            cluster.put_off(pick)
        else:
            over = pick()
            if over:
                cluster.loose.remove(pick)
            elif over is None:
                cluster.put_off(pick)

    def _step(self, group: Group) -> None:
        nodes, cta, executed = self.program.nodes, group.cta, self.executed
        joins, hazards = self.program.joins, self.hazards
        quantum = self.schedule.quantum
        while quantum > 0:
            quantum -= 1
            node = nodes[group.pc]
            mask = group.mask
            executed[group.pc] = 1
            if node.kind == RUN:
                if hazards is not None:
                    hazards.step(group.frame, node, self.races)
                if mask is None:
                    node.run.full(group.frame, None)
                else:
                    node.run.masked(group.frame, mask)
                group.pc = node.next_pc
            elif node.kind == BRANCH:
                if not self._branch(group, node):
                    return
            elif node.kind == HANDLED:
                if not self._handle(group, node, mask):
                    return
            else:
                raise Unsupported(node.problem)
            if len(cta.groups) > 1 and joins[group.pc]:
                cta.join(group)

    def _branch(self, group: Group, node) -> bool:
        """Executes a branch. False if the group was split."""
        instruction = node.instruction
        if instruction.guard is None:
            group.pc = node.target
            return True
        taken = group.frame.P[instruction.guard.row]
        if instruction.guard_negated:
            taken = ~taken
        decided = taken if group.mask is None else taken[group.mask]
        if decided.all():
            group.pc = node.target
        elif not decided.any():
            group.pc = node.next_pc
        else:
            group.cta.branch(group, taken, node.target, node.next_pc)
            return False
        return True

    def _handle(self, group: Group, node, mask) -> bool:
        """Executes a handled instruction. False if the group ended, split or blocked."""
        instruction, frame = node.instruction, group.frame
        active = mask
        if instruction.guard is not None:
            guard = frame.P[instruction.guard.row]
            if instruction.guard_negated:
                guard = ~guard
            active = guard.copy() if mask is None else guard & mask
            if not active.any():
                group.pc = node.next_pc
                return True
            if mask is None and active.all():
                active = None
        if not instruction.op.startswith(_WITHOUT_CONSEQUENCE):
            for warp in frame.warps:
                if warp.open_waits:
                    self.consequential |= warp.open_waits
                    warp.open_waits.clear()
        if self.hazards is not None:
            self.hazards.step(frame, node, self.races)
        answer = node.execute(frame, active)
        if answer is None:
            group.pc = node.next_pc
            return True
        if answer is EXIT:
            group.cta.retire(group, active)
            return False
        if answer is SPLIT:
            group.cta.split_warps(group)
            return False
        if answer.lanes is not None:
            others = ~answer.lanes if group.mask is None else group.mask & ~answer.lanes
            if others.any():
                if group.hi - group.lo > 1:
                    group.cta.split_warps(group)
                    return False
                held = group.cta.hold(group, answer, others)
                going_on = self._handle(group, node, others)
                group.cta.join(held)
                return going_on
        group.blocked = answer
        if answer.advance:
            group.pc = node.next_pc
        if answer.condition is None:  # waits for the other lanes of its warp
            group.converging = True
        group.cta.join(group)
        return False

    def _who_waits(self) -> str:
        lines = [f"deadlock (seed {self.schedule.seed}): no warp can run and nothing is in flight"]
        for cluster in self.clusters:
            for cta in cluster.ctas:
                for group in cta.groups:
                    lines.append("  " + self._position(cta, group))
        return "\n".join(lines)

    def _position(self, cta: Cta, group: Group) -> str:
        warps = f"warp {group.lo}" if group.hi == group.lo + 1 else f"warps {group.lo}..{group.hi - 1}"
        lanes = "" if group.mask is None else f" lanes {np.flatnonzero(group.mask).tolist()}"
        why = group.blocked.why if group.blocked else "ready"
        at = group.pc - (group.blocked is not None and group.blocked.advance)
        instruction = self.program.kernel.instructions[at]
        return (f"CTA {cta.ctaid} {warps}{lanes} at line {instruction.line} `{instruction.text[:70]}`: "
                f"{why() if callable(why) else why}")  # fmt: skip
