"""One transformer layer: norm, attention, norm, MLP or experts, with the packed batch passed to both halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_ring.model.linear import swiglu_mlp
from megatron_ring.model.moe import RingMoELayer
from megatron_ring.model.packed import PackedInputs


class RingTransformerLayer(TransformerLayer):
    """Megatron's layer with its own forward pass.

    Upstream's forward passes the MLP only a padding mask (and nothing in multi-token-prediction layers); here both
    halves get the whole :class:`PackedInputs`. The MLP is built here because upstream passes process groups only to its
    own MLP classes.
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
        hidden_states = hidden_states + self._after_norm(
            self.input_layernorm,
            lambda normed_T1D: self.self_attention(normed_T1D, packed_seq_params, rotary_pos_emb),
            hidden_states,
            self.recompute_input_layernorm,
        )
        return hidden_states + self._after_norm(
            self.pre_mlp_layernorm,
            lambda normed_T1D: self._mlp_or_experts(normed_T1D, packed_seq_params),
            hidden_states,
            self.recompute_pre_mlp_layernorm,
        ), None

    def _after_norm(
        self, norm: nn.Module, half: Callable[[Tensor], Tensor], hidden_T1D: Tensor, recompute: bool
    ) -> Tensor:
        """``half(norm(hidden))``. With ``recompute`` the normalised values are freed after ``half`` has read them, and
        recomputed in place when the gradient of its output arrives.
        """
        if not (recompute and self.training):
            return half(norm(hidden_T1D))
        # the default of this argument would enable fp8
        checkpoint = tensor_parallel.random.CheckpointWithoutOutput(fp8=None)
        output_T1D = half(checkpoint.checkpoint(norm, hidden_T1D))
        checkpoint.discard_output_and_register_recompute(output_T1D)
        return output_T1D

    def _mlp_or_experts(self, normed_T1D: Tensor, packed: PackedInputs) -> Tensor:
        if self.is_moe_layer:
            return self.mlp(normed_T1D, packed)
        return self._dense_mlp(normed_T1D)

    def _dense_mlp(self, normed_T1D: Tensor) -> Tensor:
        if self.recompute_dense_mlp and self.training:
            return tensor_parallel.checkpoint(lambda x: self.mlp(x)[0], False, normed_T1D)
        return swiglu_mlp(self.mlp, normed_T1D)
