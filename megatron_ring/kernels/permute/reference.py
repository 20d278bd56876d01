"""Permute and combine in plain PyTorch, with their backwards, in any floating dtype, on any device.

Legend: T tokens, D model width, K experts per token, N = T*K sorted rows. ``position_TK`` is each slot's
sorted row, -1 if dropped. Sums are in fp32 (fp64 for fp64 rows) and rounded once.
"""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 2 else tensor


def permute_rows(x_TD: Tensor, gather_N: Tensor, offsets_E: Tensor) -> Tensor:
    """``x[gather[n]]`` for rows below ``offsets[-1]``, else zero: [N, D]."""
    if not x_TD.shape[0]:
        return x_TD.new_zeros(gather_N.shape[0], x_TD.shape[1])
    dropped_N = torch.arange(gather_N.shape[0], device=x_TD.device) >= offsets_E[-1]
    return x_TD.index_select(0, gather_N).masked_fill_(dropped_N[:, None], 0)


def combine_rows(y_ND: Tensor, position_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """``out[t] = sum over k of w[t, k] * y[position[t, k]]``: [T, D]; dropped slots add nothing."""
    wide = _wide(y_ND[:0]).dtype
    out_TD = torch.zeros(position_TK.shape[0], y_ND.shape[1], dtype=wide, device=y_ND.device)
    if not y_ND.shape[0]:
        return out_TD.to(y_ND.dtype)
    for k in range(position_TK.shape[1]):
        position_T = position_TK[:, k]
        row_TD = y_ND.index_select(0, position_T.clamp(min=0)).to(wide)
        if weights_TK is not None:
            row_TD = row_TD * weights_TK[:, k, None].to(wide)
        out_TD += row_TD.masked_fill(position_T[:, None] < 0, 0)
    return out_TD.to(y_ND.dtype)


def combine_rows_backward(
    dout_TD: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    y_ND: Tensor | None,
    num_rows: int,
) -> tuple[Tensor, Tensor | None]:
    """With n = position[t, k]: ``dy[n] = w[t, k] dout[t]`` [N, D]; given y, ``dw[t, k] = <dout[t], y[n]>``.

    Rows of dy past ``offsets[-1]`` are zero.
    """
    dout = _wide(dout_TD)
    dy_ND = dout_TD.new_zeros(num_rows, dout_TD.shape[1])
    dw_TK = None if y_ND is None or weights_TK is None else torch.zeros_like(weights_TK)
    for k in range(position_TK.shape[1]):
        tokens = (position_TK[:, k] >= 0).nonzero().squeeze(1)
        rows = position_TK[tokens, k]
        kept_nD = dout.index_select(0, tokens)
        if y_ND is not None and dw_TK is not None:
            dw_TK[tokens, k] = (kept_nD * y_ND.index_select(0, rows).to(dout.dtype)).sum(-1).to(dw_TK.dtype)
        if weights_TK is not None:
            kept_nD = kept_nD * weights_TK[tokens, k, None].to(dout.dtype)
        dy_ND.index_copy_(0, rows, kept_nD.to(dy_ND.dtype))
    return dy_ND, dw_TK
