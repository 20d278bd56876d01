"""One transformer layer: norm, attention, norm, MLP or experts, with the packed batch passed to both halves."""

from __future__ import annotations

from dataclasses import replace

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ring.model.linear import swiglu_mlp
from megatron_ring.model.moe import RingMoELayer
from megatron_ring.model.packed import PackedInputs


class RingTransformerLayer(TransformerLayer):
    """Megatron's layer with a forward pass of its own.

    Upstream's forward hands the MLP no more than a padding mask (and multi-token-prediction layers not even
    that); here both halves get the whole :class:`PackedInputs`. The MLP is built here because upstream
    passes process groups only to its own MLP classes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ):
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        bare = replace(submodules, mlp=IdentityOp)
        super().__init__(config, bare, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.is_moe_layer = issubclass(submodules.mlp.module, RingMoELayer)
        if self.is_moe_layer:
            self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
            self.mlp.set_layer_number(self.layer_number)
        else:
            self.mlp = build_module(submodules.mlp, config=config, tp_group=pg_collection.tp)
        selective = config.recompute_granularity == "selective"
        self.recompute_dense_mlp = selective and "mlp" in config.recompute_modules and not self.is_moe_layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: PackedInputs,
        rotary_pos_emb: Tensor,
        **_ignored: object,
    ) -> tuple[Tensor, None]:
        """Hidden states [T, 1, D] in and out; ``None`` stands for the cross-attention context."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, packed_seq_params, rotary_pos_emb)
        normed = self.pre_mlp_layernorm(hidden_states)
        if self.is_moe_layer:
            return hidden_states + self.mlp(normed, packed_seq_params), None
        return hidden_states + self._dense_mlp(normed), None

    def _dense_mlp(self, normed_T1D: Tensor) -> Tensor:
        if self.recompute_dense_mlp and self.training:
            return tensor_parallel.checkpoint(lambda x: self.mlp(x)[0], False, normed_T1D)
        return swiglu_mlp(self.mlp, normed_T1D)
