"""Qwen2 and Qwen2.5, dense. Defaults are those of transformers' ``Qwen2Config``, sizes the published configs'."""

from typing import Any, Final

from megatron_ring.families.family import Family, TensorNames
from megatron_ring.families.shared import FIELDS, NO_EXPERTS, ON, ONLY, TIED, TINY

QWEN2_7B: Final[dict[str, Any]] = {
    "num_layers": 28,
    "hidden_size": 3584,
    "ffn_hidden_size": 18944,
    "num_attention_heads": 28,
    "num_query_groups": 4,
    "kv_channels": 128,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "norm_epsilon": 1e-6,
    "init_method_std": 0.02,
    "rotary_base": 1000000.0,
    "add_qkv_bias": True,
}

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_types=("qwen2",),
    fields=FIELDS,
    opposites=TIED,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    only={
        **ONLY,
        # Qwen2 always has them on query, key and value, and nowhere else
        "attention_bias": ON,
        "qkv_bias": ON,
        "partial_rotary_factor": (1.0, None),
        "num_experts": (0, None),
    },
    implied={
        **NO_EXPERTS,
        "rotary_percent": 1.0,
        "qk_layernorm": False,
        "mtp_num_layers": 0,
        "add_qkv_bias": True,
        "norm_head": False,
    },
    tensors=TensorNames(
        embedding="model.embed_tokens",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.o_proj",
    ),
    presets={"qwen2_7b": QWEN2_7B, "qwen2_tiny": {**QWEN2_7B, **TINY, "ffn_hidden_size": 384}},
    has_experts=False,
    null_kv_heads_are_query_heads=True,
)
