"""Head norms and rotary positions in plain PyTorch, with their backward, on any device.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head, H half of the rotated
channels.
"""

import torch
from torch import Tensor

from megatron_ring.kernels.rms_norm.reference import rms_norm, rms_norm_backward


def qk_norm_rope(
    mixed_TGMC: Tensor, rotary_2TH: Tensor, q_weight_C: Tensor | None, k_weight_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(q_TNC, k_TGC, v_TGC)``; see ``op.qk_norm_rope``."""
    q_TGRC, k_TG1C, v_TG1C = _parts(mixed_TGMC)
    q_TGRC = rotate(_norm(q_TGRC, q_weight_C, eps), rotary_2TH)
    k_TG1C = rotate(_norm(k_TG1C, k_weight_C, eps), rotary_2TH)
    return q_TGRC.flatten(1, 2), k_TG1C.squeeze(2), v_TG1C.squeeze(2).contiguous()


def qk_norm_rope_backward(
    dq_TNC: Tensor,
    dk_TGC: Tensor,
    dv_TGC: Tensor,
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(dmixed_TGMC, dweights_2C)``, the weights' gradients in fp32 (fp64), zeros without norms.

    The gradient of a rotation is the rotation by the negative angles.
    """
    q_TGRC, k_TG1C, _ = _parts(mixed_TGMC)
    back_2TH = torch.stack((rotary_2TH[0], -rotary_2TH[1]))
    dq_TGRC, dq_weight = _norm_backward(rotate(dq_TNC.view(q_TGRC.shape), back_2TH), q_TGRC, q_weight_C, eps)
    dk_TG1C, dk_weight = _norm_backward(rotate(dk_TGC.unsqueeze(2), back_2TH), k_TG1C, k_weight_C, eps)
    dmixed_TGMC = torch.cat((dq_TGRC, dk_TG1C, dv_TGC.unsqueeze(2)), dim=2)
    return dmixed_TGMC, torch.stack((dq_weight, dk_weight))


def rotate(x_TGRC: Tensor, rotary_2TH: Tensor) -> Tensor:
    """Rotate the first 2 H channels of every head by its position's angles; the others are unchanged (partial rotary)."""
    cos, sin = rotary_2TH[:, :, None, None]
    half = rotary_2TH.shape[-1]
    wide = torch.promote_types(x_TGRC.dtype, torch.float32)
    first, second = x_TGRC[..., :half].to(wide), x_TGRC[..., half : 2 * half].to(wide)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_TGRC.dtype)
    return torch.cat((turned, x_TGRC[..., 2 * half :]), -1)


def _parts(mixed_TGMC: Tensor) -> tuple[Tensor, ...]:
    return mixed_TGMC.split((mixed_TGMC.shape[2] - 2, 1, 1), dim=2)


def _norm(x_TGRC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    if weight_C is None:
        return x_TGRC
    return rms_norm(x_TGRC.reshape(-1, x_TGRC.shape[-1]), weight_C, eps)[0].view(x_TGRC.shape)


def _norm_backward(
    dy_TGRC: Tensor, x_TGRC: Tensor, weight_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_TGRC.dtype, torch.float32)
    if weight_C is None:
        return dy_TGRC, x_TGRC.new_zeros(x_TGRC.shape[-1], dtype=wide)
    x, dy, weight = (each.reshape(-1, x_TGRC.shape[-1]).to(wide) for each in (x_TGRC, dy_TGRC, weight_C))
    dx, dweight_C = rms_norm_backward(dy, x, weight.squeeze(0), torch.rsqrt(x.square().mean(-1) + eps))
    return dx.to(x_TGRC.dtype).view(x_TGRC.shape), dweight_C
