"""The Ring model in Megatron specs, and how to build this rank's part of it.

Legend: T token slots, D model width, V vocabulary shard of this tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import padded_vocab_size
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.head import NormHead
from megatron_ring.model.initialise import initialise
from megatron_ring.model.linear import project
from megatron_ring.model.packed import PackedInputs, rotary_table
from megatron_ring.model.router import RingRouter
from megatron_ring.model.sharding import sharding_metadata
from megatron_ring.model.spec import block_spec, mtp_spec
from megatron_ring.model.translate import transformer_config
from megatron_ring.runtime.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Output of the last pipeline stage: this tensor rank's columns of the logits.

    ``main_TV`` predicts the next token, ``mtp_TV[d]`` the token ``d + 1`` positions after it. Columns from
    ``vocab_size - vocab_start`` on are padding.
    """

    main_TV: Tensor
    mtp_TV: tuple[Tensor, ...]
    vocab_start: int
    vocab_size: int
    tp_group: torch.distributed.ProcessGroup


class RingModel(GPTModel):
    """Megatron's GPT model with packed inputs, a KV cache, NormHead, and multi-token prediction without labels."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        config: TransformerConfig,
        topology: Topology,
        vp_stage: int | None = None,
    ):
        chunk = vp_stage or 0
        pre_process = topology.is_first_stage and chunk == 0
        post_process = topology.is_last_stage and chunk == topology.vpp_size - 1
        first = get_transformer_layer_offset(config, vp_stage, topology.pp_rank)
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=topology.pp_rank)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, list(range(first, first + count))),
            vocab_size=padded_vocab_size(model, parallel.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="none",
            mtp_block_spec=mtp_spec(model) if post_process and model.mtp_num_layers else None,
            pg_collection=topology.groups,
            vp_stage=vp_stage,
        )
        self.model = model
        self.tp_group = topology.groups.tp
        if post_process and model.norm_head:
            del self.output_layer
            self.output_layer = NormHead(
                config.hidden_size,
                self.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=self.tp_group,
                vocab_size=model.vocab_size,
            )

    def forward(self, microbatch: Microbatch, packed: PackedInputs) -> Any:
        """Hidden states [T, 1, D] for the next stage; on the last stage, :class:`Logits`."""
        rotary_2TR = self._rotary(microbatch.positions_T, packed)
        embedded = self._embed(microbatch.tokens_T, microbatch.positions_T) if self.pre_process else None
        hidden_T1D = self.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=rotary_2TR, packed_seq_params=packed
        )
        if not self.post_process:
            return hidden_T1D
        return self._answer(microbatch, hidden_T1D, packed, rotary_2TR)

    def _answer(
        self, microbatch: Microbatch, hidden_T1D: Tensor, packed: PackedInputs, rotary_2TR: Tensor
    ) -> Any:
        """The last stage's output from its final hidden states."""
        if packed.cache is not None and packed.cache.rows_R is not None:
            hidden_T1D = self._rows(hidden_T1D, packed.cache.rows_R)
        further = self.mtp_process and packed.cache is None
        mtp_T1D = self._predict_further(microbatch, hidden_T1D, packed, rotary_2TR) if further else []
        vocab_rows = self.output_layer.output_size_per_partition
        return Logits(
            main_TV=self._logits(hidden_T1D),
            mtp_TV=tuple(self._logits(further) for further in mtp_T1D),
            vocab_start=vocab_rows * self.tp_group.rank(),
            vocab_size=self.model.vocab_size,
            tp_group=self.tp_group,
        )

    def _rotary(self, positions_T: Tensor, packed: PackedInputs) -> Tensor:
        sizes = (self.model.kv_channels, self.model.rotary_percent, self.model.rotary_base)
        if packed.cache is None:
            return rotary_table(positions_T, *sizes)
        return packed.cache.cache.rotary(positions_T, lambda all_L: rotary_table(all_L, *sizes))

    def _embed(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        return self.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])

    def _logits(self, hidden_T1D: Tensor) -> Tensor:
        """[T, V]: gathers the sequence and keeps the vocabulary sharded."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return project(self.output_layer, hidden_T1D, weight).squeeze(1)

    def _rows(self, hidden_T1D: Tensor, rows_R: Tensor) -> Tensor:
        """The rows whose logits are needed; under sequence parallelism this rank's share of them, gathered over the
        tensor-parallel group.
        """
        if not self.config.sequence_parallel:
            return hidden_T1D[rows_R]
        whole_T1D = tensor_parallel.gather_from_sequence_parallel_region(hidden_T1D, group=self.tp_group)
        return whole_T1D[rows_R].chunk(self.tp_group.size())[self.tp_group.rank()]

    def _predict_further(
        self, microbatch: Microbatch, hidden_T1D: Tensor, packed: PackedInputs, rotary_2TR: Tensor
    ) -> list[Tensor]:
        """Hidden states of each multi-token-prediction depth (DeepSeek-V3's sequential form).

        Upstream's block requires labels and rolls tokens segment by segment on the host.
        """
        outputs = []
        # routes are replayed and recorded for the main layers only
        packed = replace(packed, routes_LTK=None, recorded=None)
        for depth, layer in enumerate(self.mtp.layers, start=1):
            tokens_T = microbatch.shifted(microbatch.tokens_T, fill=0, by=depth)
            embedded = self._embed(tokens_T, microbatch.positions_T)

            def advance(hidden, embedded, layer=layer):
                return layer._proj_and_transformer_layer(
                    hidden_states=hidden,
                    decoder_input=embedded,
                    rotary_pos_emb=rotary_2TR,
                    packed_seq_params=packed,
                )

            if self.config.recompute_granularity == "full" and self.training:
                hidden_T1D = tensor_parallel.checkpoint(advance, False, hidden_T1D, embedded)
            else:
                hidden_T1D = advance(hidden_T1D, embedded)
            outputs.append(hidden_T1D)
        return outputs

    def routers(self) -> list[RingRouter]:
        """This chunk's routers in layer order (multi-token-prediction layers last)."""
        return [module for module in self.modules() if isinstance(module, RingRouter)]


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    device: torch.device,
    seed: int,
    kind: type[RingModel] = RingModel,
) -> list[RingModel]:
    """This rank's model chunks on ``device``, initialised from ``seed``: one, or one per virtual pipeline stage."""
    config = transformer_config(model, parallel)
    stages = [None] if topology.vpp_size == 1 else list(range(topology.vpp_size))
    chunks = [kind(model, parallel, config, topology, vp_stage=stage).to(device) for stage in stages]
    for chunk in chunks:
        initialise(chunk, model, seed, sharding_metadata(topology))
    return chunks
