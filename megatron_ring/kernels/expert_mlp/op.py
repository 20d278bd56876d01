"""``expert_mlp``: the experts' SwiGLU network over rows sorted by expert, one autograd Function.

Legend: N rows sorted by expert, D model width, F expert width, e local experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.expert_mlp import cpu


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

    ``w_up_e2FD`` [e, 2, F, D] stacks gate, then up, like Megatron's ``linear_fc1``; ``w_down_eDF`` is [e, D, F].
    ``offsets_e`` (int32) are inclusive cumulative row counts; rows past ``offsets[-1]`` give zero and get no gradient.
    ``probs_N`` are the routing weights (any floating dtype). With ``main_grads`` (buffers shaped like the two weights)
    the weight gradients are added there and ``.grad`` of the weights is not set; for Megatron's parameters it is set to
    an uninitialised tensor, and ``grad_added_to_main_grad`` to True.

    One expert, D = F = 1, gate weight 0 (silu(0) = 0) and then a large one (silu(x) ~ x)::

        x = [[1.]], w_up = [[[[0.]], [[3.]]]], w_down = [[[2.]]], offsets = [1]   ->  y = [[0.]]
        x = [[1.]], w_up = [[[[50.]], [[3.]]]], w_down = [[[2.]]], probs = [.5]   ->  y = [[150.]]

    Saved for backward, if there is one: the inputs and the pre-activation ``z = [x Wgate^T, x Wup^T]`` [N, 2F].
    Neither h nor y is saved: h is recomputed from z, and the gradient of p is ``<dy Wdown, silu(gate) * up>``.
    """
    if not torch.is_grad_enabled():
        kernels = kernels_for(x_ND, w_down_eDF)
        return kernels.forward(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, False)[0]
    differentiable = (x_ND, w_up_e2FD, w_down_eDF, *(() if probs_N is None else (probs_N,)))
    keep_z = any(t.requires_grad for t in differentiable)
    return _ExpertMlp.apply(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, main_grads, keep_z)


def kernels_for(x_ND: Tensor, w_down_eDF: Tensor) -> Any:
    """The module with forward and backward for these operands: see ``dispatch`` and ``taken``."""
    if dispatch.backend(x_ND) == "triton":
        from megatron_ring.kernels.expert_mlp import kernel
        from megatron_ring.kernels.grouped_gemm.kernel import taken

        if taken(x_ND, w_down_eDF):
            return kernel
    return cpu


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, main_grads, keep_z):
        y_ND, z_N2F = kernels_for(x_ND, w_down_eDF).forward(
            x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, keep_z
        )
        if keep_z:
            ctx.save_for_backward(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F)
        ctx.main_grads = main_grads or (None, None)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F = ctx.saved_tensors
        dx_ND, dw_up_e2FD, dw_down_eDF, dprobs_N = kernels_for(x_ND, w_down_eDF).backward(
            dy_ND.contiguous(), x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F,
            ctx.needs_input_grad[:3], ctx.main_grads,
        )  # fmt: skip
        if ctx.main_grads[0] is not None:
            dw_up_e2FD, dw_down_eDF = _marked_as_added(w_up_e2FD), _marked_as_added(w_down_eDF)
        return dx_ND, dw_up_e2FD, dw_down_eDF, None, dprobs_N, None, None


def _marked_as_added(weight: Any) -> Tensor | None:
    """Signal to Megatron's DDP that the gradient is in ``main_grad``. Its hook needs a gradient, which it frees unread."""
    if not (weight.requires_grad and hasattr(weight, "grad_added_to_main_grad")):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
