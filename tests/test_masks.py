"""Probes at the edges of masks: one key gets a logit 10 above all others, just inside an edge or just outside it.

Random inputs hide a mask that is off by one on a long row, since one key more changes it by its share only.
"""

import math

import pytest
import torch
from oracle import oracle

from fa4_core.checks import check_backward, check_forward

D = 64
LENGTHS = {"square": (130, 130), "more keys": (67, 200), "more queries": (200, 67)}
MASKS = {
    "causal": {"causal": True},
    # 65: the first row of a tile sees just the last key of one, so that a range one tile too short shows.
    "left": {"window": (65, None)},
    "right": {"window": (None, 65)},
    "both": {"window": (64, 17)},
    "causal window": {"causal": True, "window": (64, 5)},
    "diagonal": {"window": (0, 0)},
}


def edges(len_q, len_k, causal=False, window=(None, None)):
    """(row, key, visible): of rows at tile edges, the last visible and the first hidden key at each side."""
    left = math.inf if window[0] is None else window[0]
    right = 0 if causal else math.inf if window[1] is None else window[1]
    for row in sorted({0, 1, 15, 16, 31, 32, 63, 64, 65, 127, 128, len_q // 2, len_q - 1} & set(range(len_q))):
        diagonal = row + len_k - len_q
        for key, inside in ((diagonal - left, True), (diagonal - left - 1, False), (diagonal + right, True),
                            (diagonal + right + 1, False), (len_k - 1, diagonal + right >= len_k - 1)):  # fmt: skip
            if 0 <= key < len_k and diagonal - left <= len_k - 1:
                yield row, int(key), inside and diagonal - left <= key <= diagonal + right


def probes(device, len_q, len_k, probed, dtype=torch.float16):
    """q, k, v with one batch element a probe (row, key): that row's logit at that key is 10, all others near 0."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(len(probed), len_q, 1, D, generator=random)
    q = q / q.norm(dim=-1, keepdim=True)
    k = torch.zeros(len(probed), len_k, 1, D)
    for i, (row, key) in enumerate(probed):
        k[i, key] = q[i, row] * 10.0 * math.sqrt(D)
    v = torch.randn(len(probed), len_k, 1, D, generator=random)
    return (t.to(dtype).to(device) for t in (q, k, v))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_keys_at_the_edges_of_windows_count_exactly_when_visible(target, lengths, mask):
    """Catches `<` for `<=`, a window aligned top-left, and a tile skipped or left unmasked at its border."""
    probed = list(edges(*lengths, **mask))
    if target.interpreted:
        probed = probed[:: max(1, len(probed) // 12)]
    q, k, v = probes(target.device, *lengths, [(row, key) for row, key, _ in probed])
    out = target(q, k, v, **mask)
    for i, (row, key, visible) in enumerate(probed):
        # e^10 against at most 200 others: the probed key holds over 99 % of a row that sees it, and nothing of others.
        takes_all = (out[i, row] - v[i, key]).abs().max() < 0.1
        assert takes_all == visible, f"row {row} of {lengths}, key {key}: {'hidden' if visible else 'visible'}"
    check_forward(target, q, k, v, **mask).require()


@pytest.mark.parametrize("mask", ["causal", "left", "right"])
@pytest.mark.parametrize("lengths", ["square", "more keys"])
def test_gradients_at_the_edges_of_windows(target, mask, lengths):
    """The backward walks the mask along the columns, with edges of its own."""
    mask, (len_q, len_k) = MASKS[mask], LENGTHS[lengths]
    probed = list(edges(len_q, len_k, **mask))
    probed = probed[:: max(1, len(probed) // 6)]
    q, k, v = probes(target.device, len_q, len_k, [(row, key) for row, key, _ in probed])
    dout = torch.ones_like(q)
    check_backward(target, q, k, v, dout=dout, **mask).require()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["seqused", "varlen"])
def test_the_end_of_a_sequence_is_an_edge(target, layout, causal):
    """The last key within a length counts; the first past it, with a logit 10 above, does not: nor its value."""
    for used in (1, 16, 63, 64, 65):
        q, k, v = probes(target.device, 4, 80, [(3, used - 1), (3, used)])
        if layout == "seqused":
            options = {"seqused_k": torch.full((2,), used, dtype=torch.int32, device=target.device)}
            out = target(q, k, v, causal=causal, **options)
        else:
            # Sequence 0 ends at the edge, where sequence 1 begins.
            cu_q = torch.tensor([0, 4, 4], dtype=torch.int32, device=target.device)
            cu_k = torch.tensor([0, used, 80], dtype=torch.int32, device=target.device)
            out = torch.stack(
                [target(q[i], k[i], v[i], causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k) for i in (0, 1)]
            )
        assert (out[0, 3] - v[0, used - 1]).abs().max() < 0.1
        want, _ = oracle(q[1:, :].cpu(), k[1:, :used].cpu(), v[1:, :used].cpu(), causal=causal)
        torch.testing.assert_close(out[1:].double().cpu(), want, atol=2e-3, rtol=2e-3)


def test_causal_caps_a_window_on_the_right(target):
    """causal=True with window (left, 5) equals (left, 0), bit for bit."""
    q, k, v = (torch.randn(1, 70, 1, D, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    q, k, v = (t.to(target.device) for t in (q, k, v))
    capped = target(q, k, v, causal=True, window=(20, 5))
    assert torch.equal(capped, target(q, k, v, window=(20, 0)))


@pytest.mark.parametrize("window", [(-1, -1), (None, -1), (-1, None), (10**6, 10**6)])
def test_open_and_huge_windows_equal_no_window(target, window):
    q, k, v = (torch.randn(1, 70, 1, D, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    q, k, v = (t.to(target.device) for t in (q, k, v))
    torch.testing.assert_close(target(q, k, v, window=window), target(q, k, v), atol=1e-3, rtol=1e-3)
