"""The experts' SwiGLU network on the CPU: the extension (one expert per thread), or torch's grouped products.

Legend: N rows sorted by expert, D model width, F expert width, e local experts.
"""

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.expert_mlp import reference
from megatron_ring.kernels.grouped_gemm.cpu import grouped_nn, grouped_nt, grouped_tn


def _native(tensor: Tensor) -> bool:
    return dispatch.backend(tensor) == "native" and hasattr(torch.ops.megatron_ring, "expert_mlp_forward")


def forward(
    x_ND: Tensor,
    w_up_e2FD: Tensor,
    w_down_eDF: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(y_ND, z_N2F)``; z is None unless ``keep_z``."""
    if _native(x_ND):
        return torch.ops.megatron_ring.expert_mlp_forward(
            x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, keep_z
        )
    z_N2F = grouped_nt(x_ND, w_up_e2FD.flatten(1, 2), offsets_e)
    h_NF = reference.swiglu(z_N2F, probs_N)
    return grouped_nt(h_NF, w_down_eDF, offsets_e), z_N2F if keep_z else None


def backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    w_up_e2FD: Tensor,
    w_down_eDF: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None,
    z_N2F: Tensor,
    needs: tuple[bool, bool, bool],
    main_grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dw_up, dw_down, dprobs)``; None for a gradient that is not needed or was added into its main_grad."""
    needs_x, needs_up, needs_down = needs
    up_main, down_main = main_grads
    if _native(x_ND):
        dx_ND, dw_up, dw_down, dprobs_N = torch.ops.megatron_ring.expert_mlp_backward(
            dy_ND, x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F, *needs, up_main, down_main
        )
    else:
        dh_NF = grouped_nn(dy_ND, w_down_eDF, offsets_e)
        dz_N2F, h_NF, dprobs_N = reference.swiglu_backward(dh_NF, z_N2F, probs_N)
        dx_ND = grouped_nn(dz_N2F, w_up_e2FD.flatten(1, 2), offsets_e) if needs_x else None
        up_main = None if up_main is None else up_main.flatten(1, 2)
        dw_up = grouped_tn(dz_N2F, x_ND, offsets_e, up_main) if needs_up else None
        dw_down = grouped_tn(dy_ND, h_NF, offsets_e, down_main) if needs_down else None
    return (
        dx_ND if needs_x else None,
        dw_up.view(w_up_e2FD.shape) if needs_up and up_main is None and dw_up is not None else None,
        dw_down if needs_down and down_main is None else None,
        None if probs_N is None or dprobs_N is None else dprobs_N.to(probs_N.dtype),
    )
