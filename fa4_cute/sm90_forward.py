"""Attention forward for SM90 (Hopper): warp-specialised, persistent, exact.

Roles, one block of `warpgroups + 1` warpgroups per SM:

- scheduler (warp 1): walks the schedule and publishes the work items; writes the zeros of query tiles that see no key;
- load (warp 0): brings each item's Q, K and V by TMA;
- consumers (the other warpgroups): 64 query rows each; S = Q K^T and O += P V by wgmma, P from registers.

A work item is a query tile of one KV head. Where a group's heads divide a warpgroup's 64 rows, row r of the tile is
head `r % packed` of the group at position `r // packed`: its heads share K and V, and its rows, closer together, see
fewer key tiles under a window and on the diagonal. Otherwise the rows are those of one query head.

Rings (arrivals that complete a slot's full / empty barrier): items (the scheduler / every other warp), Q, K and V
(TMA bytes / every consumer warp).

A consumer's steady state, over the key tiles n of an item from the right to the left, the order in which wgmma groups
are issued being `Q K(n)`, `P V(n + 1)`:

    tensor cores   | Q K(n)   P V(n+1) |  (the other warpgroup's)  | Q K(n-1)   P V(n) |
    this warpgroup | issue  wait S(n) -> softmax of n -> wait O -> rescale O, P to 16 bits | issue ...

Warpgroups take turns to issue (named barriers), so the tensor cores work for one while another is in its softmax. With
two Q slots an item's last `P V` is issued together with the first `Q K^T` of the next item, whose scores stay in
registers during the epilogue: the tensor cores see no seam between items. With one Q slot the next item's Q is on its
way from S of the last tile on, if the output has shared memory of its own, in which it leaves some columns at a time.

Where rows see different keys (causal, windows) a warpgroup computes what its own 64 rows see of the item's key tiles,
and lets go of the others unread: one or two on the left, one or two on the right, and all but one where it has no rows.

Under a softcap a polynomial bends the scores of a warp and tile that are all near zero (`softcap.py`), as they usually
are; a vote decides whether exponentials are needed beside it, which changes no score's result.

O is rescaled only if a row of the warp moved its pivot (`softmax.follow_max`), which on most tiles none does.

Names: `m` a tensor in global memory, `s` in shared memory, `r` in registers, `t` partitioned for a thread or warpgroup;
`acc_s`, `acc_o` are accumulators, in which element `c + 2 r + 4 j` of a thread is row `8 r` and column `8 j + c` after
its own first one.

Source: Shah et al., "FlashAttention-3" (2024), sections 3.1 and 3.2; Zadouri et al., "FlashAttention-4" (2026), on
conditional rescaling; PTX ISA 9.0, sections on wgmma, mbarrier and cp.async.bulk.tensor.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

from fa4_core.problem import Kinds
from fa4_cute.params import DTYPES, Values, by_head, drawn, statistic_by_head
from fa4_cute.parts import Maps, Outputs
from fa4_cute.pipelines import Ring
from fa4_cute.ranges import Span, Window, key_span, visible_keys
from fa4_cute.schedule import (
    Extent,
    Lengths,
    Schedule,
    Sequence,
    WorkItem,
    draw,
    retire,
    sequence_of,
    start,
    take,
)
from fa4_cute.sm90_config import WARPGROUP, Sm90Config, config_for
from fa4_cute.sm90_parts import Item, Rings, Shared, State
from fa4_cute.softcap import LOWEST, Cap, all_near, bend, bend_near, cap_of
from fa4_cute.softmax import LOG2_E, finish, follow_max, rescale_factor, subtrahend
from fa4_cute.unseen import write_past_the_end, write_unseen
from fa4_cute.views import boxes, from_position, heads_packed

TURN_BARRIER = 1
"""First of the named barriers by which warpgroups take turns; barrier 0 is the block's."""
EPILOGUE_BARRIER = 5
RAGGED_BARRIER = 9
DRAW_AHEAD = 2
"""Key tiles that the load warp has still to bring when the next item is drawn: the counter's microsecond, and no more,
since an item drawn early cannot go to a block that is free sooner."""
ITEM_WORDS = 13
ITEM_ROOM = 16


