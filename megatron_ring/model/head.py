"""NormHead: logits from an output weight whose columns have unit norm over the vocabulary."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

NORM_EPSILON = 1e-7


class NormHead(ColumnParallelLinear):
    """The vocabulary-parallel output layer with ``hidden / norm`` as its input.

    ``(hidden / norm) @ weight.T == hidden @ (weight / norm).T``, and scaling the hidden states costs T*D
    where scaling the weight costs V*D. The weight is read inside ``forward`` only: Megatron may still be
    gathering it before.
    """

    def __init__(self, *sizes: int, vocab_size: int, **options: object):
        super().__init__(*sizes, **options)
        first = self.output_size_per_partition * self.tp_group.rank()
        self.num_real_rows = max(0, min(self.output_size_per_partition, vocab_size - first))
        self.weight.is_embedding_or_output_parameter = True

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ):
        scaled = norm_head_scale(input_, self.weight, self.num_real_rows, self.tp_group)
        return super().forward(scaled, weight, runtime_gather_output)


def norm_head_scale(hidden_T1D: Tensor, weight_VD: Tensor, num_rows: int, tp_group) -> Tensor:
    """``hidden / norm``, where norm[d] is the L2 norm of the weight's column d over the whole vocabulary
    (plus 1e-7).

    Communicates over the tensor-parallel group (one all-reduce of D sums): this rank holds ``weight_VD``,
    of which the first ``num_rows`` rows are real; padded ones do not count. The norm is detached, as in the
    published training code (BailingMoe; Ling report, NormHead).
    """
    with torch.no_grad():
        squares_D = weight_VD[:num_rows].float().square().sum(0)
        if tp_group.size() > 1:
            torch.distributed.all_reduce(squares_D, group=tp_group)
        inverse_D = 1.0 / (squares_D.sqrt() + NORM_EPSILON)
    return (hidden_T1D.float() * inverse_D).to(hidden_T1D.dtype)
