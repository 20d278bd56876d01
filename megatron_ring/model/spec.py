"""Megatron's layer spec, which names the class of each module, filled from a backend provider."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.model.attention import PackedCoreAttention, RingSelfAttention
from megatron_ring.model.layer import RingTransformerLayer
from megatron_ring.model.moe import RingMoELayer
from megatron_ring.model.norm import RingRMSNorm


class RingBackend(LocalSpecProvider):
    """Megatron's parallel linears, our norm and our packed attention."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RingRMSNorm

    def core_attention(self) -> type:
        return PackedCoreAttention


def require_backend(model: ModelConfig) -> None:
    """Check, before anything is started, that the library of ``transformer_impl`` can be imported.

    Raises:
        ConfigError: Transformer Engine is configured and not installed.
    """
    if model.transformer_impl == "local":
        return
    try:
        import transformer_engine  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"transformer_impl=transformer_engine needs Transformer Engine, which does not import ({error}); "
            "install transformer_engine[pytorch] on a CUDA machine or use --transformer-impl local"
        ) from None


def backend(model: ModelConfig) -> BackendSpecProvider:
    """The provider that ``transformer_impl`` names.

    Raises:
        ConfigError: Transformer Engine is configured and not installed.
    """
    require_backend(model)
    if model.transformer_impl == "local":
        return RingBackend()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def layer_spec(model: ModelConfig, is_moe: bool) -> ModuleSpec:
    """One layer: attention, then an MLP or experts."""
    provider = backend(model)
    fused = provider.fuse_layernorm_and_linear()
    linear_in = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    plain_linears = MLPSubmodules(
        linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
    )
    norm = provider.layer_norm(rms_norm=True)
    head_norm = provider.layer_norm(rms_norm=True, for_qk=True) if model.qk_layernorm else IdentityOp
    if is_moe:
        mlp = ModuleSpec(module=RingMoELayer, params={"model": model, "shared_expert_linears": plain_linears})
    else:
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=linear_in, linear_fc2=provider.row_parallel_linear()),
        )
    return ModuleSpec(
        module=RingTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=RingSelfAttention,
                params={"attn_mask_type": AttnMaskType.padding_causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_in,
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # the router needs the normalised input too, so the norm before experts cannot be fused into a linear
            pre_mlp_layernorm=norm if is_moe or not fused else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(model: ModelConfig, layers: list[int]) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline chunk; ``layers`` are their global indices from 0."""
    specs = {is_moe: layer_spec(model, is_moe) for is_moe in (False, True) if model.is_moe or not is_moe}
    norm = backend(model).layer_norm(rms_norm=True)
    return TransformerBlockSubmodules(
        layer_specs=[specs[model.is_moe_layer(layer)] for layer in layers], layer_norm=norm
    )


def mtp_spec(model: ModelConfig) -> MultiTokenPredictionBlockSubmodules:
    """The multi-token-prediction layers; they have experts whenever the model does."""
    provider = backend(model)
    norm = provider.layer_norm(rms_norm=True)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=provider.column_parallel_linear(),
            transformer_layer=layer_spec(model, model.is_moe),
            layer_norm=norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.mtp_num_layers)
