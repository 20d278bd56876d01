"""Grouped GEMM in plain PyTorch: a loop over the experts, in any floating dtype, on any device.

Legend: N rows sorted by expert, D input width, F output width, e local experts. ``offsets_e`` holds inclusive
cumulative row counts: expert i owns rows ``[offsets[i-1], offsets[i])``; rows past ``offsets[-1]`` belong to
none.
"""

import torch
from torch import Tensor


def grouped_nt(x_ND: Tensor, w_eFD: Tensor, offsets_e: Tensor) -> Tensor:
    """``y[n] = w[expert of n] @ x[n]``: [N, F]; rows of no expert are zero."""
    y_NF = x_ND.new_zeros(x_ND.shape[0], w_eFD.shape[1])
    start = 0
    for w_FD, end in zip(w_eFD, offsets_e.tolist(), strict=True):
        y_NF[start:end] = x_ND[start:end] @ w_FD.t()
        start = end
    return y_NF


def grouped_nn(dy_NF: Tensor, w_eFD: Tensor, offsets_e: Tensor) -> Tensor:
    """``dx[n] = dy[n] @ w[expert of n]``: [N, D]; rows of no expert are zero."""
    return grouped_nt(dy_NF, w_eFD.transpose(1, 2), offsets_e)


def grouped_tn(dy_NF: Tensor, x_ND: Tensor, offsets_e: Tensor) -> Tensor:
    """``dw[i] = sum over rows n of expert i of outer(dy[n], x[n])``: [e, F, D]; zero for an empty expert."""
    dw_eFD = x_ND.new_zeros(offsets_e.shape[0], dy_NF.shape[1], x_ND.shape[1])
    start = 0
    for dw_FD, end in zip(dw_eFD, offsets_e.tolist(), strict=True):
        torch.mm(dy_NF[start:end].t(), x_ND[start:end], out=dw_FD)
        start = end
    return dw_eFD
