"""The map of each model family, from its configuration; names are those of the published checkpoints.

Legend: D model width, F expert width, E experts, V vocabulary. Megatron keys are those of ``model_state``
with layers one by one; with Transformer Engine the norm before a linear is that linear's
``layer_norm_weight``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ring.checkpoint.convert.tensor_map import MapBuilder, TensorMap
from megatron_ring.config.model import ModelConfig


@dataclass(frozen=True)
class _Names:
    """What a family calls the parts of a layer."""

    embedding: str
    qkv: tuple[str, str, str] | str
    attention_output: str


_BAILING = _Names("model.word_embeddings.weight", "attention.query_key_value", "attention.dense.weight")
_NAMES = {
    "bailing_moe": _BAILING,
    "bailing_moe_v2": _BAILING,
    "qwen2": _Names(
        "model.embed_tokens.weight",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj.weight",
    ),
}


def tensor_map(model: ModelConfig, num_vocab_rows: int) -> TensorMap:
    """The map of ``model``, whose embedding and head have ``num_vocab_rows`` rows on the Megatron side
    (padding included).

    NormHead leaves no trace here: both sides keep the weight as trained and divide it when they use it.
    """
    names, b = _NAMES[model.family], MapBuilder()
    V, D = model.vocab_size, model.hidden_size
    b.pad_rows("embedding.word_embeddings.weight", names.embedding, num_vocab_rows, V, D)
    for layer in range(model.num_layers):
        _layer(
            b, model, f"decoder.layers.{layer}.", f"model.layers.{layer}.", is_moe=model.is_moe_layer(layer)
        )
    b.rename("decoder.final_layernorm.weight", "model.norm.weight", D)
    b.pad_rows("output_layer.weight", "lm_head.weight", num_vocab_rows, V, D)
    for depth in range(model.mtp_num_layers):
        key, name = f"mtp.layers.{depth}.", f"model.layers.{model.num_layers + depth}."
        for norm in ("enorm", "hnorm", "final_layernorm"):
            b.rename(f"{key}{norm}.weight", f"{name}{norm}.weight", D)
        # both multiply the concatenation (embedding, hidden)
        b.rename(f"{key}eh_proj.weight", f"{name}eh_proj.weight", D, 2 * D)
        _layer(b, model, f"{key}transformer_layer.", name, is_moe=model.is_moe)
    return b.build()


def _layer(b: MapBuilder, model: ModelConfig, key: str, name: str, *, is_moe: bool) -> None:
    names, D = _NAMES[model.family], model.hidden_size
    heads = (model.num_attention_heads, model.num_query_groups, model.kv_channels)
    fused = model.transformer_impl == "transformer_engine"
    attention = f"{key}self_attention."
    before = f"{attention}linear_qkv.layer_norm_weight" if fused else f"{key}input_layernorm.weight"
    b.rename(before, f"{name}input_layernorm.weight", D)
    for suffix, columns in (("weight", (D,)), ("bias", ())) if model.add_qkv_bias else (("weight", (D,)),):
        if isinstance(names.qkv, str):
            parts = f"{name}{names.qkv}.{suffix}"
        else:
            q, k, v = names.qkv
            parts = (f"{name}{q}.{suffix}", f"{name}{k}.{suffix}", f"{name}{v}.{suffix}")
        b.interleave_qkv(f"{attention}linear_qkv.{suffix}", parts, *heads, *columns)
    b.rename(f"{attention}linear_proj.weight", f"{name}{names.attention_output}", D, heads[0] * heads[2])
    if model.qk_layernorm:
        b.rename(f"{attention}q_layernorm.weight", f"{name}attention.query_layernorm.weight", heads[2])
        b.rename(f"{attention}k_layernorm.weight", f"{name}attention.key_layernorm.weight", heads[2])
    hidden = (
        f"{key}mlp.linear_fc1.layer_norm_weight" if fused and not is_moe else f"{key}pre_mlp_layernorm.weight"
    )
    b.rename(hidden, f"{name}post_attention_layernorm.weight", D)
    if is_moe:
        _experts(b, model, f"{key}mlp.", f"{name}mlp.")
    else:
        _mlp(b, f"{key}mlp.", f"{name}mlp.", model.ffn_hidden_size, D)


def _mlp(b: MapBuilder, key: str, name: str, width: int, D: int) -> None:
    """A gated MLP: gate and up one above the other, and down."""
    b.concatenate(
        f"{key}linear_fc1.weight", {f"{name}gate_proj.weight": width, f"{name}up_proj.weight": width}, D
    )
    b.rename(f"{key}linear_fc2.weight", f"{name}down_proj.weight", D, width)


def _experts(b: MapBuilder, model: ModelConfig, key: str, name: str) -> None:
    E, F, D = model.num_experts, model.moe_ffn_hidden_size, model.hidden_size
    b.rename(f"{key}router.weight", f"{name}gate.weight", E, D)
    if model.moe_router_enable_expert_bias:
        b.rename(f"{key}router.expert_bias", f"{name}gate.expert_bias", E)
    gate_up = {
        (e, i): f"{name}experts.{e}.{part}_proj.weight"
        for e in range(E)
        for i, part in enumerate(("gate", "up"))
    }
    b.stack(f"{key}experts.fc1_weight", gate_up, (E, 2), F, D)
    down = {(e,): f"{name}experts.{e}.down_proj.weight" for e in range(E)}
    b.stack(f"{key}experts.fc2_weight", down, (E,), D, F)
    if model.moe_shared_expert_intermediate_size:
        _mlp(
            b, f"{key}shared_experts.", f"{name}shared_experts.", model.moe_shared_expert_intermediate_size, D
        )
