"""Qwen3-MoE. Defaults are those of transformers' ``Qwen3MoeConfig``, sizes the published configs'."""

from typing import Any, Final

from megatron_ring.families.family import Family, Needs, TensorNames
from megatron_ring.families.shared import EXPERT_FIELDS, FIELDS, NOT, ONLY, PLAIN_ROUTER, TIED, TINY

QWEN3_30B_A3B: Final[dict[str, Any]] = {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "kv_channels": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "norm_epsilon": 1e-6,
    "init_method_std": 0.02,
    "rotary_base": 1000000.0,
    "qk_layernorm": True,
    "num_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
    "moe_aux_loss_coeff": 0.001,
}

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_types=("qwen3_moe",),
    fields={**FIELDS, **EXPERT_FIELDS},
    opposites={**TIED, "moe_router_pre_softmax": "norm_topk_prob"},
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    only={
        **ONLY,
        "attention_bias": NOT,
        "qkv_bias": NOT,
        "partial_rotary_factor": (1.0, None),
        # other families' keys that engines would apply
        "use_qk_norm": (True, None),
        "score_function": ("softmax", None),
        "scoring_func": ("softmax", None),
        "n_group": (1, 0, None),
        "topk_group": (1, 0, None),
        "routed_scaling_factor": (1.0, None),
        "n_shared_experts": (0, None),
        "num_shared_experts": (0, None),
        "shared_expert_intermediate_size": (0, None),
        "first_k_dense_replace": (0, None),
        "norm_head": NOT,
    },
    implied={
        **{name: value for name, value in PLAIN_ROUTER.items() if name != "moe_router_pre_softmax"},
        "rotary_percent": 1.0,
        "qk_layernorm": True,
        "moe_shared_expert_intermediate_size": 0,
        "first_k_dense_replace": 0,
        "mtp_num_layers": 0,
        "add_qkv_bias": False,
        "norm_head": False,
    },
    # every layer has experts; the class assumes it, some engines read it
    written={"decoder_sparse_step": 1, "mlp_only_layers": []},
    aliases={"num_local_experts": "num_experts"},
    tensors=TensorNames(
        embedding="model.embed_tokens",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.o_proj",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    presets={
        "qwen3_30b_a3b": QWEN3_30B_A3B,
        "qwen3_moe_tiny": {
            **QWEN3_30B_A3B,
            **TINY,
            # wider heads than hidden_size / num_attention_heads, as in the published models
            "kv_channels": 64,
            "ffn_hidden_size": 384,
            "num_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 64,
        },
    },
    has_experts=True,
    needs=(
        Needs(
            when=("moe_router_topk", 1),
            then=("moe_router_pre_softmax", True),
            because="its gate would give the only expert the weight 1, whatever its score, and never learn",
        ),
    ),
)
