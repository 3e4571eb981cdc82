"""Attention forward for SM90 (Hopper): warp-specialised, persistent, exact.

Roles, one block of `warpgroups + 1` warpgroups per SM:

- scheduler (warp 1): walks the schedule and publishes the work items; writes the zeros of query tiles that see no key;
- load (warp 0): brings each item's Q, K and V by TMA;
- consumers (the other warpgroups): 64 query rows each; S = Q K^T and O += P V by wgmma, P from registers.

Here are the load warp and the consumers' main loop. Beside it, the scheduler (`sm90_scheduler`), the softmax of a tile
(`sm90_softmax`), an item's end (`sm90_epilogue`), which rows a thread holds (`sm90_places`), how tiles lie
(`sm90_tiles`).

A work item is a query tile of one KV head. Where a group's heads divide a warpgroup's 64 rows, row r of the tile is
head `r % packed` of the group at position `r // packed`: its heads share K and V, and its rows, closer together, see
fewer key tiles under a window and on the diagonal. Otherwise the rows are those of one query head.

Rings (arrivals that complete a slot's full / empty barrier): items (the scheduler / every lane of every other warp,
each of which reads them), Q, K and V (TMA bytes / every consumer warp).

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

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from fa4_core.problem import Kinds
from fa4_cute.params import DTYPES, Values, by_head, drawn, statistic_by_head
from fa4_cute.parts import Maps, Outputs
from fa4_cute.pipelines import Ring
from fa4_cute.schedule import Extent, Lengths
from fa4_cute.sm90_config import RAGGED_BARRIER, TURN_BARRIER, WARPGROUP, WARPGROUP_ROWS, Sm90Config, config_for
from fa4_cute.sm90_epilogue import Epilogue
from fa4_cute.sm90_parts import Rings, Shared, State
from fa4_cute.sm90_places import own_span
from fa4_cute.sm90_scheduler import ITEM_ROOM, Scheduler, read_item
from fa4_cute.sm90_softmax import Softmax
from fa4_cute.sm90_tiles import output_layout, shared_layout, tiled_mma
from fa4_cute.softcap import Cap, cap_of
from fa4_cute.views import boxes, from_position, heads_packed

DRAW_AHEAD = 1
"""Key tiles that the load warp has still to bring when the next item is drawn. One takes 1.4 us, the counter 1; an item
drawn earlier could not go to a block that is free sooner."""


class Sm90Forward:
    """One compiled kernel's host function and roles.

    counted: for tests, the kernel also writes for each row the key tiles visited and the rescales skipped.
    """

    def __init__(self, kinds: Kinds, config: Sm90Config | None = None, counted: bool = False) -> None:
        self.kinds = kinds
        self.config = config or config_for(kinds)
        if kinds.group % self.config.packed:
            raise ValueError(f"packed: got {self.config.packed} heads, a group has {kinds.group}")
        self.softmax = Softmax(kinds, self.config, counted)
        self.epilogue = Epilogue(kinds, self.config, counted)
        self.dtype = DTYPES[kinds.dtype]
        self.overlap_items = self.config.q_slots > 1
        self.item_slots = 1 if drawn(kinds) else 2
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
        mQ, mK, mV, mO = by_head(q), by_head(k), by_head(v), by_head(out)
        mLSE, seqlen_q = statistic_by_head(lse), mQ.shape[0]
        packed_q, packed_o = heads_packed(mQ, config.packed), heads_packed(mO, config.packed)
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        tile_q, tile_k = (config.tile_m, config.head_dim), (config.tile_n, config.head_dim)
        tile_v, tile_o = (config.tile_n, config.head_dim_v), (WARPGROUP_ROWS, config.store_columns)
        one = functools.partial(shared_layout, self.dtype)
        maps = Maps(
            *cpasync.make_tiled_tma_atom(load, packed_q, one(tile_q), tile_q),
            *cpasync.make_tiled_tma_atom(load, mK, one(tile_k), tile_k),
            *cpasync.make_tiled_tma_atom(load, mV, one(tile_v), tile_v),
            *cpasync.make_tiled_tma_atom(store, packed_o, output_layout(self.dtype, config), tile_o),
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
            items=Ring(barriers, self.item_slots, 1, 32 * (consumer_warps + 1)),
            q=Ring(barriers + 4, config.q_slots, 1, consumer_warps),
            k=Ring(barriers + 4 + 2 * config.q_slots, slots, 1, consumer_warps),
            v=Ring(barriers + 4 + 2 * config.q_slots + 2 * slots, slots, 1, consumer_warps),
        )
        layout_q = shared_layout(self.dtype, (config.tile_m, config.head_dim), config.q_slots)
        layout_k = shared_layout(self.dtype, (config.tile_n, config.head_dim), slots)
        layout_v = shared_layout(self.dtype, (config.tile_n, config.head_dim_v), slots)
        s_items = cute.make_tensor(memory.allocate_array(Int32, 2 * ITEM_ROOM), cute.make_layout((ITEM_ROOM, 2)))
        s_q = memory.allocate_tensor(self.dtype, layout_q.outer, 1024, layout_q.inner)
        s_k = memory.allocate_tensor(self.dtype, layout_k.outer, 1024, layout_k.inner)
        s_v = memory.allocate_tensor(self.dtype, layout_v.outer, 1024, layout_v.inner)
        if const_expr(not config.out_in_q):
            layout_o = shared_layout(self.dtype, (WARPGROUP_ROWS, config.store_columns), config.warpgroups)
            s_o = memory.allocate_tensor(self.dtype, layout_o.outer, 1024, layout_o.inner)
        else:
            rows = cute.make_layout(
                (WARPGROUP_ROWS, config.head_dim_v, config.warpgroups), stride=(1, config.tile_m, WARPGROUP_ROWS)
            )
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
                Scheduler(self.kinds, config).run(outputs, sink, shared, rings, lengths, extent, values)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self.consume(maps, outputs, sink, shared, rings, values, cap)

    @cute.jit
    def load(self, maps, shared, rings):
        """The load warp. Waits on the empty barriers of Q, K and V; TMA completes their full ones.

        Loads run ahead of the consumers by the rings' slots: Q of the next item and its first K are on their way while
        the consumers finish the last tiles of this one. An item's order: Q and K(end-1), then K(n), V(n+1) to V(begin).
        """
        config = self.config
        items, q_at, k_at, v_at = rings.items.start(), rings.q.start(), rings.k.start(), rings.v.start()
        item = read_item(shared.items, rings.items, items)
        while item.valid:
            work, sequence, span = item.work, item.sequence, item.span
            head_kv = work.head // (self.kinds.group // config.packed)
            batch = Int32(0) if const_expr(self.kinds.varlen) else work.batch
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
                rings.items.release(items)
            for i in cutlass.range(to_come, unroll=1):
                if to_come - i == DRAW_AHEAD:
                    rings.items.release(items)
                tile = span.end - 2 - i
                self._load(rings.k, k_at, maps.k, t_gk[None, tile], t_sk)
                k_at = rings.k.next(k_at)
                self._load(rings.v, v_at, maps.v, t_gv[None, tile + 1], t_sv)
                v_at = rings.v.next(v_at)
            self._load(rings.v, v_at, maps.v, t_gv[None, span.begin], t_sv)
            v_at = rings.v.next(v_at)
            items = rings.items.next(items)
            item = read_item(shared.items, rings.items, items)

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
        mma_s = tiled_mma(self.dtype, config.warpgroups, config.tile_n, rows_from_registers=False)
        mma_o = tiled_mma(self.dtype, config.warpgroups, config.head_dim_v, rows_from_registers=True)
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
        item = read_item(shared.items, rings.items, items)
        rings.items.release(items)
        items = rings.items.next(items)
        if const_expr(self.overlap_items):
            if item.valid:
                k_at = self._first_scores(state, item, q_at, k_at)
        while item.valid:
            if const_expr(not self.overlap_items):
                k_at = self._first_scores(state, item, q_at, k_at)
            span = own_span(self.kinds, self.config, state.group, item, state.values)
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
            near = self.softmax.cap(state, True)
            cut = span.end > span.full_end
            if const_expr(self.kinds.window_left):
                cut = cut or span.end <= span.full_begin
            if cut:
                self.softmax.hide(state, item, span.end - 1)
            self.softmax.weigh(state, near, True)
            self.softmax.round(state)
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

            following = read_item(shared.items, rings.items, items)
            rings.items.release(items)
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
            self.epilogue.write(state, maps, outputs, sink, shared, item, span)
            if const_expr(not self.overlap_items):
                if const_expr(config.out_in_q):
                    self._release(rings.q, q_at)
                q_at = rings.q.next(q_at)
            item = following
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _reach(self, state, item, k_at):
        """Waits for the item's first key tile, or the second where the warpgroup's rows see nothing of the first.

        Further than that would wait for what other warpgroups do in turns after this one. Returns K's cursor.
        """
        ring = state.rings.k
        ring.wait(k_at)
        if const_expr(self.kinds.uneven):
            # `consume` asks for the span again. Carried there from the seam, it saved 3 instructions of 2,400 at D=128,
            # and added 28 to 93 where items do not overlap, as there the compiler makes the two one by itself.
            own = own_span(self.kinds, self.config, state.group, item, state.values)
            if item.span.end - own.end == 1:
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
        near = self.softmax.cap(state, masked)
        if const_expr(masked):
            self.softmax.hide(state, item, tile)
        moved, factor = self.softmax.weigh(state, near, masked)
        warpgroup.wait_group(0)
        self._release(rings.v, v_at)
        self.softmax.round(state)
        self.softmax.rescale(state, moved, factor)
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
        if const_expr(not self.overlap_items and not self.config.out_in_q):
            if tile == span.begin:
                self._release(state.rings.q, q_at)

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
