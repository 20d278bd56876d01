"""One decoding step's attention in plain PyTorch, on any device.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head, S cache rows, L
positions, H half of the rotated channels.
"""

import torch
from torch import Tensor

from megatron_ring.kernels.qk_norm_rope.reference import qk_norm_rope


def decode_attention(
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    keys_SLGC: Tensor,
    values_SLGC: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    scale: float,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    eps: float,
) -> Tensor:
    """Scores are computed up to the longest sequence's position for all tokens, then masked after each token's own."""
    q_THC, keys_TGC, values_TGC = qk_norm_rope(mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C, eps)
    keys_SLGC[rows_T, positions_T] = keys_TGC
    values_SLGC[rows_T, positions_T] = values_TGC
    q_TGRC = q_THC.unflatten(1, (mixed_TGMC.shape[1], -1))
    if not q_TGRC.shape[0]:
        return q_THC
    wide = torch.promote_types(q_TGRC.dtype, torch.float32)
    longest = int(positions_T.max()) + 1
    k_TLGC, v_TLGC = (cache[rows_T, :longest].to(wide) for cache in (keys_SLGC, values_SLGC))
    scores_TGRL = torch.matmul(q_TGRC.to(wide), k_TLGC.permute(0, 2, 3, 1)) * scale
    beyond_TL = torch.arange(longest, device=q_TGRC.device) > positions_T[:, None]
    weights_TGRL = scores_TGRL.masked_fill(beyond_TL[:, None, None], -torch.inf).softmax(-1)
    context_TGRC = torch.matmul(weights_TGRL, v_TLGC.transpose(1, 2))
    return context_TGRC.flatten(1, 2).to(q_TGRC.dtype)
