"""Attention forward for SM100 (Blackwell): warp-specialised, persistent, exact.

A work item is two Q tiles of 128 rows of one head (one, at head_dim 256); K and V pass by in tiles of 128 keys, from
the right to the left. Each Q tile visits only the key tiles that one of its own rows sees. Where the heads of a group
fill a tile, its rows are those of all of them at the same positions, so that they share K and V. Above head_dim 128 a
slot of `kv` is a part of a tile.

Roles (warps; what they wait for and what they signal is in their docstrings):

- scheduler (15, in `sm100_scheduler`): finds the block's work items and publishes them one at a time;
- load (14): Q, K and V by TMA;
- MMA (12, in `sm100_mma`): S = Q K^T and O += P V, into tensor memory;
- softmax (0 to 3 and 4 to 7, one warpgroup a Q tile, one thread a row): S to P in tensor memory, the row's statistics;
- correction (8 to 11, one thread a row of both Q tiles): rescales O in tensor memory where a row of the warp moved its
  pivot by more than the threshold, which on most tiles none does, and turns the last O into the output;
- store (13): the output by TMA.

Rings, with the arrivals that complete a slot's full and its empty barrier:

    items   1 slot         scheduler 1 thread       15 warps
    q       a Q tile       TMA bytes                MMA commit (store, where O is staged in Q's place)
    kv      a K or V tile  TMA bytes                MMA commit
    s       a Q tile       MMA commit               128 softmax threads (P begun) + 128 correction threads (O ready);
                                                    of a pair, the 8 + 8 warps, and the 8 for p_rest
    p_rest  a Q tile       128 softmax threads      (s: the MMAs that read P precede the next S)
    factor  a softmax warp 1 thread                 (s: correction lets go when it has read the factors)
    o       a Q tile       MMA commit               (s: correction lets go when it has read O)
    scales  a Q tile       128 softmax threads      128 correction threads
    out     a Q tile       128 correction threads   store 1 thread
    control 1 slot         launch control's answer  (the scheduler itself)

Steady state, i and j being the Q tiles, n a key tile:

    MMA         | Oi += Pi(n) V(n)   Si(n-1)    | Oj += Pj(n) V(n)   Sj(n-1)    | ...
    softmax i   | ... P(n), rest |  wait  | max of S(n-1)  factor -> exp2, P(n-1) first columns -> rest | ...
    softmax j   |   max of S(n)  factor ->  exp2, P(n) first columns -> rest |  wait  | max of S(n-1) ...
    correction  |     factor j(n): rescale Oj?  ->             | factor i(n-1): rescale Oi?  ->            | ...

A pair of blocks (`config.ctas` 2) works on items of twice the rows. Each block has its half of the rows of both Q tiles
and all the roles, and loads half of each K and V tile; block 0's MMA warp multiplies for both, reading both halves. So
TMA in either block and the warps that hand over P and O report to block 0's barriers, and commits complete both's.

At an item's end the next item's first S is issued behind each last O, before the other Q tile's last P is waited for;
not where O is staged in Q's place.

At head_dim 256 O fills the tensor memory of a second Q tile. S of the only one has two places in turn, which `s`,
`p_rest`, `o` and `factor` then count instead of Q tiles, and it is multiplied one key tile ahead (`multiply_one`,
`correct_one`). The second softmax warpgroup has nothing to do.

Names: `m` a tensor in global memory, `g` its tiles, `s` shared memory, `r` registers, `t` tensor memory or a partition;
S, P and O as in the papers. `tile` numbers key tiles; `i` is the Q tile.

Source: Zadouri et al., "FlashAttention-4" (2026), sections 3 and 4; PTX ISA 8.8, sections on tcgen05, mbarrier and
cp.async.bulk.tensor. No Blackwell GPU was at hand: this file was executed in the emulator of tests/emulator only.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_core.problem import Kinds
from fa4_cute import sm100_config as roles
from fa4_cute.kernels import drawn
from fa4_cute.params import DTYPES, Values, by_head, statistic_by_head
from fa4_cute.parts import Maps, Outputs, count_row
from fa4_cute.pipelines import Cursor, Ring
from fa4_cute.ranges import Window, visible_keys
from fa4_cute.schedule import Extent, Lengths
from fa4_cute.sm100_config import FRAGMENT, ITEM_WORDS, Exp2Share, Sm100Config, config_for
from fa4_cute.sm100_mma import Multiplier
from fa4_cute.sm100_parts import Place, Rings, Shared, SoftmaxState
from fa4_cute.sm100_rings import MmaRing, Signal, lap_of, slot_of
from fa4_cute.sm100_rows import add_up, bias, exponentiate, follow, hide, row_max, scale_and_shift, total_of
from fa4_cute.sm100_scheduler import ITEM_READERS, Scheduler, read_item
from fa4_cute.sm100_tiles import at_place, cta_group, rank_in_pair, shared_layouts, tiled_mmas
from fa4_cute.sm100_tmem import TmemRows
from fa4_cute.softmax import LOG2_E, finish, pack, tanh
from fa4_cute.views import RAGGED_ROWS, boxes, fixed, heads_packed, opaque, ragged

IN_USE = 2
"""`Place.use` of a row that takes part."""
NOT_IN_USE = -1.0
"""The scale of a row that exists and takes no part, whose output is zero whatever O holds; no row's own is negative."""


