"""The map of a model, from its configuration and its family's names.

Legend: D model width, F expert width, E experts, V vocabulary. Megatron keys are those of ``model_state``
with layers one by one; with Transformer Engine the norm before a linear is that linear's
``layer_norm_weight``.
"""

from __future__ import annotations

from megatron_ring.checkpoint.convert.tensor_map import MapBuilder, TensorMap
from megatron_ring.config.model import ModelConfig
from megatron_ring.families import FAMILIES, TensorNames

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Megatron's keys of tensors with one row per token id; vocabulary padding follows the last row."""
EXPERT_BIAS = "router.expert_bias"
"""How Megatron's keys of expert biases end. A bias is added to the scores when experts are chosen; always fp32."""


def tensor_map(model: ModelConfig, num_vocab_rows: int) -> TensorMap:
    """The map of ``model``, whose embedding and head have ``num_vocab_rows`` rows on the Megatron side
    (padding included).

    A model with tied embeddings has no head on either side. NormHead changes nothing here: both sides store the
    weight as trained and divide it when they use it.
    """
    names, b = FAMILIES[model.family].tensors, MapBuilder()
    V, D = model.vocab_size, model.hidden_size
    b.pad_rows(EMBEDDING, f"{names.embedding}.weight", num_vocab_rows, V, D)
    for layer in range(model.num_layers):
        key, name = f"decoder.layers.{layer}.", names.layer.format(layer)
        _layer(b, model, names, key, name, is_moe=model.is_moe_layer(layer))
    b.rename("decoder.final_layernorm.weight", f"{names.final_norm}.weight", D)
    if model.untie_embeddings_and_output_weights:
        b.pad_rows(HEAD, f"{names.head}.weight", num_vocab_rows, V, D)
    for depth in range(model.mtp_num_layers):
        key, name = f"mtp.layers.{depth}.", names.layer.format(model.num_layers + depth)
        for norm in names.mtp_norms:
            b.rename(f"{key}{norm}.weight", f"{name}{norm}.weight", D)
        # both multiply the concatenation (embedding, hidden)
        projection = f"{names.mtp_projection}.weight"
        b.rename(f"{key}{projection}", f"{name}{projection}", D, 2 * D)
        _layer(b, model, names, f"{key}transformer_layer.", name, is_moe=model.is_moe)
    return b.build()


def _layer(
    b: MapBuilder, model: ModelConfig, names: TensorNames, key: str, name: str, *, is_moe: bool
) -> None:
    D = model.hidden_size
    fused = model.transformer_impl == "transformer_engine"
    attention = f"{key}self_attention."
    before = f"{attention}linear_qkv.layer_norm_weight" if fused else f"{key}input_layernorm.weight"
    b.rename(before, f"{name}{names.attention_norm}.weight", D)
    _attention(b, model, names, attention, name)
    hidden = (
        f"{key}mlp.linear_fc1.layer_norm_weight" if fused and not is_moe else f"{key}pre_mlp_layernorm.weight"
    )
    b.rename(hidden, f"{name}{names.mlp_norm}.weight", D)
    if is_moe:
        _experts(b, model, names, f"{key}mlp.", name)
    else:
        _mlp(b, names, f"{key}mlp.", f"{name}{names.mlp}", model.ffn_hidden_size, D)


def _attention(b: MapBuilder, model: ModelConfig, names: TensorNames, key: str, name: str) -> None:
    D, heads = model.hidden_size, (model.num_attention_heads, model.num_query_groups, model.kv_channels)
    for suffix, columns in (("weight", (D,)), ("bias", ())) if model.add_qkv_bias else (("weight", (D,)),):
        parts = tuple(f"{name}{part}.{suffix}" for part in names.qkv)
        b.interleave_qkv(f"{key}linear_qkv.{suffix}", parts, *heads, *columns)
    b.rename(f"{key}linear_proj.weight", f"{name}{names.attention_output}.weight", D, heads[0] * heads[2])
    if model.qk_layernorm:
        b.rename(f"{key}q_layernorm.weight", f"{name}{names.q_norm}.weight", heads[2])
        b.rename(f"{key}k_layernorm.weight", f"{name}{names.k_norm}.weight", heads[2])


def _mlp(b: MapBuilder, names: TensorNames, key: str, name: str, width: int, D: int) -> None:
    """A gated MLP: gate and up one above the other, and down."""
    gate, up, down = (f"{name}{part}.weight" for part in names.gate_up_down)
    b.concatenate(f"{key}linear_fc1.weight", {gate: width, up: width}, D)
    b.rename(f"{key}linear_fc2.weight", down, D, width)


def _experts(b: MapBuilder, model: ModelConfig, names: TensorNames, key: str, name: str) -> None:
    E, F, D = model.num_experts, model.moe_ffn_hidden_size, model.hidden_size
    b.rename(f"{key}router.weight", f"{name}{names.router}.weight", E, D)
    if model.moe_router_enable_expert_bias:
        b.rename(f"{key}{EXPERT_BIAS}", f"{name}{names.expert_bias}", E)
    *gate_up, down = names.gate_up_down
    experts = [f"{name}{names.expert.format(e)}" for e in range(E)]
    fc1 = {(e, i): f"{experts[e]}{part}.weight" for e in range(E) for i, part in enumerate(gate_up)}
    b.stack(f"{key}experts.fc1_weight", fc1, (E, 2), F, D)
    b.stack(f"{key}experts.fc2_weight", {(e,): f"{experts[e]}{down}.weight" for e in range(E)}, (E,), D, F)
    if width := model.moe_shared_expert_intermediate_size:
        _mlp(b, names, f"{key}shared_experts.", f"{name}{names.shared_experts}", width, D)
