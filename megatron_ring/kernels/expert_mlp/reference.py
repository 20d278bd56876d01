"""The experts' SwiGLU network in plain PyTorch, differentiable by autograd, in any floating dtype."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def expert_mlp(
    x_ND: Tensor, w_up_e2FD: Tensor, w_down_eDF: Tensor, offsets_e: Tensor, probs_N: Tensor | None = None
) -> Tensor:
    """Expert i on its rows: ``y = (silu(x Wgate^T) * (x Wup^T) * p) Wdown^T``; rows of no expert are zero."""
    rows, start = [], 0
    for (w_gate_FD, w_up_FD), w_down_DF, end in zip(w_up_e2FD, w_down_eDF, offsets_e.tolist(), strict=True):
        x_nD = x_ND[start:end]
        h_nF = silu(x_nD @ w_gate_FD.t()) * (x_nD @ w_up_FD.t())
        if probs_N is not None:
            h_nF = h_nF * probs_N[start:end, None].to(h_nF.dtype)
        rows.append(h_nF @ w_down_DF.t())
        start = end
    rows.append(torch.zeros_like(x_ND[start:]))
    return torch.cat(rows)


def _wide(tensor: Tensor) -> Tensor:
    """16-bit floats as fp32; fp32 and fp64 unchanged."""
    return tensor.float() if tensor.element_size() == 2 else tensor


def swiglu(z_N2F: Tensor, probs_N: Tensor | None) -> Tensor:
    """``silu(gate) * up * p`` of ``z = [gate, up]`` along its last dimension: [N, F]; rounded once."""
    gate_NF, up_NF = _wide(z_N2F).chunk(2, dim=-1)
    h_NF = silu(gate_NF).mul_(up_NF)
    if probs_N is not None:
        h_NF.mul_(probs_N.to(h_NF.dtype)[:, None])
    return h_NF.to(z_N2F.dtype)


def swiglu_backward(
    dh_NF: Tensor, z_N2F: Tensor, probs_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient of ``h = silu(gate) * up * p``: ``(dz_N2F, h_NF, dprobs_N)``.

    ``dp = <dh, silu(gate) * up>``, ``dup = dh p silu(gate)``, ``dgate = dh p up s (1 + gate (1 - s))`` with
    ``s = sigmoid(gate)``. h is recomputed here because the weight gradient of the down projection needs it.
    """
    (gate_NF, up_NF), dh_NF = _wide(z_N2F).chunk(2, dim=-1), _wide(dh_NF)
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    h_NF = silu_NF * up_NF
    dprobs_N = None
    if probs_N is not None:
        dprobs_N = (dh_NF * h_NF).sum(-1).to(probs_N.dtype)
        p_N1 = probs_N.to(h_NF.dtype)[:, None]
        h_NF.mul_(p_N1)
        dh_NF = dh_NF * p_N1
    dz_N2F = gate_NF.new_empty(z_N2F.shape)
    dgate_NF, dup_NF = dz_N2F.chunk(2, dim=-1)
    torch.mul(dh_NF, silu_NF, out=dup_NF)
    # s (1 + g (1 - s)) = s + silu (1 - s)
    dsilu_NF = torch.addcmul(sigmoid_NF, silu_NF, 1 - sigmoid_NF)
    torch.mul(dsilu_NF.mul_(up_NF), dh_NF, out=dgate_NF)
    return dz_N2F.to(z_N2F.dtype), h_NF.to(z_N2F.dtype), dprobs_N
