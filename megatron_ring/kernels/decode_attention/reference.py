"""Attention over a cache said as maths, on any device.

Legend: T query tokens, H query heads, G key/value heads, R = H / G, C channels, S cache rows, L positions.
"""

import torch
from torch import Tensor


def decode_attention(
    q_THC: Tensor, k_SLGC: Tensor, v_SLGC: Tensor, rows_T: Tensor, lengths_T: Tensor, scale: float
) -> Tensor:
    """Scores of the longest sequence's positions for all tokens, masked beyond each one's own length."""
    if not q_THC.shape[0]:
        return torch.empty_like(q_THC)
    wide = torch.promote_types(q_THC.dtype, torch.float32)
    longest = int(lengths_T.max())
    k_TLGC, v_TLGC = (cache[rows_T, :longest].to(wide) for cache in (k_SLGC, v_SLGC))
    q_TGRC = q_THC.to(wide).unflatten(1, (k_SLGC.shape[2], -1))
    scores_TGRL = torch.matmul(q_TGRC, k_TLGC.permute(0, 2, 3, 1)) * scale
    beyond_TL = torch.arange(longest, device=q_THC.device) >= lengths_T[:, None]
    weights_TGRL = scores_TGRL.masked_fill(beyond_TL[:, None, None], -torch.inf).softmax(-1)
    context_TGRC = torch.matmul(weights_TGRL, v_TLGC.transpose(1, 2))
    return context_TGRC.flatten(1, 2).to(q_THC.dtype)
