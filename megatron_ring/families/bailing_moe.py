"""BailingMoe: Ling-lite, Ling-plus and Ring-lite.

Defaults are those of inclusionAI/Ling's ``configuration_bailing_moe.py``; Ring-lite's sizes are the Ling report's
(arXiv 2503.05139).
"""

from typing import Any, Final

from megatron_ring.families.family import Family, TensorNames
from megatron_ring.families.shared import EXPERT_FIELDS, FIELDS, NOT, ON, ONLY, PLAIN_ROUTER, TINY

FIRST_LAYERS: Final = {"first_k_dense_replace": "first_k_dense_replace"}
ALIASES: Final = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
ONLY_BAILING: Final[dict[str, tuple[Any, ...]]] = {
    **ONLY,
    "tie_word_embeddings": NOT,
    "use_bias": NOT,
    "use_qkv_bias": NOT,
    "attention_bias": NOT,
    "norm_topk_prob": (True,),
    "norm_softmax": NOT,
    "multi_gate": NOT,
    "use_rmsnorm": ON,
    # mlx-lm's ports default to on, and read the first
    "moe_router_enable_shared_expert": ON,
    "moe_router_enable_routed_scaling": ON,
    "router_type": ("topN", None),
    # precision of the gate, which does not change the model: it is computed in fp32 or better here, as
    # published (the published exporter writes the word None)
    "router_dtype": ("fp32", "fp64", "float32", "float64", None, "None"),
}
WRITTEN: Final[dict[str, Any]] = {
    # it was trained in fp64; engines read every other value as bfloat16
    "router_dtype": "fp32",
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}
TENSORS: Final = TensorNames(
    embedding="model.word_embeddings",
    qkv=("attention.query_key_value",),
    attention_output="attention.dense",
    q_norm="attention.query_layernorm",
    k_norm="attention.key_layernorm",
)
RING_LITE: Final[dict[str, Any]] = {
    "num_layers": 28,
    "hidden_size": 2048,
    "ffn_hidden_size": 5632,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 128,
    "vocab_size": 126464,
    "max_position_embeddings": 32768,
    "norm_epsilon": 1e-6,
    "init_method_std": 0.006,
    "rotary_base": 600000.0,
    "norm_head": True,
    "num_experts": 64,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2816,
    "moe_router_score_function": "softmax",
    "moe_aux_loss_coeff": 0.015,
    "moe_z_loss_coeff": 1e-4,
}

FAMILY = Family(
    name="bailing_moe",
    architecture="BailingMoeForCausalLM",
    model_types=("bailing_moe",),
    fields={**FIELDS, **EXPERT_FIELDS, **FIRST_LAYERS, "norm_head": "norm_head"},
    defaults={
        "vocab_size": 30592,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "norm_head": False,
        "initializer_range": 0.02,
        "max_position_embeddings": 16384,
        "rope_theta": 10000.0,
        "num_experts": 16,
        "num_shared_experts": 0,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
    },
    only={
        **ONLY_BAILING,
        # engines that read both generations with the same code would apply these
        "partial_rotary_factor": (1.0, None),
        "use_qk_norm": NOT,
        "score_function": ("softmax", None),
        "n_group": (1, 0, None),
        "topk_group": (1, 0, None),
        "routed_scaling_factor": (1.0, None),
        "moe_router_enable_expert_bias": NOT,
        "num_nextn_predict_layers": (0, None),
    },
    implied={
        **PLAIN_ROUTER,
        "rotary_percent": 1.0,
        "qk_layernorm": False,
        "mtp_num_layers": 0,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True,
    },
    written=WRITTEN,
    aliases=ALIASES,
    tensors=TENSORS,
    presets={
        "ring_lite": RING_LITE,
        "ring_lite_tiny": {
            **RING_LITE,
            **TINY,
            "ffn_hidden_size": 384,
            "num_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    },
    has_experts=True,
    shared_experts_key="num_shared_experts",
    keeps_score_of_one=True,
    config_class="BailingMoeConfig",
)
