"""Grouped GEMM without Triton: ``F.grouped_mm`` if it supports the operands, else the reference's loop.

``F.grouped_mm`` is a C++ loop over ``mm``, without Python overhead per expert. It refuses fp64 and leading dimensions
that are not a multiple of 16 bytes, and does not write rows past the last offset; both are handled here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.kernels.grouped_gemm import reference

_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _taken_by_grouped_mm(*tensors: Tensor) -> bool:
    """True if torch's CPU kernel supports every operand: dtype, rows of 16 bytes, not empty, not expanded."""
    return all(
        t.device.type == "cpu"
        and t.dtype in _GROUPED_MM_DTYPES
        and t.numel() > 0
        and t.stride(-1) == 1
        and t.stride(-2) * t.element_size() % 16 == 0
        and t.stride(-2) >= t.shape[-1]
        for t in tensors
    )


def grouped_nt(x_ND: Tensor, w_eFD: Tensor, offsets_e: Tensor) -> Tensor:
    """``y[n] = w[expert of n] @ x[n]``; see the reference."""
    return grouped_nn(x_ND, w_eFD.transpose(1, 2), offsets_e, _storage_eFD=w_eFD)


def grouped_nn(dy_NF: Tensor, w_eFD: Tensor, offsets_e: Tensor, _storage_eFD: Tensor | None = None) -> Tensor:
    """``dx[n] = dy[n] @ w[expert of n]``; see the reference."""
    rows = int(offsets_e[-1])
    if not rows or not _taken_by_grouped_mm(dy_NF, w_eFD if _storage_eFD is None else _storage_eFD):
        return reference.grouped_nn(dy_NF, w_eFD, offsets_e)
    out_ND = F.grouped_mm(dy_NF, w_eFD, offs=offsets_e)
    out_ND[rows:].zero_()
    return out_ND


def grouped_tn(dy_NF: Tensor, x_ND: Tensor, offsets_e: Tensor, main_grad_eFD: Tensor | None = None) -> Tensor:
    """``dw[i] = sum of outer(dy[n], x[n])`` over expert i's rows; added into ``main_grad_eFD`` if given."""
    if int(offsets_e[-1]) and _taken_by_grouped_mm(dy_NF, x_ND):
        dw_eFD = F.grouped_mm(dy_NF.t(), x_ND, offs=offsets_e)
    else:
        dw_eFD = reference.grouped_tn(dy_NF, x_ND, offsets_e)
    return dw_eFD if main_grad_eFD is None else main_grad_eFD.add_(dw_eFD)