def _check(kinds: Kinds, config: Sm100Config) -> None:
    """Refuses a config that is laid out for other kinds."""
    if kinds.head_dim > config.head_dim or kinds.head_dim_v > config.head_dim_v:
        have = f"{kinds.head_dim}, {kinds.head_dim_v}"
        raise ValueError(f"head dims {config.head_dim}, {config.head_dim_v} of the config do not hold {have}")
    if kinds.group % config.packed:
        raise ValueError(f"packed: got {config.packed} heads, a group has {kinds.group}")
    if config.ctas > 1 and drawn(kinds):
        raise ValueError(
            "ctas: a pair takes equal shares, so that both blocks have the same items; these kinds draw them"
        )


class Sm100Forward:
    """One compiled kernel's host function and roles.

    counted: for tests, the kernel also writes for each row the key tiles visited and the rescales skipped.
    """

    def __init__(self, kinds: Kinds, config: Sm100Config | None = None, counted: bool = False) -> None:
        self.kinds = kinds
        self.config = config or config_for(kinds, (10, 0))
        self.counted = counted
        _check(kinds, self.config)
        self.dtype = DTYPES[kinds.dtype]
        self.ragged_k = kinds.varlen or kinds.seqused_k

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sink: cute.Tensor | None,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        seqused_q: cute.Tensor | None,
        seqused_k: cute.Tensor | None,
        scale_log2: Float32,
        capped_scale: Float32 | None,
        window_left: Int32 | None,
        window_right: Int32 | None,
        threshold: Float32,
        section: Int32,
        programs: Int32,
        counter: cute.Tensor | None,
        counts: cute.Tensor | None,
        stream,
    ):
        """Makes the TMA maps and launches; arguments as `params.fake_arguments` lists them."""
        config = self.config
        m_q, m_k, m_v, m_o = by_head(q), by_head(k), by_head(v), by_head(out)
        extent_q, extent_k, batch = m_q.shape[0], m_k.shape[0], m_q.shape[3]
        if const_expr(cu_seqlens_q is not None):
            batch = cu_seqlens_q.shape[0] - 1
        m_v_tma, m_o_tma = m_v, m_o
        if const_expr(self.ragged_k):
            m_v_tma = ragged(m_v)
        if const_expr(self.kinds.varlen):
            m_o_tma = ragged(m_o)
        # V is the second operand of P V, whose rows are head dimensions.
        m_v_tma = cute.make_tensor(m_v_tma.iterator, cute.select(m_v_tma.layout, [1, 0, *range(2, cute.rank(m_v_tma))]))
        m_q, m_o_tma = heads_packed(m_q, config.packed), heads_packed(m_o_tma, config.packed)
        mma_s, mma_o = tiled_mmas(self.dtype, config)
        layout_q, layout_k, layout_v, layout_o = shared_layouts(self.dtype, config, mma_s, mma_o)
        load, store = cpasync.CopyBulkTensorTileG2SOp(cta_group(config)), cpasync.CopyBulkTensorTileS2GOp()
        (tile_s, _), (part_s, part_o) = config.mma_tiles, config.mma_parts
        cluster, slot = (config.ctas, 1, 1, 1), [0, 1, 2]
        maps = Maps(
            *cute.nvgpu.make_tiled_tma_atom_A(load, m_q, cute.select(layout_q, slot), tile_s, mma_s, cluster),
            *cute.nvgpu.make_tiled_tma_atom_B(load, m_k, cute.select(layout_k, slot), part_s, mma_s, cluster),
            *cute.nvgpu.make_tiled_tma_atom_B(load, m_v_tma, cute.select(layout_v, slot), part_o, mma_o, cluster),
            *cpasync.make_tiled_tma_atom(store, m_o_tma, cute.select(layout_o, [0, 1]), config.store_tile),
        )
        self.kernel(
            maps,
            Outputs(m_o, statistic_by_head(lse), counter, counts),
            sink,
            Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            Extent(Int32(batch), m_q.shape[2], extent_q, extent_k, section),
            Values(scale_log2, capped_scale, window_left, window_right, threshold),
        ).launch(
            grid=[programs * config.ctas, 1, 1],
            block=[config.threads, 1, 1],
            cluster=[config.ctas, 1, 1] if config.ctas > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        maps: Maps,
        outputs: Outputs,
        sink: cute.Tensor | None,
        lengths: Lengths,
        extent: Extent,
        values: Values,
    ):
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        mma_s, mma_o = tiled_mmas(self.dtype, config)
        layout_q, layout_k, layout_v, layout_o = shared_layouts(self.dtype, config, mma_s, mma_o)

        memory = cutlass.utils.SmemAllocator()
        barriers = memory.allocate_array(Int64, config.barriers)
        both = config.softmax_arrivals + config.correction_arrivals
        rings = Rings(
            items=Ring(barriers, 1, 1, ITEM_READERS),
            q=MmaRing(barriers + 2, 2, 1, 1, config.ctas),
            s=MmaRing(barriers + 6, 2, 1, both, config.ctas),
            p_rest=Signal(barriers + 10, 2, config.softmax_arrivals, config.ctas),
            o=Signal(barriers + 12, 2, 1, config.ctas),
            scales=Ring(barriers + 14, 2, config.softmax_threads, config.correction_threads),
            out=Ring(barriers + 18, 2, config.correction_threads, 1),
            factor=Signal(barriers + 22, 2 * roles.SOFTMAX_WARPS, 1),
            control=Ring(barriers + 30, 1, 1, 1),
            kv=MmaRing(barriers + 32, config.kv_slots, 1, 1, config.ctas),
        )
        answer = memory.allocate_array(Int32, 4, byte_alignment=16)
        tmem_address = memory.allocate_array(Int32, 1)
        rows = cute.make_layout((config.tile_m, 2))
        s_items = cute.make_tensor(
            memory.allocate_array(Int32, ITEM_WORDS, byte_alignment=16), cute.make_layout(ITEM_WORDS)
        )
        s_factor = cute.make_tensor(memory.allocate_array(Float32, cute.size(rows)), rows)
        s_scale = cute.make_tensor(memory.allocate_array(Float32, cute.size(rows)), rows)
        s_q = memory.allocate_tensor(self.dtype, layout_q.outer, 1024, layout_q.inner)
        if const_expr(config.o_replaces_q):
            s_o = cute.make_tensor(cute.recast_ptr(s_q.iterator, layout_o.inner), layout_o.outer)
        else:
            s_o = memory.allocate_tensor(self.dtype, layout_o.outer, 1024, layout_o.inner)
        s_k = memory.allocate_tensor(self.dtype, layout_k.outer, 1024, layout_k.inner)
        s_v = cute.make_tensor(cute.recast_ptr(s_k.iterator, layout_v.inner), layout_v.outer)
        shared = Shared(answer, s_items, s_factor, s_scale, s_q, s_k, s_v, s_o)

        if warp == 0:
            with cute.arch.elect_one():
                for ring in rings:
                    ring.init()
            cute.arch.mbarrier_init_fence()
        self._meet()

        if warp < roles.FIRST_CORRECTION_WARP:
            cute.arch.setmaxregister_increase(config.registers_softmax)
            self.softmax(mma_s, shared, rings, values, outputs, sink)
        elif warp < roles.MMA_WARP:
            cute.arch.setmaxregister_decrease(config.registers_correction)
            if const_expr(config.q_tiles == 1):
                self.correct_one(mma_o, shared, rings)
            else:
                self.correct(mma_o, shared, rings)
        else:
            cute.arch.setmaxregister_decrease(config.registers_other)
            if warp == roles.MMA_WARP:
                cute.arch.alloc_tmem(roles.TMEM_COLUMNS, tmem_address, is_two_cta=config.ctas == 2)
                cute.arch.sync_warp()
                address = cute.arch.retrieve_tmem_ptr(Float32, 16, tmem_address)
                Multiplier(self.kinds, config).run(mma_s, mma_o, shared, rings, address)
                cute.arch.relinquish_tmem_alloc_permit(is_two_cta=config.ctas == 2)
            elif warp == roles.STORE_WARP:
                self.store(maps, shared, rings)
            elif warp == roles.LOAD_WARP:
                self.load(mma_s, mma_o, maps, shared, rings)
            else:
                Scheduler(self.kinds, config).run(outputs, sink, shared, rings, lengths, extent, values)
        # When nobody reads tensor memory any more. Of a pair, neither leaves while the other arrives on its barriers.
        self._meet()
        if warp == roles.MMA_WARP:
            address = cute.arch.retrieve_tmem_ptr(Float32, 16, tmem_address)
            cute.arch.dealloc_tmem(address, roles.TMEM_COLUMNS, is_two_cta=config.ctas == 2)

    @cute.jit
    def _meet(self):
        """A barrier of the block, or of both blocks of a pair."""
        if const_expr(self.config.ctas > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _batch(self, work):
        """The batch element in tensors, which the packed layout has one of."""
        return Int32(0) if const_expr(self.kinds.varlen) else work.batch

    @cute.jit
    def load(self, mma_s, mma_o, maps, shared, rings):
        """The load warp. Waits for empty slots of `q` and `kv`; TMA completes their full barriers.

        Order of an item: K(end-1), Q, V(end-1), K(end-2), V(end-2), ... V(begin); of a single Q tile, each V behind the
        next K. Runs ahead of the MMAs by the ring's slots and across items.
        """
        config = self.config
        for atom in (maps.q, maps.k, maps.v, maps.out):
            cpasync.prefetch_descriptor(atom)
        rank = rank_in_pair(config)
        thr_s, thr_o = mma_s.get_slice(rank), mma_o.get_slice(rank)
        rows = config.ctas * config.tile_m
        at, kv_at, q_laps = rings.items.start(), rings.kv.start(), Int32(0)
        item = read_item(shared, rings, at)
        while item.valid:
            at = rings.items.next(at)
            sequence, work = item.sequence, item.work
            batch, head_kv = self._batch(work), work.head // (self.kinds.group // config.packed)
            offset_q = (0, sequence.offset_q) if config.packed > 1 else sequence.offset_q
            m_q = cute.domain_offset((offset_q, 0), maps.m_q[None, None, work.head, batch])
            m_k = cute.domain_offset((sequence.offset_k, 0), maps.m_k[None, None, head_kv, batch])
            if const_expr(self.ragged_k):
                m_v = maps.m_v[None, None, head_kv, batch, sequence.offset_k + sequence.seqlen_k]
                m_v = cute.domain_offset((0, RAGGED_ROWS - sequence.seqlen_k), m_v)
            else:
                m_v = maps.m_v[None, None, head_kv, batch]
            g_q = cute.local_tile(m_q, (rows, config.head_dim), (None, 0))
            g_k = cute.local_tile(m_k, (config.tile_n, config.head_dim // config.k_parts), (None, None))
            g_v = cute.local_tile(m_v, (config.head_dim_v, config.tile_n // config.v_parts), (0, None))
            t_sq, t_gq = boxes(maps.q, shared.q, thr_s.partition_A(g_q), 3)
            t_sk, t_gk = boxes(maps.k, shared.k, thr_s.partition_B(g_k), 3)
            t_sv, t_gv = boxes(maps.v, shared.v, thr_o.partition_B(g_v), 3)

            kv_at = self._load_k(rings.kv, kv_at, maps.k, t_gk, t_sk, item.end - 1)
            for i in cutlass.range_constexpr(config.q_tiles):
                if item.span(i).begin < item.span(i).end:
                    q_tile = t_gq[None, config.q_tiles * work.tile + i]
                    self._load(rings.q, slot_of(i, q_laps), maps.q, q_tile, t_sq, config.q_bytes)
                    q_laps = lap_of(i, q_laps)
            if const_expr(config.q_tiles == 2):
                kv_at = self._load_v(rings.kv, kv_at, maps.v, t_gv, t_sv, item.end - 1)
            for n in cutlass.range(item.end - item.begin - 1, unroll=1):
                tile = item.end - 2 - n
                kv_at = self._load_k(rings.kv, kv_at, maps.k, t_gk, t_sk, tile)
                v_tile = tile if const_expr(config.q_tiles == 2) else tile + 1
                kv_at = self._load_v(rings.kv, kv_at, maps.v, t_gv, t_sv, v_tile)
            if const_expr(config.q_tiles == 1):
                kv_at = self._load_v(rings.kv, kv_at, maps.v, t_gv, t_sv, item.begin)
            item = read_item(shared, rings, at)
        if const_expr(config.ctas > 1):  # the last MMAs' commits reach both blocks before one leaves
            for _ in cutlass.range(config.kv_slots, unroll=1):
                rings.kv.acquire(kv_at)
                kv_at = rings.kv.next(kv_at)
            for i in cutlass.range_constexpr(config.q_tiles):
                rings.q.acquire(slot_of(i, q_laps))

    @cute.jit
    def _load_k(self, ring, at, atom, source, target, tile):
        parts = self.config.k_parts
        for part in cutlass.range_constexpr(parts):
            self._load(ring, at, atom, source[None, tile, part], target, self.config.k_bytes // parts)
            at = ring.next(at)
        return at

    @cute.jit
    def _load_v(self, ring, at, atom, source, target, tile):
        parts = self.config.v_parts
        for part in cutlass.range_constexpr(parts):
            self._load(ring, at, atom, source[None, tile * parts + part], target, self.config.v_bytes // parts)
            at = ring.next(at)
        return at

    @cute.jit
    def _load(self, ring, at, atom, source, target, size: cutlass.Constexpr[int]):
        ring.acquire(at)
        if rank_in_pair(self.config) == 0:
            with cute.arch.elect_one():
                ring.expect(at, size * self.config.ctas)
        cute.copy(atom, source, target[None, at.index], tma_bar_ptr=ring.full_barrier(at))

    @cute.jit
    def softmax(self, mma_s, shared, rings, values, outputs, sink):
        """A softmax warpgroup, one thread a row of its Q tile. Waits for S.

        Signals a tile's factors to the correction warp of the same rows, then the first columns of P, then the rest;
        after an item's last tile, when correction has read the item before, what O is to be multiplied by. Writes LSE.
        """
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        row = thread % config.tile_m
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        i = warp // roles.SOFTMAX_WARPS
        t_s = mma_s.make_fragment_C(mma_s.partition_shape_C(config.mma_tiles[0][:2]))[(None, None), 0, 0]
        t_s = cute.make_tensor(t_s.iterator + i * config.tile_n, t_s.layout)
        factor = cute.make_tensor(fixed(shared.factor.iterator + (config.tile_m * i + row)), cute.make_layout(1))
        factor_barrier = fixed(rings.factor.barriers + warp)
        tmem = TmemRows(t_s, warp % roles.SOFTMAX_WARPS)
        state = SoftmaxState(i, row, factor, factor_barrier, tmem, rings, values)
        at, s_at, scales_at = rings.items.start(), Cursor(i, Int32(0)), Cursor(i, Int32(0))
        item = read_item(shared, rings, at, i)
        while item.valid:
            at = rings.items.next(at)
            span = item.upper
            if span.begin < span.end:
                pivot, total, skips = -Float32.inf, Float32(0.0), Int32(0)
                place, keys = self._place(state, item, values)
                sink_log2 = None
                if const_expr(sink is not None):
                    sink_log2 = Float32(sink[place.head]) * LOG2_E
                for n in cutlass.range(span.end - span.full_end, unroll=1):
                    tile = span.end - 1 - n
                    first = n == 0 if const_expr(self.kinds.window_right) else True  # only the end of the keys cuts one
                    pivot, total, skips = self._tile(state, s_at, pivot, total, skips, first, keys, tile)
                    s_at = self._next_s(rings, s_at)
                for n in cutlass.range(span.full_end - span.full_begin, unroll=1):
                    first = span.full_end - n == span.end
                    pivot, total, skips = self._tile(state, s_at, pivot, total, skips, first, None, None)
                    s_at = self._next_s(rings, s_at)
                if const_expr(self.kinds.window_left):
                    for n in cutlass.range(span.full_begin - span.begin, unroll=1):
                        tile = span.full_begin - 1 - n
                        first = tile + 1 == span.end
                        pivot, total, skips = self._tile(state, s_at, pivot, total, skips, first, keys, tile)
                        s_at = self._next_s(rings, s_at)
                scale, lse = finish(pivot, total, sink_log2)
                if const_expr(self.kinds.seqused_q):
                    if place.use < IN_USE:
                        scale, lse = Float32(NOT_IN_USE), -Float32.inf
                rings.scales.acquire(scales_at)
                shared.scale[row, i] = scale
                rings.scales.publish(scales_at)
                scales_at = Cursor(i, scales_at.phase ^ 1)
                if place.use > 0:
                    outputs.lse[place.row, place.head, place.batch] = lse
                    if const_expr(self.counted):
                        count_row(outputs.counts, self.kinds.varlen, place.row, place.head, place.batch, span, skips)
            item = read_item(shared, rings, at, i)

    def _next_s(self, rings, s_at):
        """Where the next S is: in the same place, or of a single Q tile in the other."""
        return rings.s.next(s_at) if self.config.q_tiles == 1 else Cursor(s_at.index, s_at.phase ^ 1)

    @cute.jit
    def _place(self, state, item, values):
        """Where the thread's row goes, and its first visible key and the key after its last."""
        config, sequence = self.config, item.sequence
        row = rank_in_pair(config) * config.tile_m + state.row
        position = item.work.tile * config.positions + state.i * config.tile_positions + row // config.packed
        head = item.work.head * config.packed + row % config.packed
        use = Int32(position < sequence.rows_q) + Int32(position < sequence.seqlen_q)
        window = Window(values.window_left, values.window_right)
        keys = visible_keys(position, sequence.seqlen_q, sequence.seqlen_k, window)
        return Place(sequence.offset_q + position, head, self._batch(item.work), use), keys

    @cute.jit
    def _tile(self, state, s_at, pivot, total, skips, first, keys, tile):
        """One key tile: S to P, and the row's pivot, sum of weights and skips. Masked if `keys` is given."""
        config, values, rings = self.config, state.values, state.rings
        tmem, s_factor, s_barrier = state.tmem, state.factor, state.factor_barrier
        if const_expr(config.q_tiles == 1):
            tmem = TmemRows(at_place(config, tmem.tile, s_at.index), tmem.warp)
            s_factor = cute.make_tensor(s_factor.iterator + s_at.index * config.tile_m, s_factor.layout)
            s_barrier = s_barrier + s_at.index * roles.SOFTMAX_WARPS
        rings.s.wait(s_at)
        r_s = tmem.load(0, config.tile_n)
        if const_expr(self.kinds.softcap):
            for c in cutlass.range_constexpr(config.tile_n):
                r_s[c] = tanh(r_s[c] * values.capped_scale)
        share = config.share
        if const_expr(keys is not None):
            first_key = None
            if const_expr(self.kinds.window_left):
                first_key = keys[0] - tile * config.tile_n
            hide(r_s, first_key, keys[1] - tile * config.tile_n)
            share = Exp2Share()  # masks keep the ALUs busy, and rows of few keys want the exponent exact

        before = pivot
        pivot, factor = follow(before, row_max(r_s) * values.scale_log2, values.threshold)
        if const_expr(self.counted):
            skips = skips + Int32(before > -Float32.inf and pivot == before)
        if not first:
            s_factor[0] = factor
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(s_barrier)

        scale, shift, sums = values.scale_log2, bias(pivot), []
        for f in cutlass.range_constexpr(config.tile_n // FRAGMENT):
            scale_and_shift(r_s, f, scale, shift)
            tmem.store(config.p_offset + f * FRAGMENT // 2, exponentiate(r_s, f, share, self.dtype))
            sums = add_up(sums, r_s, f)
            if const_expr(f == 0):
                sums[0] = cute.arch.add_packed_f32x2(sums[0], (total * factor, Float32(0.0)))
            if const_expr((f + 1) * FRAGMENT == config.p_first):
                # S is still there, but ptxas cannot know: else it computes the rest before handing over the first part.
                there = cute.arch.mbarrier_test_wait(rings.s.full_barrier(s_at), s_at.phase)
                cute.arch.fence_view_async_tmem_store()
                rings.s.release(s_at)
                scale = scale if there else Float32(0.0)
        cute.arch.fence_view_async_tmem_store()
        rings.p_rest.publish(s_at)
        return pivot, total_of(sums), skips

    @cute.jit
    def correct(self, mma_o, shared, rings):
        """The correction warpgroup, one thread a row of both Q tiles. Waits for a tile's factors, but the first's.

        Lets go of `s` when O may be accumulated on: at once for an item's first tile; for the others after the vote,
        and after the rescale if a row of the warp has a factor below 1.
        """
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        row = thread % config.tile_m
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % roles.CORRECTION_WARPS
        t_o = mma_o.make_fragment_C(mma_o.partition_shape_C(config.mma_tiles[1][:2]))[(None, None), 0, 0]
        t_o = [cute.make_tensor(t_o.iterator + column, t_o.layout) for column in config.o_columns]
        tmem = [TmemRows(tile, warp) for tile in t_o]
        for i in cutlass.range_constexpr(config.q_tiles):
            rings.s.release(Cursor(Int32(i), Int32(0)))
        at, laps, factor_laps = rings.items.start(), Int32(0), Int32(0)
        item = read_item(shared, rings, at)
        while item.valid:
            at = rings.items.next(at)
            for n in cutlass.range(item.end - item.begin - 1, unroll=1):
                tile = item.end - 2 - n
                for i in cutlass.range_constexpr(config.q_tiles):
                    if tile >= item.span(i).begin and tile < item.span(i).end - 1:
                        rings.factor.wait(Cursor(roles.SOFTMAX_WARPS * i + warp, (factor_laps >> i) & 1))
                        factor_laps = lap_of(i, factor_laps)
                        factor = shared.factor[row, i]
                        if cute.arch.vote_any_sync(factor < 1.0):
                            self._rescale(tmem[i], factor)
                        rings.s.release(Cursor(Int32(i), Int32(0)))
            for i in cutlass.range_constexpr(config.q_tiles):
                if item.span(i).begin < item.span(i).end:
                    slot = slot_of(i, laps)
                    self._finish(tmem[i], i, row, shared, rings, slot, slot, slot)
                    laps = lap_of(i, laps)
            item = read_item(shared, rings, at)

    @cute.jit
    def correct_one(self, mma_o, shared, rings):
        """As `correct`, for a single Q tile. S of the next tile says nothing of O here, so a rescale waits for `o`."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        row = thread % config.tile_m
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % roles.CORRECTION_WARPS
        t_o = mma_o.make_fragment_C(mma_o.partition_shape_C(config.mma_tiles[1][:2]))[(None, None), 0, 0]
        tmem = TmemRows(cute.make_tensor(t_o.iterator + config.o_columns[0], t_o.layout), warp)
        # One tile has the same place and lap in `s` and in `o`.
        s_at, scales_at = rings.s.start(), Cursor(Int32(0), Int32(0))
        rings.s.release(s_at)
        at, factor_laps = rings.items.start(), Int32(0)
        item = read_item(shared, rings, at)
        while item.valid:
            at = rings.items.next(at)
            for _ in cutlass.range(item.end - item.begin - 1, unroll=1):
                o_at, s_at = s_at, rings.s.next(s_at)
                place = s_at.index
                rings.factor.wait(Cursor(roles.SOFTMAX_WARPS * place + warp, (factor_laps >> place) & 1))
                factor_laps = factor_laps ^ (1 << place)
                factor = shared.factor[row, place]
                if cute.arch.vote_any_sync(factor < 1.0):
                    rings.o.wait(o_at)
                    self._rescale(tmem, factor)
                rings.s.release(s_at)
            o_at, s_at = s_at, rings.s.next(s_at)
            self._finish(tmem, 0, row, shared, rings, scales_at, o_at, s_at)
            scales_at = Cursor(scales_at.index, scales_at.phase ^ 1)
            item = read_item(shared, rings, at)

    @cute.jit
    def _rescale(self, tmem, factor):
        """Multiplies the warp's rows of O in tensor memory by their factors."""
        for c in cutlass.range_constexpr(0, self.config.head_dim_v, 32):
            r_o = tmem.load(c, 32)
            for e in cutlass.range_constexpr(0, 32, 2):
                r_o[e], r_o[e + 1] = cute.arch.mul_packed_f32x2((r_o[e], r_o[e + 1]), (factor, factor))
            tmem.store(c, r_o)
        cute.arch.fence_view_async_tmem_store()

    @cute.jit
    def _finish(self, tmem, i: cutlass.Constexpr[int], row, shared, rings, slot, o_at, s_at):
        """Normalises O of Q tile i on its way to shared memory.

        Waits for the rows' scales, for the last O and for the last output to have left; lets go of them and of O, for
        the P V of `s_at`.
        """
        config, width = self.config, 32
        rings.scales.wait(slot)
        scale = shared.scale[row, i]
        rings.scales.release(slot)
        rings.o.wait(o_at)
        rings.out.acquire(slot)
        s_row = shared.out[opaque(row), None, i]  # else its 2 x 16 addresses are computed ahead, and spill
        for c in cutlass.range_constexpr(0, config.head_dim_v, width):
            r_o = tmem.load(c, width)
            r_out = cute.make_rmem_tensor(width, self.dtype)
            words = cute.recast_tensor(r_out, Int32)
            for e in cutlass.range_constexpr(0, width, 2):
                pair = cute.arch.mul_packed_f32x2((r_o[e], r_o[e + 1]), (scale, scale))
                if const_expr(self.kinds.seqused_q):
                    used = scale != NOT_IN_USE
                    pair = (pair[0] if used else Float32(0.0), pair[1] if used else Float32(0.0))
                words[e // 2] = pack(*pair, self.dtype)
            for e in cutlass.range_constexpr(0, width, 8):
                chunk = cute.make_tensor(r_out.iterator + e, cute.make_layout(8))
                cute.autovec_copy(chunk, cute.local_tile(s_row, (8,), ((c + e) // 8,)))
        rings.s.release(s_at)
        cute.arch.fence_view_async_shared()
        rings.out.publish(slot)

    @cute.jit
    def store(self, maps, shared, rings):
        """The store warp: the output by TMA. Waits for `out`; lets go of it when shared memory has been read."""
        config = self.config
        at, laps = rings.items.start(), Int32(0)
        item = read_item(shared, rings, at)
        while item.valid:
            at = rings.items.next(at)
            sequence, work = item.sequence, item.work
            if const_expr(self.kinds.varlen):
                m_o = maps.m_out[None, None, work.head, 0, sequence.offset_q + sequence.rows_q]
                rows = RAGGED_ROWS - sequence.rows_q
                m_o = cute.domain_offset(((0, rows) if config.packed > 1 else rows, 0), m_o)
            else:
                m_o = maps.m_out[None, None, work.head, work.batch]
            g_o = cute.local_tile(m_o, config.store_tile, (None, 0))
            t_so, t_go = boxes(maps.out, shared.out, g_o, 2)
            for i in cutlass.range_constexpr(config.q_tiles):
                if item.span(i).begin < item.span(i).end:
                    rings.out.wait(slot_of(i, laps))
                    tile = (config.q_tiles * work.tile + i) * config.ctas + rank_in_pair(config)
                    cute.copy(maps.out, t_so[None, i], t_go[None, tile])
                cute.arch.cp_async_bulk_commit_group()
            for i in cutlass.range_constexpr(config.q_tiles):
                cute.arch.cp_async_bulk_wait_group(config.q_tiles - 1 - i, read=True)
                if item.span(i).begin < item.span(i).end:
                    with cute.arch.elect_one():
                        rings.out.release(slot_of(i, laps))
                        if const_expr(config.o_replaces_q):
                            rings.q.release(slot_of(i, laps))
                    laps = lap_of(i, laps)
            item = read_item(shared, rings, at)
