"""The forward's walk over the keys on Hopper, specialised by warps: one warpgroup loads K and V, two others compute.

Triton makes the three of it (`tl.range(..., warp_specialize=True)`) and gives 64 of the 128 query rows to each of those
that compute, so that one's softmax runs beside the other's products. It wants one loop over the keys, K and V behind
descriptors, and no branch over a tensor. So the loop visits the tiles at the edges and the inner ones alike, and the
branch around the mask is written in assembly: a jump, in the inner tiles. `visit` gives the same bits.
"""

import triton
import triton.language as tl

from fa4_triton.steps import fold, log2_scores

HELD = 64
"""How many scores a thread holds: 64 rows and 128 keys in a warpgroup."""


def _hide_assembly(n: int, step: str) -> str:
    """PTX that makes -inf of each of n scores for which `step` sets predicate p; a jump where operand 1 is 0.

    step names a score's other operands by number: 0 its column, 2 and on what the column is compared with.
    """
    operands = [[f"${(2 + j) * n + i}" for j in range(4)] for i in range(n)]
    steps = [f"{step.format(*operands[i])} @p mov.b32 ${i}, 0xff800000;" for i in range(n)]
    return f"{{ .reg .pred p; setp.eq.s32 p, ${3 * n}, 0; @p bra.uni DONE; {' '.join(steps)} DONE: }}"


def _constraints(n: int, integers: int) -> str:
    """n float32 results in the registers of n arguments, and n of each further, integer operand."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * (integers * n))


_PACK = tl.constexpr(HELD)
_AFTER = tl.constexpr(_hide_assembly(HELD, "setp.gt.s32 p, {0}, {2};"))
_AFTER_OPERANDS = tl.constexpr(_constraints(HELD, 3))
_OUTSIDE = tl.constexpr(_hide_assembly(HELD, "setp.lt.s32 p, {0}, {3}; setp.gt.or.s32 p, {0}, {2}, p;"))
_OUTSIDE_OPERANDS = tl.constexpr(_constraints(HELD, 4))
# Of the barriers that Triton 3.6 and 3.7 initialise, those that nothing uses lie where K or V come to lie: at the start
# of shared memory, one for each of two stages. An mbarrier must be invalidated before its memory serves for something
# else, as Triton does from 3.8 on; without it an H100 found NaN in the tile (docs/performance.md).
_INVALIDATE = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
    " @p mbarrier.inval.shared::cta.b64 [global_smem]; @p mbarrier.inval.shared::cta.b64 [global_smem+8];"
    " @p fence.proxy.async.shared::cta; mov.b32 $0, $1; }"
)


@triton.jit
def hide(values, scores, row, first, shift, len_k, edge, TILE_N: tl.constexpr):
    """Scores of keys that `visible` hides become -inf, where `edge` is not 0; `first` is the tile's first key.

    shift = len_k - len_q.
    """
    column = tl.arange(0, TILE_N)[None, :]
    last_key = tl.zeros_like(row) + (len_k - 1)
    if values.right is not None:
        last_key = tl.minimum(last_key, row + (shift + values.right))
    last_column = (last_key - first)[:, None]
    if values.left is None:
        scores = tl.inline_asm_elementwise(
            _AFTER, _AFTER_OPERANDS, [scores, column, edge, last_column], tl.float32, True, _PACK
        )
    else:
        first_column = (row + (shift - values.left) - first)[:, None]
        scores = tl.inline_asm_elementwise(
            _OUTSIDE, _OUTSIDE_OPERANDS, [scores, column, edge, last_column, first_column], tl.float32, True, _PACK
        )
    return scores


@triton.jit
def visit_specialised(
    q_tile, k, v, span_q, span_k, head_kv, state, row, values, begin, inner_begin, inner_end, end, TILE_N: tl.constexpr
):
    """Folds the key tiles begin to end, the last one first, into the state (acc, row_max, row_sum, skips).

    k, v: behind descriptors of (batch, heads, rows, head_dim), which read zeros past the last row. The tiles outside
    inner_begin to inner_end need a mask.
    """
    D: tl.constexpr = q_tile.shape[1]
    DV: tl.constexpr = state[0].shape[1]
    shift = span_k.length - span_q.length
    bits = q_tile.to(tl.int16, bitcast=True)
    # Only the loads use this head, so only the warpgroup that loads runs the assembly, before its first load.
    head_loaded = tl.inline_asm_elementwise(_INVALIDATE, "=r,r", [head_kv], tl.int32, False, 1)
    for i in tl.range(begin, end, warp_specialize=True):
        tile = end - 1 - (i - begin)
        first = tile * TILE_N
        k_tile = k.descriptor.load([span_k.batch, head_loaded, first, 0]).reshape([TILE_N, D])
        products = tl.dot(bits.to(q_tile.dtype, bitcast=True), k_tile.T)
        # Q stays in registers: as integers that every product is said to change, it cannot move to shared memory.
        bits = tl.inline_asm_elementwise("", "=r,0,f,f", [bits, products], tl.int16, True, 2)
        scores, factor = log2_scores(values, products)
        edge = ((tile < inner_begin) | (tile >= inner_end)).to(tl.int32)
        scores = hide(values, scores, row, first, shift, span_k.length, edge, TILE_N)
        p, state = fold(scores, factor, state, values.threshold)
        v_tile = v.descriptor.load([span_k.batch, head_loaded, first, 0]).reshape([TILE_N, DV])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, state[0])
        state = (acc, state[1], state[2], state[3])
    return state
