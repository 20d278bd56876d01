"""RMSNorm in plain PyTorch, with its backward, in any floating dtype, on any device.

Legend: T rows, D width. Arithmetic is in fp32 (fp64 for fp64 rows), and results are rounded once.
"""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 2 else tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = x r weight`` with ``r = 1 / sqrt(mean(x^2) + eps)``: ``(y_TD, r_T)``."""
    x = _wide(x_TD)
    r_T = torch.rsqrt(x.square().mean(-1) + eps)
    return (x * r_T[:, None] * weight_D.to(x.dtype)).to(x_TD.dtype), r_T


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, r_T: Tensor) -> tuple[Tensor, Tensor]:
    """With ``u = dy weight``: ``dx = r (u - x r^2 mean(u x))`` and ``dweight = sum over rows of dy x r``."""
    x, dy = _wide(x_TD), _wide(dy_TD)
    r_T1 = r_T[:, None]
    u = dy * weight_D.to(x.dtype)
    dx = r_T1 * (u - x * r_T1.square() * (u * x).mean(-1, keepdim=True))
    return dx.to(x_TD.dtype), (dy * x * r_T1).sum(0).to(weight_D.dtype)
