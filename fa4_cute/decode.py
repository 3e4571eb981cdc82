"""The decode kernel: few query rows on long KV caches, contiguous or paged, split over the keys.

One block a multiprocessor, all of whose shared memory is a ring of key tiles: decoding does next to no arithmetic, and
what counts is that memory is never idle. Roles:

- load (the last warp): finds the block's work (`decode_shares`), tells the others of it in runs, chunks of a sequence
  that follow one another, and brings their keys and values by TMA, as far ahead as the ring goes;
- the other warps: the n-th tile of a chunk is warp `n % WARPS`'s. Each has a softmax of its own and waits for no other
  until the chunk ends; then their results are folded in order, through shared memory.

Rings (arrivals that complete a slot's full / empty barrier): tiles (TMA bytes / the warp whose tile it is); runs (the
load warp's elected lane / every thread of the others).

A chunk's result is folded into its sequence's in registers while one block has all that came before; else it goes to
memory as a part, and the block that arrives last at the sequence's counter folds the parts, in the same order and by
the same operations. If one block ends with chunks 0 to 4 of a sequence and the next begins with 5 to 9, the first
stores one part, says that it holds five, and arrives with five; the other stores five and arrives with five.

Products are those of a warp, 16 query rows (those of a KV head's group, and of several positions) by 8 keys or columns
of V. Statistics are those of `softmax`; accumulators lie as `sm90_softmax` says.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023) for the split; Kwon et al., "PagedAttention"
(2023) for the page table; Shah et al., "FlashAttention-3" (2024) for packing the query heads of a KV head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.cute.runtime import make_fake_stream

from fa4_cute.decode_config import BLOCK_COLUMNS, PART_EXTRA, WARP_ROWS, WARPS, CacheKinds, DecodeConfig, config_for
from fa4_cute.decode_shares import Calls, find_drawn, find_share, first_tile, keys_of, next_in_row, start_draws
from fa4_cute.params import DTYPES, Values, fake_numbers, fake_rows
from fa4_cute.pipelines import Cursor, Ring
from fa4_cute.ranges import Window, visible_keys
from fa4_cute.schedule import LANES, ask, retire
from fa4_cute.sm90_softmax import Softmax
from fa4_cute.softcap import Cap, cap_of
from fa4_cute.softmax import LOG2_E, finish, pack, rescale_factor
from fa4_cute.views import boxes

THREADS = 32 * WARPS
"""Of the warps that compute."""
COMPUTE_BARRIER, READY_BARRIER = 1, 2
"""Named barriers: of these warps, and of all when the rings are ready."""
HELD = 2**16
"""Unit of the second count in `Splits.arrivals`: with two counts in one word, one atomic changes and tells both."""
RUN_WORDS = 4
"""Words that tell of a run: the pair, its first chunk, that one's first tile, and its tiles, 0 where no run is left."""
SOON = 4
"""Tiles before the end of a run at which the next sequence is asked for, if it is drawn: it comes in time."""
LINE = 128
"""Bytes that the L2 cache is told to discard at a time."""
READ = 128
"""Numbers of parts that a thread reads at a time in a merge: all that fits into registers waits for memory but once."""


class Tensors(NamedTuple):
    """Tensors of a call, None where it has none: q, out (B, S, H, D); lse (B, H, S); sink (H,); int32 indices (B,) and
    pages (B, pages of a sequence)."""

    q: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor | None
    sink: cute.Tensor | None
    indices: cute.Tensor | None
    pages: cute.Tensor | None


class Maps(NamedTuple):
    """TMA copies of caches, with the coordinate tensors (rows, D, heads, blocks) that they read."""

    k: cute.CopyAtom
    m_k: cute.Tensor
    v: cute.CopyAtom
    m_v: cute.Tensor


class Splits(NamedTuple):
    """Work space of the split, for each sequence and KV head (a pair).

    parts: float32, for each of `slots` chunks O unnormalised (rows, D), then pivot (log2 units) and sum of each row, in
    PART_EXTRA. All of any 32 bytes are written or none, or L2 would ask memory for what is missing; begins at a
    multiple of LINE bytes, as each part does.
    arrivals: int32 for each pair, 0 between launches: the chunks that arrived, and in units of HELD how many of
    them the first part holds; and after them all the two of `schedule.draw`.
    """

    parts: cute.Tensor
    arrivals: cute.Tensor
    slots: Int32


class Shared(NamedTuple):
    """Shared memory: tiles with their slots last, the warps' O (row, column, warp) and statistics.

    runs: the words of each, with their slots last. word: what an arrival found.
    """

    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    statistics: cute.Tensor
    runs: cute.Tensor
    word: cute.Tensor


class Work(NamedTuple):
    """A call's sequences and window, its work space and KV heads."""

    calls: Calls
    window: Window
    splits: Splits
    heads: Int32


