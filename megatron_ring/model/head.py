"""NormHead: logits from an output weight whose columns have unit norm over the vocabulary."""

import torch
from torch import Tensor

NORM_EPSILON = 1e-7


def norm_head_scale(hidden_T1D: Tensor, weight_VD: Tensor, num_rows: int, tp_group) -> Tensor:
    """``hidden / norm`` so that ``(hidden / norm) @ weight.T == hidden @ (weight / norm).T``.

    Communicates over the tensor-parallel group (one all-reduce of D sums): the norm of column d runs over the whole vocabulary
    (dimension 0), of which this rank holds ``weight_VD``; only its first ``num_rows`` rows are real, padded ones do not count. The norm is
    detached, as in the published training code (BailingMoe; Ling report, NormHead). Scaling the hidden states instead of
    the weight costs T*D instead of V*D.
    """
    with torch.no_grad():
        squares_D = weight_VD[:num_rows].float().square().sum(0)
        if tp_group.size() > 1:
            torch.distributed.all_reduce(squares_D, group=tp_group)
        inverse_D = 1.0 / (squares_D.sqrt() + NORM_EPSILON)
    return (hidden_T1D.float() * inverse_D).to(hidden_T1D.dtype)
