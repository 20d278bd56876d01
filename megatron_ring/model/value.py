"""A value model: Ring's layers with a head that outputs one number per token.

Legend: T token slots, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.build import RingModel
from megatron_ring.model.packed import PackedInputs
from megatron_ring.runtime.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Values:
    """Output of the last stage of a :class:`ValueModel`: fp32 [T], the same on every tensor rank.

    The value at position p is that of the text up to and including token p, before token p + 1 is sampled.
    """

    values_T: Tensor


class ValueHead(MegatronModule):
    """``hidden . weight``, not sharded: every tensor rank has the whole weight."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return F.linear(hidden_TD.float(), self.weight.float()).squeeze(-1)


class ValueModel(RingModel):
    """Ring with a value head instead of the output layer."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        config: TransformerConfig,
        topology: Topology,
        vp_stage: int | None = None,
    ):
        # its head has no vocabulary to tie the embedding to
        model = replace(model, untie_embeddings_and_output_weights=True)
        super().__init__(model, parallel, config, topology, vp_stage)
        if self.post_process:
            # upstream's sharded state dict needs this name
            del self.output_layer
            self.output_layer = ValueHead(config)

    def _answer(
        self, microbatch: Microbatch, hidden_T1D: Tensor, packed: PackedInputs, rotary_2TR: Tensor
    ) -> Any:
        """Gathers the sequence over the tensor-parallel group where it is split."""
        if self.config.sequence_parallel:
            # every tensor rank computes the same loss over all tokens, so its gradient is split, not summed
            hidden_T1D = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_T1D, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return Values(values_T=self.output_layer(hidden_T1D.squeeze(1)))
