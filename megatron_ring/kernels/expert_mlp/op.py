"""``expert_mlp``: the experts' SwiGLU network over rows sorted by expert, one autograd Function.

Legend: N rows sorted by expert, D model width, F expert width, e local experts.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_ring.kernels.expert_mlp import reference
from megatron_ring.kernels.grouped_gemm.op import products, weight_gradient


def expert_mlp(
    x_ND: Tensor,
    w_up_e2FD: Tensor,
    w_down_eDF: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None = None,
    *,
    main_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``y = (silu(x Wgate^T) * (x Wup^T) * p) Wdown^T`` with each row's own expert: [N, D].

    ``w_up_e2FD`` [e, 2, F, D] stacks gate, then up, as Megatron's ``linear_fc1`` does; ``w_down_eDF`` is [e, D, F].
    ``offsets_e`` (int32) holds inclusive cumulative row counts; rows past ``offsets[-1]`` give zero and get no
    gradient. ``probs_N`` are the routing weights (any floating dtype). With ``main_grads`` (buffers shaped like the
    two weights) the weight gradients are added there and ``.grad`` of the weights is left alone.

    One expert, D = F = 1, gate weight 0 (silu(0) = 0) and then a large one (silu(x) ~ x)::

        x = [[1.]], w_up = [[[[0.]], [[3.]]]], w_down = [[[2.]]], offsets = [1]   ->  y = [[0.]]
        x = [[1.]], w_up = [[[[50.]], [[3.]]]], w_down = [[[2.]]], probs = [.5]   ->  y = [[150.]]

    Kept for the backward pass: the inputs, and the pre-activation ``z = [x Wgate^T, x Wup^T]`` [N, 2F]. Neither h
    nor y is kept: h is recomputed from z, and the gradient of p is ``<dy Wdown, silu(gate) * up>``.
    """
    return _ExpertMlp.apply(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, main_grads)


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, main_grads):
        gemm = products(x_ND)
        z_N2F = gemm.grouped_nt(x_ND, w_up_e2FD.flatten(1, 2), offsets_e)
        h_NF = reference.swiglu(z_N2F, probs_N)
        ctx.save_for_backward(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F)
        ctx.main_grads = main_grads
        return gemm.grouped_nt(h_NF, w_down_eDF, offsets_e)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F = ctx.saved_tensors
        needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]
        up_main, down_main = ctx.main_grads or (None, None)
        gemm, dy_ND = products(dy_ND), dy_ND.contiguous()
        dh_NF = gemm.grouped_nn(dy_ND, w_down_eDF, offsets_e)
        dz_N2F, h_NF, dprobs_N = reference.swiglu_backward(dh_NF, z_N2F, probs_N)
        dw_down = weight_gradient(dy_ND, h_NF, offsets_e, down_main) if needs_down else None
        dx_ND = gemm.grouped_nn(dz_N2F, w_up_e2FD.flatten(1, 2), offsets_e) if needs_x else None
        dw_up = weight_gradient(dz_N2F, x_ND, offsets_e, up_main) if needs_up else None
        dw_up = None if dw_up is None else dw_up.view_as(w_up_e2FD)
        return dx_ND, dw_up, dw_down, None, dprobs_N, None
