"""``config.json`` of published models, without what only names files: the settings as they were read in public.

Ling-lite, Ling-plus: inclusionAI/Ring ``inference/mindie``. Ling-lite-1.5, Ling-mini-2.0, Ling-1T: as tests of other
engines quote them. Qwen2-7B: as transformers 4.41 wrote it, and as 5.7 writes it again.
"""

from __future__ import annotations

from typing import Any

_V1: dict[str, Any] = {
    "architectures": ["BailingMoeForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"}, "eos_token_id": 126081,
    "pad_token_id": 126081, "first_k_dense_replace": 0, "hidden_act": "silu", "initializer_range": 0.006,
    "max_position_embeddings": 16384, "model_type": "bailing_moe", "norm_topk_prob": True, "pretraining_tp": 1,
    "rope_scaling": None, "rope_theta": 600000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0", "use_cache": True, "use_bias": False, "use_qkv_bias": False,
    "vocab_size": 126464, "output_router_logits": False, "embedding_dropout": 0.0, "norm_head": True,
    "norm_softmax": False, "output_dropout": 0.0,
}  # fmt: skip
_LITE = {
    **_V1, "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_experts": 64,
    "num_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
_V2: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"}, "eos_token_id": 156892,
    "pad_token_id": 156892, "hidden_act": "silu", "max_position_embeddings": 32768, "model_type": "bailing_moe",
    "norm_topk_prob": True, "num_experts_per_tok": 8, "num_experts": 256, "rope_theta": 600000,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3", "use_bias": False, "use_rmsnorm": True, "rms_norm_eps": 1e-6,
    "head_dim": 128, "num_shared_experts": 1, "use_cache": True, "use_qkv_bias": False, "embedding_dropout": 0.0,
    "output_dropout": 0.0, "vocab_size": 157184, "router_dtype": "fp32", "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "use_qk_norm": True, "score_function": "sigmoid",
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "Ling-lite-base": {**_LITE, "rms_norm_eps": 1e-5, "embedding_dropout": 0.1, "output_dropout": 0.1},
    "Ling-lite": _LITE,
    "Ling-lite-1.5": {
        **_LITE, "intermediate_size": 1408, "max_position_embeddings": 32768, "norm_head": False,
        "transformers_version": "4.40.0",
    },
    "Ling-plus-base": {
        **_V1, "hidden_size": 5376, "intermediate_size": 12288, "moe_intermediate_size": 3072,
        "n_routed_experts": 64, "n_shared_experts": 1, "num_attention_heads": 56, "num_experts_per_tok": 4,
        "num_hidden_layers": 88, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    },
    "Ling-mini-2.0": {
        **_V2, "num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5120, "first_k_dense_replace": 1,
        "moe_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5, "moe_shared_expert_intermediate_size": 512, "num_nextn_predict_layers": 0,
        "max_window_layers": 20, "mtp_loss_scaling_factor": 0,
    },
    "Ling-1T": {
        **_V2, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 18432, "first_k_dense_replace": 4,
        "moe_intermediate_size": 2048, "num_attention_heads": 64, "num_key_value_heads": 8, "rotary_dim": 64,
        "moe_shared_expert_intermediate_size": 2048,
    },
    "Qwen2-7B": {
        **_QWEN, "rope_theta": 1000000.0, "sliding_window": 131072, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
    },
    "Qwen3-0.6B": {
        **_QWEN3, "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "Qwen3-30B-A3B": {
        **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
    },
    "Qwen2-7B of transformers 5": {
        **_QWEN, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
        "dtype": "bfloat16", "transformers_version": "5.7.0", "pad_token_id": None,
        "layer_types": ["full_attention"] * 28,
    },
}  # fmt: skip
"""Name -> its config."""
