"""Known models by name: the published shapes, and a tiny relative of each that trains on a CPU in seconds.

A preset is the lowest layer of a config: flat names and values that a TOML file and flags may override. The
tiny ones also bring what a CPU run needs (fp32, short samples). Sizes: Ling report (arXiv 2503.05139) for
Ring-lite, the published configs for Ring-mini-2.0 and Qwen2.5-7B.
"""

from typing import Any, Final

_RING_LITE: Final[dict[str, Any]] = {
    "family": "bailing_moe",
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

# mtp_num_layers is 0 in the published checkpoints' configs, 1 in the published pre-training script
_RING_MINI_V2: Final[dict[str, Any]] = {
    "family": "bailing_moe_v2",
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

_QWEN2_7B: Final[dict[str, Any]] = {
    "family": "qwen2",
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

_TINY: Final[dict[str, Any]] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "init_method_std": 0.02,
    "bf16": False,
    "seq_length": 256,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "lr": 2e-3,
}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "ring_lite": _RING_LITE,
    "ring_mini_v2": _RING_MINI_V2,
    "qwen2_7b": _QWEN2_7B,
    "ring_lite_tiny": {
        **_RING_LITE,
        **_TINY,
        "ffn_hidden_size": 384,
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    },
    "ring_mini_v2_tiny": {
        **_RING_MINI_V2,
        **_TINY,
        "ffn_hidden_size": 320,
        "num_experts": 16,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "qwen2_tiny": {**_QWEN2_7B, **_TINY, "ffn_hidden_size": 384},
}
"""Preset name -> flat settings that differ from the defaults."""
