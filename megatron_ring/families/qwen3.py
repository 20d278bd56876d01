"""Qwen3, dense; embeddings are tied up to 4B. Defaults are those of transformers' ``Qwen3Config``, sizes the published
configs'.
"""

from typing import Any, Final

from megatron_ring.families.family import Family, TensorNames
from megatron_ring.families.shared import FIELDS, NO_EXPERTS, NOT, ONLY, TIED, TINY

_ANY_SIZE: Final[dict[str, Any]] = {
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "norm_epsilon": 1e-6,
    "init_method_std": 0.02,
    "rotary_base": 1000000.0,
    "qk_layernorm": True,
}
QWEN3_0_6B: Final[dict[str, Any]] = {
    **_ANY_SIZE,
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 16,
    "untie_embeddings_and_output_weights": False,
}
QWEN3_8B: Final[dict[str, Any]] = {
    **_ANY_SIZE,
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
}

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_types=("qwen3",),
    fields=FIELDS,
    opposites=TIED,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    only={
        **ONLY,
        "attention_bias": NOT,
        "qkv_bias": NOT,
        "use_qk_norm": (True, None),
        "partial_rotary_factor": (1.0, None),
        "num_experts": (0, None),
        "norm_head": NOT,
    },
    implied={
        **NO_EXPERTS,
        "rotary_percent": 1.0,
        "qk_layernorm": True,
        "mtp_num_layers": 0,
        "add_qkv_bias": False,
        "norm_head": False,
    },
    tensors=TensorNames(
        embedding="model.embed_tokens",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.o_proj",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    presets={
        "qwen3_0_6b": QWEN3_0_6B,
        "qwen3_8b": QWEN3_8B,
        # wider heads than hidden_size / num_attention_heads, as in the published small ones
        "qwen3_tiny": {**QWEN3_0_6B, **TINY, "kv_channels": 64, "ffn_hidden_size": 384},
    },
    has_experts=False,
    null_kv_heads_are_query_heads=True,
)
