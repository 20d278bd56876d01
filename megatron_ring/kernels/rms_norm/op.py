"""``rms_norm``: RMSNorm over the last dimension.

Legend: T rows, D width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.kernels import dispatch


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in fp32, rounded once to x's dtype.

    x may have any leading dimensions. Example::

        x = [3., 4.], weight = [1., 2.], eps = 0  ->  [.8485, 2.2627]

    Saved for backward: x, the weight, and one number per row.
    """
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight_D, eps)
    x_TD = x.reshape(-1, x.shape[-1]).contiguous()
    return dispatch.implementation(x, "rms_norm").rms_norm(x_TD, weight_D, eps)[0].view(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        y_TD, r_T = dispatch.implementation(x, "rms_norm").rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, r_T)
        return y_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_TD, weight_D, r_T = ctx.saved_tensors
        kernels = dispatch.implementation(x_TD, "rms_norm")
        dx_TD, dweight_D = kernels.rms_norm_backward(dy.reshape(x_TD.shape).contiguous(), x_TD, weight_D, r_T)
        return dx_TD.view(dy.shape), dweight_D, None
