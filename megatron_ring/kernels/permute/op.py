"""``permute`` and ``combine``: rows to expert order and back, without atomics. Each is the other's transpose.

Legend: T tokens, D model width, K experts per token, N = T*K sorted rows.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.route_index import RouteIndex


def permute(x_TD: Tensor, index: RouteIndex) -> Tensor:
    """``x_ND[n] = x[gather[n]]``; rows past ``offsets[-1]`` are zero. Same dtype as x.

    Example, ``index = route_index([[1, 0], [2, 1]], 2)``, whose third slot is dropped::

        x = [[1.], [2.]]  ->  [[1.], [1.], [2.], [0.]]

    Backward sums each token's K row gradients in fp32. Saved for backward: the index, nothing of x.
    """
    if torch.is_grad_enabled():
        return _Permute.apply(x_TD, index.offsets_E, index.gather_N, index.position_TK)
    return dispatch.implementation(x_TD, "permute").permute_rows(x_TD, index.gather_N, index.offsets_E)


def combine(y_ND: Tensor, index: RouteIndex, weights_TK: Tensor | None = None) -> Tensor:
    """``out[t] = sum over k of weights[t, k] * y[position[t, k]]``, in fp32, rounded once: [T, D].

    Without weights each weight is 1; dropped slots (position -1) add nothing. Example, index as in ``permute``::

        y = [[1.], [10.], [100.], [7.]], weights = [[.5, 2.], [9., .1]]  ->  [[7.], [10.]]

    Saved for backward: the index, the weights, and y only if the weights need a gradient.
    """
    if torch.is_grad_enabled():
        return _Combine.apply(y_ND, weights_TK, index.position_TK, index.offsets_E)
    return dispatch.implementation(y_ND, "permute").combine_rows(y_ND, index.position_TK, weights_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, offsets_E, gather_N, position_TK):
        ctx.save_for_backward(position_TK)
        return dispatch.implementation(x_TD, "permute").permute_rows(x_TD, gather_N, offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_ND):
        (position_TK,) = ctx.saved_tensors
        dx_TD = dispatch.implementation(dx_ND, "permute").combine_rows(dx_ND, position_TK, None)
        return dx_TD, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weights_TK, position_TK, offsets_E):
        keep_y = weights_TK is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(position_TK, offsets_E, weights_TK, y_ND if keep_y else None)
        ctx.num_rows = y_ND.shape[0]
        return dispatch.implementation(y_ND, "permute").combine_rows(y_ND, position_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD):
        position_TK, offsets_E, weights_TK, y_ND = ctx.saved_tensors
        kernels = dispatch.implementation(dout_TD, "permute")
        dy_ND, dw_TK = kernels.combine_rows_backward(
            dout_TD, position_TK, offsets_E, weights_TK, y_ND, ctx.num_rows
        )
        return dy_ND, dw_TK, None, None
