"""NormHead: logits from an output weight whose columns have unit norm over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_ring.families.shared import NORM_HEAD_EPSILON


class NormHead(ColumnParallelLinear):
    """The vocabulary-parallel output layer with ``hidden / norm`` as its input.

    ``(hidden / norm) @ weight.T == hidden @ (weight / norm).T``, and scaling the hidden states costs T*D
    where scaling the weight costs V*D. The weight is read inside ``forward`` only, because Megatron may still be
    gathering it before that.
    """

    def __init__(self, *sizes: int, vocab_size: int, **options: object):
        super().__init__(*sizes, **options)
        first = self.output_size_per_partition * self.tp_group.rank()
        self.num_real_rows = max(0, min(self.output_size_per_partition, vocab_size - first))
        self.weight.is_embedding_or_output_parameter = True
        self.held_inverse_D: Tensor | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute the norm once for a block in which the weight does not change. Communicates over the tensor-parallel
        group on entry.
        """
        self.held_inverse_D = norm_head_inverse(self.weight, self.num_real_rows, self.tp_group)
        try:
            yield
        finally:
            self.held_inverse_D = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ):
        inverse_D = self.held_inverse_D
        if inverse_D is None:
            scaled = norm_head_scale(input_, self.weight, self.num_real_rows, self.tp_group)
        else:
            scaled = (input_.float() * inverse_D).to(input_.dtype)
        if not torch.is_grad_enabled() and self.tp_group.size() == 1:
            return F.linear(scaled, self.weight), None
        return super().forward(scaled, weight, runtime_gather_output)


def norm_head_scale(hidden_T1D: Tensor, weight_VD: Tensor, num_rows: int, tp_group) -> Tensor:
    """``hidden / norm`` of :func:`norm_head_inverse`. Communicates over the tensor-parallel group."""
    inverse_D = norm_head_inverse(weight_VD, num_rows, tp_group)
    return (hidden_T1D.float() * inverse_D).to(hidden_T1D.dtype)


def norm_head_inverse(weight_VD: Tensor, num_rows: int, tp_group) -> Tensor:
    """``1 / norm`` [D] in fp32; norm[d] is the L2 norm of the weight's column d over the whole vocabulary, plus 1e-7.

    Communicates over the tensor-parallel group (one all-reduce of D sums). ``weight_VD`` is this rank's shard; only its
    first ``num_rows`` rows count, the others are padding. The norm is detached, as in the published training code
    (BailingMoe; Ling report, NormHead).
    """
    with torch.no_grad():
        squares_D = weight_VD[:num_rows].float().square().sum(0)
        if tp_group.size() > 1:
            torch.distributed.all_reduce(squares_D, group=tp_group)
        return 1.0 / (squares_D.sqrt() + NORM_HEAD_EPSILON)
