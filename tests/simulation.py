"""What a kernel should visit and skip, by brute force in NumPy."""

import numpy as np

LOG2_E = 1.4426950408889634


def simulated_skips(q, k, tile_n, threshold):
    """Rescales skipped, (B, H, Sq): a row's key tiles, from right to left, after its first whose pivot was kept."""
    scores = np.einsum("bihd,bjhd->bhij", q.double().cpu().numpy(), k.double().cpu().numpy())
    scores *= q.shape[-1] ** -0.5 * LOG2_E
    row_max = np.full(scores.shape[:-1], -np.inf)
    skips = np.zeros(scores.shape[:-1], np.int64)
    for first in range((scores.shape[-1] - 1) // tile_n * tile_n, -1, -tile_n):
        new_max = np.maximum(row_max, scores[..., first : first + tile_n].max(-1))
        follow = new_max - row_max > threshold
        skips += np.isfinite(row_max) & ~follow
        row_max = np.where(follow, new_max, row_max)
    return skips


def visited_tiles(len_q, len_k, left, right, tile_m, tile_n):
    """Key tiles visited by each query row's tile, (Sq,): those where a row of the query tile sees a key.

    left, right: the window, -1 for unbounded.
    """
    i, j = np.arange(len_q)[:, None] + len_k - len_q, np.arange(len_k)[None]
    seen = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
    visits = np.zeros(len_q, np.int64)
    for first in range(0, len_q, tile_m):
        keys = seen[first : first + tile_m].any(0)
        visits[first : first + tile_m] = sum(keys[at : at + tile_n].any() for at in range(0, len_k, tile_n))
    return visits


def visited_by_warpgroups(len_q, len_k, left, right, config):
    """`visited_tiles` of the Hopper kernel, whose warpgroups visit what their own 64 rows see.

    One whose rows see nothing visits one tile, if another warpgroup's rows of its query tile do see a key.
    """
    own, whole = (
        visited_tiles(len_q, len_k, left, right, rows // config.packed, config.tile_n) for rows in (64, config.tile_m)
    )
    return np.where(own > 0, own, np.minimum(whole, 1))