class Sm90Forward:
    """One compiled kernel's host function and roles.

    counted: for tests, the kernel also writes for each row the key tiles visited and the rescales skipped.
    """

    def __init__(self, kinds: Kinds, config: Sm90Config | None = None, counted: bool = False) -> None:
        self.kinds = kinds
        self.config = config or config_for(kinds)
        if kinds.group % self.config.packed:
            raise ValueError(f"packed: got {self.config.packed} heads, a group has {kinds.group}")
        self.counted = counted
        self.dtype = DTYPES[kinds.dtype]
        self.overlap_items = self.config.q_slots > 1
        self.out_in_q = not self.config.own_columns
        self.out_columns = self.config.own_columns or self.config.head_dim_v
        self.item_slots = 1 if drawn(kinds) else 2
        self.ragged_k = kinds.varlen or kinds.seqused_k
        self.ragged_q = kinds.varlen or kinds.seqused_q

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
        mQ, mK, mV, mO = by_head(q), by_head(k), by_head(v), by_head(out)
        mLSE, seqlen_q = statistic_by_head(lse), mQ.shape[0]
        packed_q, packed_o = heads_packed(mQ, config.packed), heads_packed(mO, config.packed)
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        tile_q, tile_k = (config.tile_m, config.head_dim), (config.tile_n, config.head_dim)
        tile_v, tile_o = (config.tile_n, config.head_dim_v), (64, self.out_columns)
        one = self._shared_layout
        maps = Maps(
            *cpasync.make_tiled_tma_atom(load, packed_q, one(tile_q), tile_q),
            *cpasync.make_tiled_tma_atom(load, mK, one(tile_k), tile_k),
            *cpasync.make_tiled_tma_atom(load, mV, one(tile_v), tile_v),
            *cpasync.make_tiled_tma_atom(store, packed_o, self._output_layout(), tile_o),
        )
        batch = mQ.shape[3]
        if const_expr(cu_seqlens_q is not None):
            batch = cu_seqlens_q.shape[0] - 1
        extent = Extent(Int32(batch), packed_q.shape[2], seqlen_q, mK.shape[0], section)
        self.kernel(
            maps,
            Outputs(mO, mLSE, counter, counts),
            sink,
            Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            extent,
            Values(scale_log2, capped_scale, window_left, window_right, threshold),
            cap_of(capped_scale, scale_log2) if const_expr(self.kinds.softcap) else None,
        ).launch(grid=[programs, 1, 1], block=[config.threads, 1, 1], stream=stream, min_blocks_per_mp=1)

    def _shared_layout(self, tile: tuple[int, int], slots: int | None = None) -> cute.ComposedLayout:
        """Row-major tiles in the widest swizzle whose period divides a row."""
        kinds = warpgroup.SmemLayoutAtomKind
        width = tile[1] * self.dtype.width
        kind = next(
            kind
            for bits, kind in ((1024, kinds.K_SW128), (512, kinds.K_SW64), (256, kinds.K_SW32))
            if width % bits == 0
        )
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        if slots is None:
            return cute.tile_to_shape(atom, tile, order=(0, 1))
        return cute.tile_to_shape(atom, (*tile, slots), order=(0, 1, 2))

    def _output_layout(self) -> cute.ComposedLayout:
        """A warpgroup's 64 rows of O in shared memory, the columns that leave together: their own, or where Q was."""
        config = self.config
        if not self.out_in_q:
            return self._shared_layout((64, self.out_columns))
        q = self._shared_layout((config.tile_m, config.head_dim))
        return cute.composition(q, cute.make_layout((64, config.head_dim_v), stride=(1, config.tile_m)))

    @cute.kernel
    def kernel(
        self,
        maps: Maps,
        outputs: Outputs,
        sink: cute.Tensor | None,
        lengths: Lengths,
        extent: Extent,
        values: Values,
        cap: Cap | None,
    ):
        config = self.config
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        consumer_warps = 4 * config.warpgroups

        memory = cutlass.utils.SmemAllocator()
        slots = config.kv_slots
        barriers = memory.allocate_array(Int64, 4 + 2 * config.q_slots + 4 * slots)
        rings = Rings(
            items=Ring(barriers, self.item_slots, 1, consumer_warps + 1),
            q=Ring(barriers + 4, config.q_slots, 1, consumer_warps),
            k=Ring(barriers + 4 + 2 * config.q_slots, slots, 1, consumer_warps),
            v=Ring(barriers + 4 + 2 * config.q_slots + 2 * slots, slots, 1, consumer_warps),
        )
        layout_q = self._shared_layout((config.tile_m, config.head_dim), config.q_slots)
        layout_k = self._shared_layout((config.tile_n, config.head_dim), slots)
        layout_v = self._shared_layout((config.tile_n, config.head_dim_v), slots)
        s_items = cute.make_tensor(memory.allocate_array(Int32, 2 * ITEM_ROOM), cute.make_layout((ITEM_ROOM, 2)))
        s_q = memory.allocate_tensor(self.dtype, layout_q.outer, 1024, layout_q.inner)
        s_k = memory.allocate_tensor(self.dtype, layout_k.outer, 1024, layout_k.inner)
        s_v = memory.allocate_tensor(self.dtype, layout_v.outer, 1024, layout_v.inner)
        if const_expr(not self.out_in_q):
            layout_o = self._shared_layout((64, self.out_columns), config.warpgroups)
            s_o = memory.allocate_tensor(self.dtype, layout_o.outer, 1024, layout_o.inner)
        else:
            rows = cute.make_layout((64, config.head_dim_v, config.warpgroups), stride=(1, config.tile_m, 64))
            s_o = cute.composition(s_q[None, None, 0], rows)
        shared = Shared(s_items, s_q, s_k, s_v, s_o)

        if warp_index == 0:
            with cute.arch.elect_one():
                for ring in rings:
                    ring.init()
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        producer_registers, consumer_registers = config.registers
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp_index == 0:
                for atom in (maps.q, maps.k, maps.v, maps.out):
                    cpasync.prefetch_descriptor(atom)
                self.load(maps, shared, rings)
            if warp_index == 1:
                self.schedule(outputs, sink, shared, rings, lengths, extent, values)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self.consume(maps, outputs, sink, shared, rings, values, cap)

    @cute.jit
    def schedule(self, outputs, sink, shared, rings, lengths, extent, values):
        """The scheduler warp. Waits on the items' empty barriers and completes their full ones.

        Where items are drawn it draws the next one when the load warp is nearly through with the last (`DRAW_AHEAD`).
        """
        config = self.config
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        longest_first = self.kinds.window_left or self.kinds.window_right
        order = Schedule(lengths, extent, programs, config.positions, longest_first)
        window = Window(values.window_left, values.window_right)
        at = rings.items.start()
        valid, work, place = take(order, start(order), program, program)
        while valid:
            sequence = sequence_of(work.batch, lengths, extent)
            first = work.tile * config.positions
            last = cutlass.min(first + config.positions, sequence.seqlen_q)
            span = key_span(first, last, sequence.seqlen_q, sequence.seqlen_k, window, config.tile_n)
            if span.begin == span.end or first >= sequence.seqlen_q:
                end = cutlass.min(first + config.positions, sequence.rows_q)
                write_unseen(outputs, sink, self.kinds, config.packed, work, sequence, first, end)
            else:
                with cute.arch.elect_one():
                    self._publish(shared.items, at.index, (Int32(1), *work, *sequence, *span))
                    rings.items.publish(at)
                at = rings.items.next(at)
                rings.items.acquire(at)
            index = None
            if const_expr(outputs.counter is not None):
                index = draw(outputs.counter, programs)
            valid, work, place = take(order, place, program, index)

        with cute.arch.elect_one():
            self._publish(shared.items, at.index, (Int32(0),) * ITEM_WORDS)
            rings.items.publish(at)
        if const_expr(outputs.counter is not None):
            retire(outputs.counter, programs)
        if const_expr(self.kinds.varlen):
            write_past_the_end(outputs, self.kinds, config.packed, extent, lengths, program, programs)

    @cute.jit
    def _publish(self, s_items, slot, words):
        for at in cutlass.range_constexpr(ITEM_WORDS):
            s_items[at, slot] = words[at]

    @cute.jit
    def load(self, maps, shared, rings):
        """The load warp. Waits on the empty barriers of Q, K and V; TMA completes their full ones.

        Loads run ahead of the consumers by the rings' slots: Q of the next item and its first K are on their way while
        the consumers finish the last tiles of this one. An item's order: Q and K(end-1), then K(n), V(n+1) to V(begin).
        """
        config = self.config
        items, q_at, k_at, v_at = rings.items.start(), rings.q.start(), rings.k.start(), rings.v.start()
        item = self._read(shared.items, rings.items, items)
        while item.valid:
            work, sequence, span = item.work, item.sequence, item.span
            head_kv = work.head // (self.kinds.group // config.packed)
            batch = self._batch(work)
            m_q = from_position(maps.m_q[None, None, work.head, batch], sequence.offset_q, config.packed)
            m_k = cute.domain_offset((sequence.offset_k, 0), maps.m_k[None, None, head_kv, batch])
            m_v = cute.domain_offset((sequence.offset_k, 0), maps.m_v[None, None, head_kv, batch])
            g_q = cute.local_tile(m_q, (config.tile_m, config.head_dim), (work.tile, 0))
            g_k = cute.local_tile(m_k, (config.tile_n, config.head_dim), (None, 0))
            g_v = cute.local_tile(m_v, (config.tile_n, config.head_dim_v), (None, 0))
            t_sq, t_gq = boxes(maps.q, shared.q, g_q, 2)
            t_sk, t_gk = boxes(maps.k, shared.k, g_k, 2)
            t_sv, t_gv = boxes(maps.v, shared.v, g_v, 2)

            if const_expr(self.overlap_items):
                self._load(rings.q, q_at, maps.q, t_gq, t_sq)
            self._load(rings.k, k_at, maps.k, t_gk[None, span.end - 1], t_sk)
            if const_expr(not self.overlap_items):  # Q's slot is free later than one of K's
                self._load(rings.q, q_at, maps.q, t_gq, t_sq)
            q_at, k_at = rings.q.next(q_at), rings.k.next(k_at)
            to_come = span.end - span.begin - 1
            if to_come < DRAW_AHEAD:
                self._release(rings.items, items)
            for i in cutlass.range(to_come, unroll=1):
                if to_come - i == DRAW_AHEAD:
                    self._release(rings.items, items)
                tile = span.end - 2 - i
                self._load(rings.k, k_at, maps.k, t_gk[None, tile], t_sk)
                k_at = rings.k.next(k_at)
                self._load(rings.v, v_at, maps.v, t_gv[None, tile + 1], t_sv)
                v_at = rings.v.next(v_at)
            self._load(rings.v, v_at, maps.v, t_gv[None, span.begin], t_sv)
            v_at = rings.v.next(v_at)
            items = rings.items.next(items)
            item = self._read(shared.items, rings.items, items)

    @cute.jit
    def _batch(self, work):
        """The batch coordinate of the tensors, which packed ones do not have."""
        return Int32(0) if const_expr(self.kinds.varlen) else work.batch

    @cute.jit
    def _load(self, ring, at, atom, source, target):
        ring.acquire(at)
        with cute.arch.elect_one():
            ring.expect(at, self._bytes(target))
        cute.copy(atom, source, target[None, at.index], tma_bar_ptr=ring.full_barrier(at))

    def _bytes(self, target) -> int:
        return cute.size(target.shape[0]) * self.dtype.width // 8

    @cute.jit
    def consume(self, maps, outputs, sink, shared, rings, values, cap):
        """A consumer warpgroup. Waits on the full barriers of every ring and releases their slots, warp by warp.

        Takes turns with the other warpgroups around the issue of its wgmma groups; see the timeline above.
        """
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(thread // WARPGROUP) - 1
        mma_s = self._mma(config.tile_n, rows_from_registers=False)
        mma_o = self._mma(config.head_dim_v, rows_from_registers=True)
        part_s, part_o = mma_s.get_slice(group * WARPGROUP), mma_o.get_slice(group * WARPGROUP)
        s_vt = cute.composition(
            shared.v, cute.make_ordered_layout((config.head_dim_v, config.tile_n, config.kv_slots), order=(1, 0, 2))
        )
        p = mma_o.make_fragment_A(part_o.partition_shape_A((config.tile_m, config.tile_n)))
        state = State(
            group=group,
            mma_s=mma_s,
            mma_o=mma_o,
            q=mma_s.make_fragment_A(part_s.partition_A(shared.q)),
            k=mma_s.make_fragment_B(part_s.partition_B(shared.k)),
            v=mma_o.make_fragment_B(part_o.partition_B(s_vt)),
            p=p,
            acc_s=cute.make_rmem_tensor(part_s.partition_shape_C((config.tile_m, config.tile_n)), Float32),
            acc_o=cute.make_rmem_tensor(part_o.partition_shape_C((config.tile_m, config.head_dim_v)), Float32),
            pivot=cute.make_rmem_tensor(2, Float32),
            row_sum=cute.make_rmem_tensor(2, Float32),
            skips=cute.make_rmem_tensor(2, Int32),
            rings=rings,
            values=values,
            cap=cap,
        )
        if const_expr(config.turns):
            if group == 0:
                self._pass_turn(group - 1)

        items, q_at, k_at, v_at = rings.items.start(), rings.q.start(), rings.k.start(), rings.v.start()
        item = self._read(shared.items, rings.items, items)
        self._release(rings.items, items)
        items = rings.items.next(items)
        if const_expr(self.overlap_items):
            if item.valid:
                k_at = self._first_scores(state, item, q_at, k_at)
        while item.valid:
            if const_expr(not self.overlap_items):
                k_at = self._first_scores(state, item, q_at, k_at)
            span = self._own_span(state, item)
            ahead = item.span.end - span.end
            if const_expr(self.kinds.uneven):
                if ahead > 1:
                    k_at, v_at = self._pass_by(state, shared.v, item, ahead, q_at, k_at, v_at)
            state.acc_o.fill(0.0)
            state.row_sum.fill(0.0)
            state.pivot.fill(-Float32.inf)
            state.skips.fill(0)
            self._release(rings.k, k_at)
            k_at = rings.k.next(k_at)
            self._release_q(state, q_at, span.end - 1, span)
            near = self._cap(state, True)
            cut = span.end > span.full_end
            if const_expr(self.kinds.window_left):
                cut = cut or span.end <= span.full_begin
            if cut:
                self._mask(state, item, span.end - 1)
            self._softmax(state, near, True)
            self._round(state)
            if const_expr(self.ragged_k):
                if ahead <= 1:
                    self._clear_past_the_end(state, shared.v, item, v_at)
            if const_expr(self.kinds.uneven):
                if ahead == 1:
                    self._skip_turn(state.group)
                    v_at = self._pass_value(state, v_at)

            masked_end = span.end - 1
            full_end = cutlass.min(span.full_end, masked_end)
            full_begin = cutlass.min(span.full_begin, full_end)
            if const_expr(self.kinds.window_right):
                for i in cutlass.range(masked_end - full_end, unroll=1):
                    k_at, v_at = self._step(state, item, span, masked_end - 1 - i, q_at, k_at, v_at, True)
            for i in cutlass.range(full_end - full_begin, unroll=1):
                k_at, v_at = self._step(state, item, span, full_end - 1 - i, q_at, k_at, v_at, False)
            if const_expr(self.kinds.window_left):
                for i in cutlass.range(full_begin - span.begin, unroll=1):
                    k_at, v_at = self._step(state, item, span, full_begin - 1 - i, q_at, k_at, v_at, True)
                for _ in cutlass.range(span.begin - item.span.begin, unroll=1):
                    k_at = self._pass_key(state, k_at)

            following = self._read(shared.items, rings.items, items)
            self._release(rings.items, items)
            items = rings.items.next(items)
            if const_expr(self.overlap_items):
                self._release(rings.q, q_at)
                q_next = rings.q.next(q_at)
                k_at = self._seam(state, following, q_at, q_next, k_at, v_at)
                q_at = q_next
            else:
                self._last_values(state, v_at)
            self._release(rings.v, v_at)
            v_at = rings.v.next(v_at)
            if const_expr(self.kinds.window_left):
                for _ in cutlass.range(span.begin - item.span.begin, unroll=1):
                    v_at = self._pass_value(state, v_at)
            self._write(state, maps, outputs, sink, shared, item, span)
            if const_expr(not self.overlap_items):
                if const_expr(self.out_in_q):
                    self._release(rings.q, q_at)
                q_at = rings.q.next(q_at)
            item = following
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _own_span(self, state, item):
        """The key tiles that the warpgroup's own rows see, of the item's; one at least.

        Rows further up see fewer tiles on the right, rows further down fewer on the left; for 128 rows, two at most.
        """
        if const_expr(not self.kinds.uneven):
            return item.span
        config, sequence = self.config, item.sequence
        window = Window(state.values.window_left, state.values.window_right)
        first = self._first_position(state, item.work)
        last = cutlass.min(first + config.positions // config.warpgroups, sequence.seqlen_q)
        own = key_span(first, last, sequence.seqlen_q, sequence.seqlen_k, window, config.tile_n)
        begin, full_begin, full_end, end = own
        if first >= last or end <= begin:  # no row of the sequence, or none that sees a key
            begin = item.span.begin
            full_begin, full_end, end = begin, begin, begin + 1
        return Span(begin, full_begin, full_end, end)

    @cute.jit
    def _reach(self, state, item, k_at):
        """Waits for the item's first key tile, or the second where the warpgroup's rows see nothing of the first.

        Further than that would wait for what other warpgroups do in turns after this one. Returns K's cursor.
        """
        ring = state.rings.k
        ring.wait(k_at)
        if const_expr(self.kinds.uneven):
            if item.span.end - self._own_span(state, item).end == 1:
                self._release(ring, k_at)
                k_at = ring.next(k_at)
                ring.wait(k_at)
        return k_at

    @cute.jit
    def _pass_by(self, state, s_v, item, ahead, q_at, k_at, v_at):
        """Lets go of the item's first key tiles, two or more, and computes S of the one after; returns both cursors.

        A turn is taken for each, so that warpgroups stay within a tile of one another; the first one's was the seam's.
        """
        for i in cutlass.range(ahead, unroll=1):
            if i > 0:
                k_at = self._pass_key(state, k_at)
                v_at = self._pass_value(state, v_at)
            else:
                self._release(state.rings.k, k_at)
                k_at = state.rings.k.next(k_at)
                if const_expr(self.ragged_k):
                    self._clear_past_the_end(state, s_v, item, v_at)
        state.rings.k.wait(k_at)
        self._scores_alone(state, q_at.index, k_at.index)
        return k_at, self._pass_value(state, v_at)

    @cute.jit
    def _pass_key(self, state, k_at):
        """A turn without products, for a key tile that the warpgroup's rows do not see; returns the next cursor."""
        state.rings.k.wait(k_at)
        self._skip_turn(state.group)
        self._release(state.rings.k, k_at)
        return state.rings.k.next(k_at)

    @cute.jit
    def _pass_value(self, state, v_at):
        """Lets go of the values of such a tile."""
        state.rings.v.wait(v_at)
        self._release(state.rings.v, v_at)
        return state.rings.v.next(v_at)

    def _mma(self, columns: int, rows_from_registers: bool) -> cute.TiledMma:
        """wgmma tiles of 64 rows a warpgroup: S = Q K^T from shared memory, O = P V with P from registers."""
        source = warpgroup.OperandSource
        major = cute.nvgpu.OperandMajorMode
        op = warpgroup.MmaF16BF16Op(
            self.dtype,
            Float32,
            (64, columns, 16),
            source.RMEM if rows_from_registers else source.SMEM,
            major.K,
            major.MN if rows_from_registers else major.K,
        )
        return cute.make_tiled_mma(op, cute.make_layout((self.config.warpgroups, 1, 1)))

    @cute.jit
    def _issue(self, mma, acc, a, b, add: cutlass.Constexpr[bool]):
        """Issues acc = a b, or acc += a b, as one wgmma group."""
        warpgroup.fence()
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, add)
        for k in cutlass.range_constexpr(cute.size(a.shape[2])):
            cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    @cute.jit
    def _scores(self, state, q_slot, k_slot):
        self._issue(
            state.mma_s, state.acc_s, state.q[None, None, None, q_slot], state.k[None, None, None, k_slot], False
        )

    @cute.jit
    def _values(self, state, v_slot):
        self._issue(state.mma_o, state.acc_o, state.p, state.v[None, None, None, v_slot], True)

    @cute.jit
    def _scores_alone(self, state, q_slot, k_slot):
        """A turn with S alone, and the wait for it."""
        self._await_turn(state.group)
        self._scores(state, q_slot, k_slot)
        self._pass_turn(state.group)
        warpgroup.wait_group(0)

    @cute.jit
    def _first_scores(self, state, item, q_at, k_at):
        """S of an item's first tile, with nothing to overlap it with; returns K's cursor there."""
        state.rings.q.wait(q_at)
        k_at = self._reach(state, item, k_at)
        self._scores_alone(state, q_at.index, k_at.index)
        return k_at

    @cute.jit
    def _last_values(self, state, v_at):
        """O of an item's last tile, with nothing to overlap it with."""
        state.rings.v.wait(v_at)
        self._await_turn(state.group)
        self._values(state, v_at.index)
        self._pass_turn(state.group)
        warpgroup.wait_group(0)

    @cute.jit
    def _step(self, state, item, span, tile, q_at, k_at, v_at, masked: cutlass.Constexpr[bool]):
        """One turn of the steady state: S of `tile` and O of the tile before it; returns the cursors after both."""
        rings = state.rings
        rings.k.wait(k_at)
        self._await_turn(state.group)
        self._scores(state, q_at.index, k_at.index)
        rings.v.wait(v_at)
        self._values(state, v_at.index)
        self._pass_turn(state.group)
        warpgroup.wait_group(1)
        self._release(rings.k, k_at)
        self._release_q(state, q_at, tile, span)
        near = self._cap(state, masked)
        if const_expr(masked):
            self._mask(state, item, tile)
        moved, factor = self._softmax(state, near, masked)
        warpgroup.wait_group(0)
        self._release(rings.v, v_at)
        self._round(state)
        self._rescale(state, moved, factor)
        return rings.k.next(k_at), rings.v.next(v_at)

    @cute.jit
    def _seam(self, state, following, q_at, q_next, k_at, v_at):
        """O of an item's last tile and S of the next item's first; after the last item S repeats old tiles, unread.

        No branch goes around the products: ptxas would wait for each of them, everywhere. Returns K's cursor.
        """
        rings = state.rings
        q_slot, k_slot = q_at.index, (k_at.index + self.config.kv_slots - 1) % self.config.kv_slots
        if following.valid:
            rings.q.wait(q_next)
            k_at = self._reach(state, following, k_at)
            q_slot, k_slot = q_next.index, k_at.index
        self._await_turn(state.group)
        self._scores(state, q_slot, k_slot)
        rings.v.wait(v_at)
        self._values(state, v_at.index)
        self._pass_turn(state.group)
        warpgroup.wait_group(0)
        return k_at

    @cute.jit
    def _await_turn(self, group):
        if const_expr(self.config.turns):
            cute.arch.barrier(barrier_id=TURN_BARRIER + group, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _pass_turn(self, group):
        if const_expr(self.config.turns):
            after = (group + 1) % self.config.warpgroups
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + after, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _skip_turn(self, group):
        self._await_turn(group)
        self._pass_turn(group)

    @cute.jit
    def _release(self, ring, at):
        with cute.arch.elect_one():
            ring.release(at)

    @cute.jit
    def _release_q(self, state, q_at, tile, span):
        """Lets go of Q's only slot once S of the item's last tile is done, unless the output is to pass through it."""
        if const_expr(not self.overlap_items and not self.out_in_q):
            if tile == span.begin:
                self._release(state.rings.q, q_at)

    @cute.jit
    def _read(self, s_items, ring, at):
        """The work item in a slot; the warp has read it when this returns."""
        ring.wait(at)
        word = [s_items[i, at.index] for i in range(ITEM_WORDS)]
        cute.arch.sync_warp()
        return Item(word[0] != 0, WorkItem(*word[1:4]), Sequence(*word[4:9]), Span(*word[9:13]))

    @cute.jit
    def _first_position(self, state, work):
        """Position within the sequence of the warpgroup's first row."""
        config = self.config
        return work.tile * config.positions + state.group * (config.positions // config.warpgroups)

    @cute.jit
    def _place(self, state, item, r: cutlass.Constexpr[int]) -> tuple[Int32, Int32]:
        """Position within the sequence and query head of the thread's row r; row 1 is 8 rows below row 0.

        `packed` is a power of two, so 16 rows, and 8, are whole positions or parts of one: the quotients add up.
        """
        packed = self.config.packed
        thread, _, _ = cute.arch.thread_idx()
        within = thread % WARPGROUP
        of_warp, of_lane = within // 32 * 16, within % 32 // 4
        position = self._first_position(state, item.work) + of_warp // packed + of_lane // packed
        head = item.work.head * packed + (of_warp + of_lane) % packed
        return position + 8 * r // packed, head + 8 * r % packed

    @cute.jit
    def _mask(self, state, item, tile):
        """Hides the scores of keys that their row does not see."""
        column = tile * self.config.tile_n + cute.arch.lane_idx() % 4 * 2
        window = Window(state.values.window_left, state.values.window_right)
        for r in cutlass.range_constexpr(2):
            position, _ = self._place(state, item, r)
            first, end = visible_keys(position, item.sequence.seqlen_q, item.sequence.seqlen_k, window)
            first, end = first - column, end - column
            for j in cutlass.range_constexpr(self.config.tile_n // 8):
                for c in cutlass.range_constexpr(2):
                    at = 4 * j + 2 * r + c
                    visible = 8 * j + c < end
                    if const_expr(self.kinds.window_left):
                        visible = visible and 8 * j + c >= first
                    state.acc_s[at] = state.acc_s[at] if visible else -Float32.inf

    @cute.jit
    def _cap(self, state, masked: cutlass.Constexpr[bool]):
        """Softcap: normalises the scores, before any is hidden; returns whether all of the warp's are near.

        masked: -inf is to mean a hidden key, so scores of -inf become finite.
        """
        near = True
        if const_expr(self.kinds.softcap):
            scores = [state.acc_s[at] * state.cap.scale for at in range(self.config.tile_n // 2)]
            near = all_near(scores)
            for at in cutlass.range_constexpr(self.config.tile_n // 2):
                state.acc_s[at] = cute.arch.fmax(scores[at], LOWEST, nan=True) if masked else scores[at]
        return near

    @cute.jit
    def _softmax(self, state, near, masked: cutlass.Constexpr[bool]):
        """Turns scores into weights against each row's pivot, in place, and follows the row sums.

        near, masked: what `_cap` returned and was told. Returns for the thread's two rows whether the pivot moved, and
        the factor that O has to be multiplied by.
        """
        highest = []
        for r in cutlass.range_constexpr(2):
            of_row = _fold(self._row(state, r), cute.arch.fmax)
            of_row = cute.arch.fmax(of_row, cute.arch.shuffle_sync_bfly(of_row, 1))
            highest.append(cute.arch.fmax(of_row, cute.arch.shuffle_sync_bfly(of_row, 2)))
        moved, factor = (Boolean(False), Boolean(False)), (Float32(1.0), Float32(1.0))
        if const_expr(self.kinds.softcap):
            if near:
                moved, factor = self._weigh(state, highest, lambda y, shift: bend_near(y, state.cap, shift))
            else:
                moved, factor = self._weigh(state, highest, lambda y, shift: bend(y, state.cap, shift, masked))
        else:
            scale = state.values.scale_log2
            moved, factor = self._weigh(state, highest, lambda scores, shift: [s * scale + shift for s in scores])
        return moved, factor

    @cute.jit
    def _weigh(self, state, highest, exponents: cutlass.Constexpr):
        """`_softmax` from the rows' highest scores on; exponents(scores, shift) are in log2 units, shift added."""
        highest = exponents(highest, Float32(0.0))
        moved, factor = [False, False], [Float32(1.0), Float32(1.0)]
        for r in cutlass.range_constexpr(2):
            before = state.pivot[r]
            pivot, moved[r] = follow_max(before, highest[r], state.values.threshold)
            state.pivot[r] = pivot
            factor[r] = rescale_factor(before, pivot) if moved[r] else Float32(1.0)
            if const_expr(self.counted):
                kept = before > -Float32.inf and not moved[r]
                state.skips[r] = state.skips[r] + Int32(kept)
            scores = exponents(self._row(state, r), -subtrahend(pivot))
            weights = [cute.math.exp2(score, fastmath=True) for score in scores]
            for at in cutlass.range_constexpr(len(weights)):
                state.acc_s[at // 2 * 4 + 2 * r + at % 2] = weights[at]
            state.row_sum[r] = state.row_sum[r] * factor[r] + _fold(weights, _add)
        return (moved[0], moved[1]), (factor[0], factor[1])

    def _row(self, state, r: int) -> list:
        """The thread's scores of its row r."""
        return [state.acc_s[at // 2 * 4 + 2 * r + at % 2] for at in range(self.config.tile_n // 4)]

    @cute.jit
    def _round(self, state):
        """P in 16 bits, where wgmma reads it; its elements lie as those of S."""
        pairs = cute.recast_tensor(state.p, Int32)
        for at in cutlass.range_constexpr(self.config.tile_n // 4):
            pairs[at] = _pack(state.acc_s[2 * at], state.acc_s[2 * at + 1], self.dtype)

    @cute.jit
    def _rescale(self, state, moved, factor):
        """Multiplies O by the rows' factors, if any row of the warp moved its pivot."""
        if cute.arch.vote_any_sync(moved[0] or moved[1]):
            for at in cutlass.range_constexpr(cute.size(state.acc_o)):
                state.acc_o[at] = state.acc_o[at] * factor[at // 2 % 2]

    @cute.jit
    def _clear_past_the_end(self, state, s_v, item, v_at):
        """Zeros the rows of V past the sequence's end in its last tile: 0 times a neighbour's NaN would show."""
        config = self.config
        rows = item.sequence.seqlen_k - (item.span.end - 1) * config.tile_n
        if rows < config.tile_n:
            state.rings.v.wait(v_at)
            thread, _, _ = cute.arch.thread_idx()
            pieces = config.head_dim_v // 8  # of a row, 16 bytes each
            zeros = cute.make_rmem_tensor(8, self.dtype)
            zeros.fill(0.0)
            for at in cutlass.range(
                rows * pieces + thread - WARPGROUP, config.tile_n * pieces, WARPGROUP * config.warpgroups, unroll=1
            ):
                line = s_v[at // pieces, None, v_at.index]
                cute.autovec_copy(zeros, cute.local_tile(line, (8,), (at % pieces,)))
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=RAGGED_BARRIER, number_of_threads=WARPGROUP * config.warpgroups)

    @cute.jit
    def _write(self, state, maps, outputs, sink, shared, item, span):
        """Normalises O and writes it and the LSE; by TMA where the warpgroup's 64 rows are the sequence's own."""
        sequence, work = item.sequence, item.work
        batch = self._batch(work)
        sinks_log2 = [None, None]
        if const_expr(sink is not None):
            sinks_log2 = [Float32(sink[self._place(state, item, r)[1]]) * LOG2_E for r in range(2)]
        for r in cutlass.range_constexpr(2):
            position, head = self._place(state, item, r)
            total = state.row_sum[r]
            total = total + cute.arch.shuffle_sync_bfly(total, 1)
            total = total + cute.arch.shuffle_sync_bfly(total, 2)
            scale, lse = finish(state.pivot[r], total, sinks_log2[r])
            takes_part = True
            if const_expr(self.kinds.seqused_q):
                takes_part = position < sequence.seqlen_q
                lse = lse if takes_part else -Float32.inf
            for at in cutlass.range_constexpr(cute.size(state.acc_o) // 2):
                of_row = at // 2 * 4 + 2 * r + at % 2
                scaled = state.acc_o[of_row] * scale
                if const_expr(self.kinds.seqused_q):  # rows that take no part may hold NaN
                    scaled = scaled if takes_part else Float32(0.0)
                state.acc_o[of_row] = scaled
            if cute.arch.lane_idx() % 4 == 0 and position < sequence.rows_q:
                outputs.lse[sequence.offset_q + position, head, batch] = lse
                if const_expr(self.counted):
                    self._count(outputs.counts, sequence.offset_q + position, head, batch, span, state.skips[r])

        r_o = cute.make_rmem_tensor(state.acc_o.layout, self.dtype)
        pairs = cute.recast_tensor(r_o, Int32)
        for at in cutlass.range_constexpr(cute.size(state.acc_o) // 2):
            pairs[at] = _pack(state.acc_o[2 * at], state.acc_o[2 * at + 1], self.dtype)
        whole = True
        if const_expr(self.ragged_q):
            own = self.config.positions // self.config.warpgroups
            whole = self._first_position(state, work) + own <= sequence.rows_q
        if whole:
            self._store_tile(state, maps, shared, r_o, sequence, work, batch)
        else:
            self._store_rows(state, outputs.out, r_o, item, batch)

    @cute.jit
    def _store_tile(self, state, maps, shared, r_o, sequence, work, batch):
        """64 rows of O through shared memory and TMA; rows past a dense tensor's end are cut by TMA."""
        group, columns = state.group, self.out_columns
        thread, _, _ = cute.arch.thread_idx()
        leader = cute.arch.make_warp_uniform(thread // 32) % 4 == 0
        sync = EPILOGUE_BARRIER + group
        s_o = shared.out[None, None, group]
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        mma = self._mma(columns, rows_from_registers=True)
        copy = cute.make_tiled_copy_C(atom, cute.make_tiled_mma(mma.op)).get_slice(thread % WARPGROUP)
        fragment = cute.make_layout(mma.get_slice(0).partition_shape_C((self.config.tile_m, columns)))
        m_o = from_position(maps.m_out[None, None, work.head, batch], sequence.offset_q, self.config.packed)
        for part in cutlass.range_constexpr(-(-self.kinds.head_dim_v // columns)):
            if leader:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.barrier(barrier_id=sync, number_of_threads=WARPGROUP)
            r_part = cute.make_tensor(r_o.iterator + part * cute.size(fragment), fragment)
            cute.copy(atom, copy.retile(r_part), copy.partition_D(s_o))
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=sync, number_of_threads=WARPGROUP)
            if leader:
                g_o = cute.local_tile(m_o, (64, columns), (work.tile * self.config.warpgroups + group, part))
                t_so, t_go = boxes(maps.out, s_o, g_o, 2)
                cute.copy(maps.out, t_so, t_go)
                cute.arch.cp_async_bulk_commit_group()
                if const_expr(self.out_in_q):
                    cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _store_rows(self, state, m_out, r_o, item, batch):
        """The last rows of a packed sequence, straight from registers: the next rows are another sequence's."""
        pairs = cute.recast_tensor(r_o, Int32)
        column = cute.arch.lane_idx() % 4 * 2
        for r in cutlass.range_constexpr(2):
            position, head = self._place(state, item, r)
            if position < item.sequence.rows_q:
                line = m_out[item.sequence.offset_q + position, None, head, batch]
                line = cute.recast_tensor(line, Int32)
                for j in cutlass.range_constexpr(self.config.head_dim_v // 8):
                    if 8 * j + column < self.kinds.head_dim_v:
                        line[4 * j + column // 2] = pairs[2 * j + r]

    @cute.jit
    def _count(self, counts, row, head, batch, span, skips):
        """For tests: key tiles visited and rescales skipped of a row."""
        of_row = counts[head, row, None] if const_expr(self.kinds.varlen) else counts[batch, head, row, None]
        of_row[0] = span.end - span.begin
        of_row[1] = skips


def _fold(values: list, combine: Any) -> Any:
    """Combines values pairwise in four chains, short enough to hide an instruction's latency."""
    chains = values[:4]
    for at in range(4, len(values)):
        chains[at % 4] = combine(chains[at % 4], values[at])
    return combine(combine(chains[0], chains[1]), combine(chains[2], chains[3]))


def _add(a: Float32, b: Float32) -> Float32:
    return a + b


def _pack(low: Float32, high: Float32, dtype: Any) -> Int32:
    """Two floats rounded to 16 bits in one word, the first in the low half."""
    name = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Int32], read_only_args=[low, high]
    )
