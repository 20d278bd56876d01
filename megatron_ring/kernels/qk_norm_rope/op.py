"""``qk_norm_rope``: queries, keys and values from the attention's fused projection, normalised and rotated.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head, H half of the rotated
channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.kernels import dispatch


class HeadNorms(NamedTuple):
    """RMSNorm of every query and key head: weights [C] and epsilon."""

    q_weight_C: Tensor
    k_weight_C: Tensor
    eps: float


def qk_norm_rope(
    mixed_TGMC: Tensor, rotary_2TH: Tensor, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(queries [T, G * R, C], keys [T, G, C], values [T, G, C])`` in mixed's dtype, contiguous.

    ``mixed_TGMC`` contains the R queries, the key and the value of every group, in the layout of Megatron's
    ``linear_qkv``. Queries and keys are normalised (if ``norms`` are given) and rounded; then their first 2 H channels
    are rotated by cos and sin ``rotary_2TH`` (fp32), channel i with i + H. Arithmetic is in fp32 (fp64 for fp64).

    Example, one head of two channels, a quarter turn: ``mixed = [[[[1., 2.], [3., 4.], [5., 6.]]]]`` and
    ``rotary = [[[0.]], [[1.]]]`` give q ``[[[-2., 1.]]]``, k ``[[[-4., 3.]]]`` and v ``[[[5., 6.]]]``.

    Saved for backward: mixed, the angles and the weights; the norms are recomputed.
    """
    q_weight_C, k_weight_C, eps = norms if norms is not None else (None, None, 0.0)
    if torch.is_grad_enabled():
        return _QkNormRope.apply(mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C, eps)
    kernels = dispatch.implementation(mixed_TGMC, "qk_norm_rope")
    return kernels.qk_norm_rope(mixed_TGMC.contiguous(), rotary_2TH, q_weight_C, k_weight_C, eps)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C, eps):
        mixed_TGMC = mixed_TGMC.contiguous()
        ctx.save_for_backward(mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C)
        ctx.eps = eps
        kernels = dispatch.implementation(mixed_TGMC, "qk_norm_rope")
        return kernels.qk_norm_rope(mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_TNC, dk_TGC, dv_TGC):
        mixed_TGMC, rotary_2TH, q_weight_C, k_weight_C = ctx.saved_tensors
        kernels = dispatch.implementation(mixed_TGMC, "qk_norm_rope")
        dmixed_TGMC, dweights_2C = kernels.qk_norm_rope_backward(
            dq_TNC.contiguous(),
            dk_TGC.contiguous(),
            dv_TGC.contiguous(),
            mixed_TGMC,
            rotary_2TH,
            q_weight_C,
            k_weight_C,
            ctx.eps,
        )
        if q_weight_C is None:
            return dmixed_TGMC, None, None, None, None
        dq_weight_C, dk_weight_C = dweights_2C.to(q_weight_C.dtype)
        return dmixed_TGMC, None, dq_weight_C, dk_weight_C, None
