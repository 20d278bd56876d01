"""One decoding step's attention said as maths, on any device.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head, S cache rows, L
positions, H half of the rotated channels.
"""

import torch
from torch import Tensor

from megatron_ring.kernels.rms_norm.reference import rms_norm


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
    """Scores of the longest sequence's positions for all tokens, masked beyond each one's own."""
    q_TGRC = append(
        mixed_TGMC, rotary_2TH, keys_SLGC, values_SLGC, rows_T, positions_T, q_weight_C, k_weight_C, eps
    )
    if not q_TGRC.shape[0]:
        return q_TGRC.flatten(1, 2)
    wide = torch.promote_types(q_TGRC.dtype, torch.float32)
    longest = int(positions_T.max()) + 1
    k_TLGC, v_TLGC = (cache[rows_T, :longest].to(wide) for cache in (keys_SLGC, values_SLGC))
    scores_TGRL = torch.matmul(q_TGRC.to(wide), k_TLGC.permute(0, 2, 3, 1)) * scale
    beyond_TL = torch.arange(longest, device=q_TGRC.device) > positions_T[:, None]
    weights_TGRL = scores_TGRL.masked_fill(beyond_TL[:, None, None], -torch.inf).softmax(-1)
    context_TGRC = torch.matmul(weights_TGRL, v_TLGC.transpose(1, 2))
    return context_TGRC.flatten(1, 2).to(q_TGRC.dtype)


def append(
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    keys_SLGC: Tensor,
    values_SLGC: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    eps: float,
) -> Tensor:
    """Keep the keys and values; the queries, normed and rotated: [T, G, R, C]."""
    q_TGRC, k_TG1C, v_TG1C = mixed_TGMC.split((mixed_TGMC.shape[2] - 2, 1, 1), dim=2)
    keys_SLGC[rows_T, positions_T] = _rotate(_norm(k_TG1C, k_weight_C, eps), rotary_2TH).squeeze(2)
    values_SLGC[rows_T, positions_T] = v_TG1C.squeeze(2)
    return _rotate(_norm(q_TGRC, q_weight_C, eps), rotary_2TH)


def _norm(x_TGRC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    if weight_C is None:
        return x_TGRC
    return rms_norm(x_TGRC.reshape(-1, x_TGRC.shape[-1]), weight_C, eps)[0].view(x_TGRC.shape)


def _rotate(x_TGRC: Tensor, rotary_2TH: Tensor) -> Tensor:
    cos, sin = rotary_2TH[:, :, None, None]
    half = rotary_2TH.shape[-1]
    wide = torch.promote_types(x_TGRC.dtype, torch.float32)
    first, second = x_TGRC[..., :half].to(wide), x_TGRC[..., half : 2 * half].to(wide)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_TGRC.dtype)
    return torch.cat((turned, x_TGRC[..., 2 * half :]), -1)
