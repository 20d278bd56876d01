"""``grouped_gemm``: one matrix product per expert over rows sorted by expert, with gradients.

Legend: N rows sorted by expert, D input width, F output width, e local experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.grouped_gemm import cpu


def grouped_gemm(
    x_ND: Tensor, w_eFD: Tensor, offsets_e: Tensor, *, main_grad_eFD: Tensor | None = None
) -> Tensor:
    """``y[n] = w[expert of n] @ x[n]``, accumulated in fp32 (fp64 for fp64 inputs).

    ``offsets_e`` (int32) are inclusive cumulative row counts: expert i has rows ``[offsets[i-1], offsets[i])``.
    Rows past ``offsets[-1]`` belong to no expert: their output and gradient are zero, and they do not contribute to
    weight gradients. An empty expert's weight gradient is zero. With ``main_grad_eFD`` (fp32, or the weight's dtype)
    the backward pass adds the weight gradient into that buffer and does not set ``w_eFD.grad``.

    Two experts, three rows, D = F = 1, weights 2 and 10; the third row is dropped::

        x = [[1.], [3.], [7.]], w = [[[2.]], [[10.]]], offsets = [1, 2]  ->  y = [[2.], [30.], [0.]]

    Saved for backward: x, w and offsets only.
    """
    return _GroupedGemm.apply(x_ND, w_eFD, offsets_e, main_grad_eFD)


def kernels_for(x_ND: Tensor, w_eFD: Tensor) -> Any:
    """The module with the three products for these operands: see ``dispatch`` and ``kernel.taken``."""
    if dispatch.backend(x_ND) == "triton":
        from megatron_ring.kernels.grouped_gemm import kernel

        if kernel.taken(x_ND, w_eFD.transpose(1, 2), w_eFD):
            return kernel
    return cpu


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_eFD, offsets_e, main_grad_eFD):
        ctx.save_for_backward(x_ND, w_eFD, offsets_e)
        ctx.main_grad_eFD = main_grad_eFD
        return kernels_for(x_ND, w_eFD).grouped_nt(x_ND, w_eFD, offsets_e)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NF):
        x_ND, w_eFD, offsets_e = ctx.saved_tensors
        dy_NF, kernels, main = dy_NF.contiguous(), kernels_for(x_ND, w_eFD), ctx.main_grad_eFD
        dx_ND = kernels.grouped_nn(dy_NF, w_eFD, offsets_e) if ctx.needs_input_grad[0] else None
        dw_eFD = kernels.grouped_tn(dy_NF, x_ND, offsets_e, main) if ctx.needs_input_grad[1] else None
        return dx_ND, dw_eFD if main is None else None, None, None
