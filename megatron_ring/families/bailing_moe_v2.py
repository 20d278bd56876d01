"""BailingMoeV2: Ling-mini-2.0, Ring-mini-2.0, Ling-1T.

Defaults are those of Ling 2.0's ``configuration_bailing_moe_v2.py``; Ring-mini-2.0's sizes are its published config's.
"""

from typing import Any, Final

from megatron_ring.families.bailing_moe import ALIASES, FIRST_LAYERS, ONLY_BAILING, TENSORS, WRITTEN
from megatron_ring.families.family import Family
from megatron_ring.families.shared import EXPERT_FIELDS, FIELDS, NOT, TINY

# mtp_num_layers is 0 in the published checkpoints' configs, 1 in the published pre-training script
RING_MINI_V2: Final[dict[str, Any]] = {
    "num_layers": 20,
    "hidden_size": 2048,
    "ffn_hidden_size": 5120,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 128,
    "vocab_size": 157184,
    "max_position_embeddings": 32768,
    "norm_epsilon": 1e-6,
    "init_method_std": 0.02,
    "rotary_base": 600000.0,
    "rotary_percent": 0.5,
    "qk_layernorm": True,
    "num_experts": 256,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_z_loss_coeff": 3.5e-6,
}

FAMILY = Family(
    name="bailing_moe_v2",
    architecture="BailingMoeV2ForCausalLM",
    # the published folders say bailing_moe
    model_types=("bailing_moe_v2", "bailing_moe"),
    fields={
        **FIELDS,
        **EXPERT_FIELDS,
        **FIRST_LAYERS,
        "rotary_percent": "partial_rotary_factor",
        "qk_layernorm": "use_qk_norm",
        "moe_router_score_function": "score_function",
        "moe_router_num_groups": "n_group",
        "moe_router_group_topk": "topk_group",
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
        "mtp_num_layers": "num_nextn_predict_layers",
    },
    defaults={
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "rope_theta": 600000.0,
        "num_experts": 256,
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
        "score_function": "sigmoid",
        "routed_scaling_factor": 1.0,
        "moe_router_enable_expert_bias": True,
        "num_nextn_predict_layers": 0,
    },
    # the published code has no NormHead, but some engines apply the key
    only={**ONLY_BAILING, "norm_head": NOT},
    implied={
        "moe_router_pre_softmax": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True,
        "norm_head": False,
    },
    written=WRITTEN,
    aliases=ALIASES,
    tensors=TENSORS,
    presets={
        "ring_mini_v2": RING_MINI_V2,
        "ring_mini_v2_tiny": {
            **RING_MINI_V2,
            **TINY,
            "ffn_hidden_size": 320,
            "num_experts": 16,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
    },
    has_experts=True,
    has_mtp=True,
    shared_experts_key="num_shared_experts",
    keeps_score_of_one=True,
    window_is_off_by_default=False,
    config_class="BailingMoeConfig",
)