class State(NamedTuple):
    """What a warp holds of its tiles, as `sm90_softmax` takes it: operands, accumulators, statistics of its rows."""

    lane: Int32
    mma: cute.TiledMma
    q: cute.Tensor
    p: cute.Tensor
    acc_s: cute.Tensor
    acc_o: cute.Tensor
    pivot: cute.Tensor
    row_sum: cute.Tensor
    values: Values
    cap: Cap | None


class Folded(NamedTuple):
    """A thread's columns of a row of folded chunks: O unnormalised, the row's pivot and sum."""

    out: cute.Tensor
    pivot: cute.Tensor
    row_sum: cute.Tensor


class Place(NamedTuple):
    """What a block works on: its KV head, and the row of the folded results that the thread holds, if it is one."""

    head: Int32
    row: Int32
    rows: Int32
    column: Int32


class Decode:
    """One compiled kernel's host function and roles."""

    def __init__(self, kinds: CacheKinds, config: DecodeConfig | None = None) -> None:
        self.calls = kinds
        self.kinds = kinds.kinds
        self.config = config or config_for(kinds)
        self.dtype = DTYPES[self.kinds.dtype]
        self.softmax = Softmax(self.kinds, self.config, False)
        self.group = self.kinds.group

    def fake_arguments(self, sink_dtype: torch.dtype | None) -> list[Any]:
        """Arguments for `cute.compile`, as `__call__` lists them, with every length and stride left open."""
        kinds, calls = self.kinds, self.calls
        return [
            fake_rows(self.dtype, 4, kinds.head_dim),
            fake_rows(self.dtype, 4, kinds.head_dim),
            fake_rows(self.dtype, 4, kinds.head_dim_v),
            fake_rows(self.dtype, 4, kinds.head_dim_v),
            fake_numbers(Float32, 3) if calls.lse else None,
            fake_numbers(DTYPES[sink_dtype], 1) if sink_dtype is not None else None,
            fake_numbers(Int32, 1) if calls.lengths else None,
            fake_numbers(Int32, 1) if calls.indexed else None,
            fake_numbers(Int32, 1) if calls.padded else None,
            fake_numbers(Int32, 2) if kinds.paged else None,
            Float32(1.0),
            Float32(1.0) if kinds.softcap else None,
            Int32(1) if kinds.window_left else None,
            Int32(1) if kinds.window_right else None,
            Float32(8.0),
            Int32(1),
            Int32(1),
            Int32(1),
            Int32(1),
            Int32(1),
            Int32(1),
            fake_numbers(Float32, 1, align=16),
            fake_numbers(Int32, 1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        ]

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        sink: cute.Tensor | None,
        seqlens: cute.Tensor | None,
        indices: cute.Tensor | None,
        leftpad: cute.Tensor | None,
        pages: cute.Tensor | None,
        scale_log2: Float32,
        capped_scale: Float32 | None,
        window_left: Int32 | None,
        window_right: Int32 | None,
        threshold: Float32,
        length: Int32,
        added: Int32,
        wanted: Int32,
        slots: Int32,
        teams: Int32,
        cluster: Int32,
        parts: cute.Tensor,
        arrivals: cute.Tensor,
        stream,
    ):
        """Launches `teams` blocks for each KV head.

        cluster: blocks of neighbouring heads that are launched on neighbouring multiprocessors, where they keep in step
        and read the same rows of memory at about the same time.
        """
        config, load = self.config, cpasync.CopyBulkTensorTileG2SOp()
        box_k, box_v = (config.box, config.head_dim), (config.box, config.head_dim_v)
        maps = Maps(
            *cpasync.make_tiled_tma_atom(load, _by_row(k), _rows_layout(box_k), box_k),
            *cpasync.make_tiled_tma_atom(load, _by_row(v), _rows_layout(box_v), box_v),
        )
        capacity, heads = k.shape[1], k.shape[2]
        if const_expr(pages is not None):
            capacity = pages.shape[1] * self.calls.page_size
        self.kernel(
            maps,
            Tensors(q, out, lse, sink, indices, pages),
            Calls(seqlens, leftpad, q.shape[0], q.shape[1], capacity, length, added, wanted),
            Values(scale_log2, capped_scale, window_left, window_right, threshold),
            cap_of(capped_scale, scale_log2) if const_expr(self.kinds.softcap) else None,
            Splits(parts, arrivals, slots),
        ).launch(
            grid=[heads, teams, 1],
            block=[config.threads, 1, 1],
            cluster=[cluster, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        maps: Maps,
        tensors: Tensors,
        calls: Calls,
        values: Values,
        cap: Cap | None,
        splits: Splits,
    ):
        config = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = cutlass.utils.SmemAllocator()
        barriers = memory.allocate_array(Int64, 4 * config.slots)
        tiles = Ring(barriers, config.slots, 1, 1)
        runs = Ring(barriers + 2 * config.slots, config.slots, 1, THREADS)
        of_runs = cute.make_layout((RUN_WORDS, config.slots))
        s_runs = memory.allocate_tensor(Int32, of_runs, 16)
        word = memory.allocate_tensor(Int32, cute.make_layout(1), 4)
        layout_k = _rows_layout((config.tile_n, config.head_dim), config.slots)
        layout_v = _rows_layout((config.tile_n, config.head_dim_v), config.slots)
        s_k = memory.allocate_tensor(self.dtype, layout_k.outer, 1024, layout_k.inner)
        s_v = memory.allocate_tensor(self.dtype, layout_v.outer, 1024, layout_v.inner)
        of_warps = cute.make_layout(
            (config.rows, config.head_dim_v, WARPS), stride=(config.part_stride, 1, config.rows * config.part_stride)
        )
        s_out = memory.allocate_tensor(Float32, of_warps, 16)
        s_statistics = memory.allocate_tensor(Float32, cute.make_layout((2, config.rows, WARPS)), 16)
        shared = Shared(s_k, s_v, s_out, s_statistics, s_runs, word)
        heads, _, _ = cute.arch.grid_dim()
        work = Work(calls, Window(values.window_left, values.window_right), splits, heads)
        if warp_index == WARPS:
            cpasync.prefetch_descriptor(maps.k)
            cpasync.prefetch_descriptor(maps.v)
            self.load(maps, tensors, shared, tiles, runs, work)
        else:
            if warp_index == 0:
                with cute.arch.elect_one():
                    tiles.init()
                    runs.init()
                cute.arch.mbarrier_init_fence()
            self._ready()
            self.compute(tensors, shared, tiles, runs, work, values, cap)

    @cute.jit
    def load(self, maps, tensors, shared, tiles, runs, work):
        """The load warp. Waits on the empty barriers of both rings; TMA completes the tiles' full ones."""
        config, (calls, window, splits, heads) = self.config, work
        head, team, _ = cute.arch.block_idx()
        _, teams, _ = cute.arch.grid_dim()
        blocks, at_once = teams * heads, LANES // config.boxes
        deal = find_share(team, teams, calls, window, config.tile_n)
        self._ready()  # after the first reads from memory, which take longer than the barriers
        sequence, chunk, tile, left = deal.share
        draws, drawn, limit = start_draws(deal), deal.longest > 0, deal.limit
        # Where all sequences are drawn, each block's first is its own; further ones are asked for while the one before
        # is read: the first lane is told when that is on its way.
        counter = cute.make_tensor(splits.arrivals.iterator + calls.batch * heads, cute.make_layout(2))
        item, given, answer = team * heads + head, blocks, Int32(0)
        if deal.shared > 0:
            given = Int32(0)
            if drawn and left == 0:
                item = cute.arch.shuffle_sync(ask(counter), 0)
        at, turn, count = tiles.start(), runs.start(), Int32(1)
        while count > 0:
            if left == 0 and drawn:
                number = item // heads
                sequence, draws = find_drawn(number, draws, calls, window, config.tile_n)
                head, chunk, tile = item - number * heads, Int32(0), Int32(0)
            keys = keys_of(sequence, calls, window, config.tile_n)
            count = cutlass.min(left, keys.tiles - tile)
            left -= count
            if count == 0 and drawn and sequence < calls.batch:  # it was drawn: all of it
                count = keys.tiles
            begin, looked, end = tile, tile, tile + count
            numbers = self._places(maps, tensors, calls, sequence, keys, tile)
            ahead = numbers
            if const_expr(self.kinds.paged):
                ahead = self._places(maps, tensors, calls, sequence, keys, tile + at_once)
            for part in cutlass.range(3, unroll=1):
                stop = cutlass.min(tile + 1, end)  # then the other warps are told of the run
                if part == 1:
                    stop = end - SOON  # then the next one is asked for
                elif part == 2:
                    stop = end
                while tile < stop:
                    first = (keys.span.begin + tile) * config.tile_n
                    there = (keys.length - first + config.box - 1) // config.box  # boxes before the sequence's end
                    there = cutlass.min(cutlass.max(there, 0), config.boxes)
                    tiles.acquire(at)
                    with cute.arch.elect_one():
                        tiles.expect(at, there * (config.slot_bytes // config.boxes))
                    number = (tile - looked) * config.boxes
                    if calls.batch > teams:
                        self._bring(maps, shared, head, numbers, number, keys.pad + first, there, tiles, at, True)
                    else:
                        self._bring(maps, shared, head, numbers, number, keys.pad + first, there, tiles, at, False)
                    at = tiles.next(at)
                    tile += 1
                    if const_expr(self.kinds.paged):
                        if tile == looked + at_once:
                            # Asked for so long before that they are there.
                            numbers, looked = ahead, tile
                            ahead = self._places(maps, tensors, calls, sequence, keys, tile + at_once)
                if part == 0:
                    runs.acquire(turn)
                    with cute.arch.elect_one():
                        for n, word in enumerate((sequence * heads + head, chunk, begin, count)):
                            shared.runs[n, turn.index] = word
                        runs.publish(turn)
                    turn = runs.next(turn)
                elif part == 1 and drawn and left == 0 and count > 0:
                    answer = ask(counter)
            if left > 0:
                sequence = next_in_row(sequence + 1, limit, calls, window, config.tile_n)
                chunk, tile = Int32(0), Int32(0)
            elif drawn:
                item = given + cute.arch.shuffle_sync(answer, 0)
        if drawn:
            retire(counter, blocks)

    @cute.jit
    def _ready(self):
        """All warps wait until the rings' barriers are made."""
        cute.arch.barrier(barrier_id=READY_BARRIER, number_of_threads=self.config.threads)

    @cute.jit
    def _places(self, maps, tensors, calls, sequence, keys, tile):
        """Where keys lie in the cache's first dimension: the batch element, clamped, or pages.

        Pages are those of the boxes from a tile on, one a lane, and whatever the device says: nothing is done with them
        here, so that nothing waits for them.
        """
        config = self.config
        sequence = cutlass.min(sequence, calls.batch - 1)
        number = sequence
        if const_expr(tensors.pages is not None):
            key = (keys.span.begin + tile) * config.tile_n + cute.arch.lane_idx() * config.box
            key = cutlass.min(key, cutlass.max(keys.length - 1, 0))
            number = tensors.pages[sequence, key // self.calls.page_size]
        if const_expr(tensors.indices is not None):
            number = tensors.indices[sequence]
        return number if const_expr(self.kinds.paged) else self._clamped(maps, number)

    def _clamped(self, maps, number):
        """A number that the cache's first dimension has."""
        return cutlass.min(cutlass.max(number, 0), maps.m_k.shape[3] - 1)

    @cute.jit
    def _bring(self, maps, shared, head, numbers, number, first, there, tiles, at, once: cutlass.Constexpr[bool]):
        """The first boxes of a tile, `there` of them, from row `first` of the cache, or of the sequence's pages, on.

        once: with L2's evict_first. In calls of many sequences, keys and values give way to what is read again, as
        parts that wait long for the others (so do pages that sequences share, which are read again, too); in calls of
        few, where none waits, the hint alone costs a percent.
        """
        config = self.config
        policy = _policy("evict_first") if const_expr(once) else None
        for r in cutlass.range_constexpr(config.boxes):
            if r < there:
                row, block = first + r * config.box, numbers
                if const_expr(self.kinds.paged):
                    row %= self.calls.page_size
                    block = self._clamped(maps, cute.arch.shuffle_sync(numbers, number + r))
                for atom, m_cache, s_tiles in ((maps.k, maps.m_k, shared.k), (maps.v, maps.m_v, shared.v)):
                    rows = cute.domain_offset((row, 0), m_cache[None, None, head, block])
                    box = (config.box, s_tiles.shape[1])
                    s_box = cute.local_tile(s_tiles[None, None, at.index], box, (r, 0))
                    t_s, t_g = boxes(atom, s_box, cute.local_tile(rows, box, (0, 0)), 2)
                    cute.copy(atom, t_g, t_s, tma_bar_ptr=tiles.full_barrier(at), cache_policy=policy)

    @cute.jit
    def compute(self, tensors, shared, tiles, runs, work, values, cap):
        """A warp that computes. Waits on the full barriers of both rings and lets go of their slots."""
        turn, done, count = runs.start(), Int32(0), Int32(1)
        while count > 0:
            runs.wait(turn)
            pair, chunk, tile, count = [shared.runs[n, turn.index] for n in range(RUN_WORDS)]
            runs.release(turn)
            turn = runs.next(turn)
            if count > 0:
                self._attend(tensors, shared, tiles, work, values, cap, done, pair, chunk, tile, count)
            done += count

    @cute.jit
    def _attend(self, tensors, shared, tiles, work, values, cap, done, pair, chunk, tile, count):
        """A run: `count` tiles of a pair from a chunk on, which begins at `tile`. done: tiles of the ring before it."""
        config, (calls, window, splits, heads) = self.config, work
        thread, _, _ = cute.arch.thread_idx()
        warp_index = cute.arch.make_warp_uniform(thread // 32)
        sequence, of_row = pair // heads, config.row_threads
        head = pair - sequence * heads
        place = Place(head, thread // of_row, calls.rows_q * self.group, thread % of_row * 4)
        state, whole = self._state(thread % 32, values, cap), self._nothing()
        self._load_query(state, tensors.q, sequence, place)
        keys = keys_of(sequence, calls, window, config.tile_n)
        # Whether another block has the sequence's first chunks, and so this run's place among the parts.
        inherited, ended, end = tile > 0, chunk, tile + count
        while tile < end:
            following = first_tile(ended + 1, keys, calls)
            state.acc_o.fill(0.0)
            state.pivot.fill(-Float32.inf)
            state.row_sum.fill(0.0)
            for n in cutlass.range(tile + warp_index, following, WARPS, unroll=1):
                number = done + n - tile
                at = Cursor(number % config.slots, number // config.slots % 2)
                self._fold_tile(state, shared, tiles, at, keys, window, calls.rows_q, keys.span.begin + n)
            part = self._fold_warps(state, shared, warp_index, place)
            if inherited:
                self._store_part(splits, Int64(pair), ended, place, part)
            else:
                self._fold(whole, part)
            done += following - tile
            tile = following
            ended += 1
        is_whole = end == keys.tiles and not inherited
        if not is_whole:
            news = ended - chunk
            if not inherited:
                self._store_part(splits, Int64(pair), Int32(0), place, whole)
                news += ended * HELD
            is_whole = self._arrive(shared, splits, Int64(pair), place, news, keys.chunks, whole)
        if is_whole:
            self._store_result(tensors, sequence, place, whole)

    def _state(self, lane: Int32, values: Values, cap: Cap | None) -> State:
        config = self.config
        mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)),
            cute.make_layout((1, 1, 1)),
            permutation_mnk=(16, 16, 16),
        )
        of_lane = mma.get_slice(lane)
        return State(
            lane=lane,
            mma=mma,
            q=mma.make_fragment_A(of_lane.partition_shape_A((WARP_ROWS, config.head_dim))),
            p=mma.make_fragment_A(of_lane.partition_shape_A((WARP_ROWS, config.tile_n))),
            acc_s=cute.make_rmem_tensor(of_lane.partition_shape_C((WARP_ROWS, config.tile_n)), Float32),
            acc_o=cute.make_rmem_tensor(of_lane.partition_shape_C((WARP_ROWS, config.head_dim_v)), Float32),
            pivot=cute.make_rmem_tensor(2, Float32),
            row_sum=cute.make_rmem_tensor(2, Float32),
            values=values,
            cap=cap,
        )

    @cute.jit
    def _load_query(self, state, m_q, sequence, place):
        """Q's fragments: of each 16 columns, pairs at rows 0 and 8 and at columns 0 and 8 after the lane's own."""
        pairs = cute.recast_tensor(state.q, Int32)
        for r in cutlass.range_constexpr(2):
            row = state.lane // 4 + 8 * r
            there = row < place.rows
            line = m_q[sequence, row // self.group if there else 0, place.head * self.group + row % self.group, None]
            line = cute.recast_tensor(line, Int32)
            for n in cutlass.range_constexpr(self.config.head_dim // 8):
                pair = Int32(0)
                if there:
                    pair = line[4 * n + state.lane % 4]
                pairs[4 * (n // 2) + 2 * (n % 2) + r] = pair

    @cute.jit
    def _fold_tile(self, state, shared, tiles, at, keys, window, rows_q, tile):
        """Folds a key tile into the warp's state, and lets go of its slot."""
        config = self.config
        # A parity tells a lap from the one before it alone, and copies may end in another order: what another warp is
        # waiting for in this slot, one lap back, may not be there yet. So until that warp has let go of it, as the load
        # warp does. It cannot be two laps back: all tiles of chunks before are done, behind a barrier, and so is this
        # warp's tile before in the chunk. There are as many slots as warps, so one of these was brought no earlier
        # than the tile one lap back, and for that one the slot had been let go of.
        tiles.acquire(at)
        tiles.wait(at)
        if keys.span.begin < keys.span.end:  # else what was read is nobody's
            state.acc_s.fill(0.0)
            self._multiply(state, state.acc_s, state.q, shared.k, at.index, False)
            near = self.softmax.cap(state, True)
            if tile < keys.span.full_begin or tile >= keys.span.full_end:
                self._hide(state, shared.v, at.index, keys, window, rows_q, tile)
            moved, factor = self.softmax.weigh(state, near, True)
            self.softmax.rescale(state, moved, factor)
            self.softmax.round(state)
            s_vt = cute.composition(
                shared.v, cute.make_ordered_layout((config.head_dim_v, config.tile_n, config.slots), order=(1, 0, 2))
            )
            self._multiply(state, state.acc_o, state.p, s_vt, at.index, True)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            tiles.release(at)

    @cute.jit
    def _multiply(self, state, acc, a, s_b, slot, transpose: cutlass.Constexpr[bool]):
        """acc += a b^T with b (columns of acc, depth, slot) in shared memory, read 16 of its depth at a time."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose, 4), self.dtype)
        copy = cute.make_tiled_copy_B(atom, state.mma).get_slice(state.lane)
        t_s = copy.partition_S(s_b)
        fragment = state.mma.make_fragment_B(state.mma.get_slice(state.lane).partition_B(s_b[None, None, 0]))
        r_b = copy.retile(fragment)
        for depth in cutlass.range_constexpr(cute.size(fragment.shape[2])):
            cute.copy(atom, t_s[None, None, depth, slot], r_b[None, None, depth])
            cute.gemm(state.mma, acc, a[None, None, depth], fragment[None, None, depth], acc)

    @cute.jit
    def _hide(self, state, s_v, slot, keys, window, rows_q, tile):
        """Hides the scores of keys that their row does not see, and zeros the values that no row sees.

        Those may be anything, and 0 times a NaN would show.
        """
        config = self.config
        first_key = tile * config.tile_n
        for r in cutlass.range_constexpr(2):
            position = cutlass.min((state.lane // 4 + 8 * r) // self.group, rows_q - 1)
            first, end = visible_keys(position, rows_q, keys.length, window)
            column = first_key + state.lane % 4 * 2
            first, end = first - column, end - column
            for j in cutlass.range_constexpr(config.tile_n // 8):
                for c in cutlass.range_constexpr(2):
                    at = 4 * j + 2 * r + c
                    visible = 8 * j + c < end and 8 * j + c >= first
                    state.acc_s[at] = state.acc_s[at] if visible else -Float32.inf
        first, _ = visible_keys(Int32(0), rows_q, keys.length, window)
        _, end = visible_keys(rows_q - 1, rows_q, keys.length, window)
        pieces = config.head_dim_v // 8  # of a row, 16 bytes each
        zeros = cute.make_rmem_tensor(8, self.dtype)
        zeros.fill(0.0)
        for at in cutlass.range(state.lane, config.tile_n * pieces, 32, unroll=1):
            key = first_key + at // pieces
            if key < first or key >= end:
                line = s_v[at // pieces, None, slot]
                cute.autovec_copy(zeros, cute.local_tile(line, (8,), (at % pieces,)))
        cute.arch.fence_view_async_shared()  # TMA writes there next
        cute.arch.sync_warp()

    def _nothing(self) -> Folded:
        folded = Folded(
            cute.make_rmem_tensor(self.config.columns, Float32),
            cute.make_rmem_tensor(1, Float32),
            cute.make_rmem_tensor(1, Float32),
        )
        self._clear(folded)
        return folded

    @cute.jit
    def _clear(self, folded):
        folded.out.fill(0.0)
        folded.pivot.fill(-Float32.inf)
        folded.row_sum.fill(0.0)

    @cute.jit
    def _fold(self, whole, part):
        """Folds a chunk into what came before it."""
        highest = cute.arch.fmax(whole.pivot[0], part.pivot[0], nan=True)
        before, factor = rescale_factor(whole.pivot[0], highest), rescale_factor(part.pivot[0], highest)
        for at in cutlass.range_constexpr(cute.size(whole.out)):
            whole.out[at] = _fma(part.out[at], factor, whole.out[at] * before)
        whole.row_sum[0] = _fma(part.row_sum[0], factor, whole.row_sum[0] * before)
        whole.pivot[0] = highest

    @cute.jit
    def _fold_warps(self, state, shared, warp_index, place):
        """The chunk's result: those of the warps, in their order."""
        rows = place.rows
        for r in cutlass.range_constexpr(2):
            row = state.lane // 4 + 8 * r
            total = state.row_sum[r]
            total = total + cute.arch.shuffle_sync_bfly(total, 1)
            total = total + cute.arch.shuffle_sync_bfly(total, 2)
            if row < rows:
                line = shared.out[row, None, warp_index]
                for j in cutlass.range_constexpr(self.config.head_dim_v // 8):
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair[0], pair[1] = state.acc_o[4 * j + 2 * r], state.acc_o[4 * j + 2 * r + 1]
                    cute.autovec_copy(pair, cute.local_tile(line, (2,), (4 * j + state.lane % 4,)))
                if state.lane % 4 == 0:
                    shared.statistics[0, row, warp_index] = state.pivot[r]
                    shared.statistics[1, row, warp_index] = total
        self._sync()
        chunk = self._nothing()
        if place.row < rows:
            pivots = [shared.statistics[0, place.row, w] for w in range(WARPS)]
            highest = pivots[0]
            for w in cutlass.range_constexpr(1, WARPS):
                highest = cute.arch.fmax(highest, pivots[w], nan=True)
            chunk.pivot[0] = highest
            for w in cutlass.range_constexpr(WARPS):
                factor = rescale_factor(pivots[w], highest)
                chunk.row_sum[0] = _fma(shared.statistics[1, place.row, w], factor, chunk.row_sum[0])
                line = shared.out[place.row, None, w]
                for n in cutlass.range_constexpr(self.config.columns // 4):
                    four = cute.make_rmem_tensor(4, Float32)
                    cute.autovec_copy(self._columns(line, 4, place, n), four)
                    for i in cutlass.range_constexpr(4):
                        chunk.out[4 * n + i] = _fma(four[i], factor, chunk.out[4 * n + i])
        self._sync()  # the next chunk's results go to the same place
        return chunk

    def _columns(self, line, words: int, place, n):
        """The thread's n-th 4 columns of a row, which lie in so many words of `line`."""
        return cute.local_tile(line, (words,), (place.column // 4 + self.config.row_threads * n,))

    @cute.jit
    def _sync(self):
        cute.arch.barrier(barrier_id=COMPUTE_BARRIER, number_of_threads=THREADS)

    def _part_floats(self, place) -> Int32:
        """float32 numbers of a part."""
        return place.rows * self.kinds.head_dim_v + PART_EXTRA

    @cute.jit
    def _part(self, splits, pair, place):
        """Where the thread's columns of a pair's first part lie, the pivot and the sum of their row, and a part's size.

        For a thread that has no row, those of the last.
        """
        dim, size = self.kinds.head_dim_v, self._part_floats(place)
        part = splits.parts.iterator + pair * splits.slots * size
        row = cutlass.min(place.row, place.rows - 1)
        statistics = part + (place.rows * dim + 2 * cutlass.min(place.row, self.config.rows - 1))
        return (part + (row * dim + place.column)).align(16), statistics.align(8), size

    @cute.jit
    def _store_part(self, splits, pair, slot, place, folded):
        columns, statistics, size = self._part(splits, pair, place)
        if place.row < place.rows:
            for n in cutlass.range_constexpr(self.config.columns // 4):
                four = [folded.out[4 * n + i] for i in range(4)]
                _store_kept(columns + (slot * size + 4 * self.config.row_threads * n), four)
        if place.row < self.config.rows and place.column == 0:  # of all rows, for whole sectors
            _store_kept(statistics + slot * size, [folded.pivot[0], folded.row_sum[0]])

    @cute.jit
    def _arrive(self, shared, splits, pair, place, news, chunks, whole) -> Boolean:
        """Says that this block's parts are there; the last block to do so folds all into `whole`, and is told."""
        thread, _, _ = cute.arch.thread_idx()
        self._sync()  # what the block stored is released with this thread's addition
        if thread == 0:
            news += cute.arch.atomic_add(splits.arrivals.iterator + pair, news, sem="acq_rel", scope="gpu")
            shared.word[0] = news
            if news % HELD == chunks:
                splits.arrivals[pair] = Int32(0)
        self._sync()
        news = shared.word[0]
        is_last = news % HELD == chunks
        if is_last:
            self._clear(whole)
            self._merge(whole, splits, pair, cutlass.max(news // HELD, 1), chunks, place)
            self._give_up(splits, pair, chunks, place)
        return is_last

    @cute.jit
    def _merge(self, whole, splits, pair, held, chunks, place):
        """Folds a pair's parts in their order: the first, which holds `held` chunks, and those of the chunks after.

        As `_fold` does, but of as many parts as there are threads on a row each finds the factors of one.
        """
        config = self.config
        at_once = min(config.row_threads, max(1, READ // config.columns))
        columns, statistics, size = self._part(splits, pair, place)
        number = place.column // 4
        first_lane = cute.arch.lane_idx() - number
        for base in cutlass.range(held - 1, chunks, at_once, unroll=1):
            read = [cute.make_rmem_tensor(config.columns, Float32) for _ in range(at_once)]
            for j in cutlass.range_constexpr(at_once):
                # Without a branch, so that all are read at once.
                slot = cutlass.min(base + j, chunks - 1)
                if const_expr(j == 0):
                    slot = base if base >= held else Int32(0)
                begin = columns + slot * size
                for n in cutlass.range_constexpr(config.columns // 4):
                    four = cute.make_tensor(begin + 4 * config.row_threads * n, cute.make_layout(4))
                    cute.autovec_copy(four, cute.local_tile(read[j], (4,), (n,)))
            mine = base + number
            slot = cutlass.min(mine, chunks - 1) if mine >= held else Int32(0)
            two = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(cute.make_tensor(statistics + slot * size, cute.make_layout(2)), two)
            pivot, row_sum = two[0] if mine < chunks else -Float32.inf, two[1] if mine < chunks else Float32(0.0)
            highest = cute.arch.fmax(whole.pivot[0], pivot, nan=True)
            for distance in (1, 2, 4, 8, 16):
                if const_expr(distance < at_once):
                    other = cute.arch.shuffle_sync_up(highest, distance, mask_and_clamp=0)
                    highest = cute.arch.fmax(highest, other, nan=True) if number >= distance else highest
            previous = cute.arch.shuffle_sync_up(highest, 1, mask_and_clamp=0)
            previous = previous if number > 0 else whole.pivot[0]
            before, factor = rescale_factor(previous, highest), rescale_factor(pivot, highest)
            for j in cutlass.range_constexpr(at_once):
                one, other = [cute.arch.shuffle_sync(of_lane, first_lane + j) for of_lane in (before, factor)]
                there = base + j < chunks
                for at in cutlass.range_constexpr(config.columns):
                    column = read[j][at] if there else Float32(-0.0)
                    whole.out[at] = _fma(column, other, whole.out[at] * one)
                summand = cute.arch.shuffle_sync(row_sum, first_lane + j)
                whole.row_sum[0] = _fma(summand, other, whole.row_sum[0] * one)
            whole.pivot[0] = cute.arch.shuffle_sync(highest, first_lane + at_once - 1)

    @cute.jit
    def _give_up(self, splits, pair, chunks, place):
        """Discards a pair's parts, which have been read, from L2, so that they are never written to memory."""
        thread, _, _ = cute.arch.thread_idx()
        part_bytes = 4 * self._part_floats(place)
        first = splits.parts.iterator.toint() + pair * splits.slots * part_bytes
        self._sync()
        for line in cutlass.range(thread, chunks * (part_bytes // LINE), THREADS, unroll=1):
            cute.arch.inline_ptx("discard.global.L2 [{$r0}], 128;", read_only_args=[first + Int64(line) * LINE])

    @cute.jit
    def _store_result(self, tensors, sequence, place, whole):
        """Normalises a row, adds the sink, and stores out and, if wanted, lse."""
        if place.row < place.rows:
            position, head = place.row // self.group, place.head * self.group + place.row % self.group
            sink = None
            if const_expr(tensors.sink is not None):
                sink = Float32(tensors.sink[head]) * LOG2_E
            scale, lse = finish(whole.pivot[0], whole.row_sum[0], sink)
            line = cute.recast_tensor(tensors.out[sequence, position, head, None], Int32)
            for n in cutlass.range_constexpr(self.config.columns // 4):
                pairs = cute.make_rmem_tensor(2, Int32)
                for c in cutlass.range_constexpr(2):
                    at = 4 * n + 2 * c
                    pairs[c] = pack(whole.out[at] * scale, whole.out[at + 1] * scale, self.dtype)
                cute.autovec_copy(pairs, self._columns(line, 2, place, n))
            if const_expr(tensors.lse is not None):
                if place.column == 0:
                    tensors.lse[sequence, head, position] = lse


def _by_row(cache: cute.Tensor) -> cute.Tensor:
    """A (blocks, rows, H, D) cache as (rows, (64, D / 64), H, blocks).

    A box of TMA is no wider than its swizzle, 64 columns; in this order it brings all columns of a row before the next
    row, as they lie in memory.
    """
    (blocks, rows, heads, dim), (block, row, head, _) = cache.layout.shape, cache.layout.stride
    shape = (rows, (BLOCK_COLUMNS, dim // BLOCK_COLUMNS), heads, blocks)
    return cute.make_tensor(cache.iterator, cute.make_layout(shape, stride=(row, (1, BLOCK_COLUMNS), head, block)))


def _rows_layout(tile: tuple[int, int], *slots: int) -> cute.ComposedLayout:
    """Rows of shared memory one after the other, under the 128-byte swizzle."""
    rows, dim = tile
    plain = cute.make_layout(
        (rows, (BLOCK_COLUMNS, dim // BLOCK_COLUMNS), *slots),
        stride=(dim, (1, BLOCK_COLUMNS), *(rows * dim for _ in slots)),
    )
    return cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, plain)


def _policy(priority: str) -> Int64:
    """How the L2 cache treats what is read or written with it."""
    return cute.arch.inline_ptx(
        f"createpolicy.fractional.L2::{priority}.b64 {{$w0}};", write_only_types=[Int64], read_only_args=[]
    )


def _store_kept(pointer: cute.Pointer, numbers: list[Float32]) -> None:
    """Stores float32 numbers that will soon be read and given up, so that the L2 cache keeps them until then."""
    policy = _policy("evict_last")
    vector = ", ".join(f"{{$r{n + 2}}}" for n in range(len(numbers)))
    cute.arch.inline_ptx(
        f"st.global.L2::cache_hint.v{len(numbers)}.f32 [{{$r0}}], {{{vector}}}, {{$r1}};",
        read_only_args=[pointer.toint(), policy, *numbers],
    )


def _fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a b + c, rounded once: wherever a fold is made, its operations are the same."""
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )
