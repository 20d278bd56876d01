"""What several families have in common; each family picks its parts from here."""

from typing import Any, Final

FIELDS: Final = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "rotary_base": "rope_theta",
}
"""Of every family: our field -> their key."""

EXPERT_FIELDS: Final = {
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
"""Of every family with experts."""

NORM_HEAD_EPSILON: Final = 1e-7
"""NormHead: each column of the head is divided by its norm over the vocabulary plus this."""

ON: Final[tuple[Any, ...]] = (True, None)
ONE: Final[tuple[Any, ...]] = (1, None)
NOT: Final[tuple[Any, ...]] = (False, None)

ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": NOT,
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": NOT,
    "add_cross_attention": NOT,
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": NOT,
    "mlp_bias": NOT,
    # factors of other families, harmless if they are 1
    "logit_scale": ONE,
    "logits_scaling": ONE,
    "embedding_multiplier": ONE,
    "attention_multiplier": (None,),
    "residual_multiplier": ONE,
    "mup_enabled": NOT,
    "use_mup": NOT,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    # on by default, and always on here; transformers and vLLM read the first
    "is_causal": ON,
    "causal": ON,
    "use_causal_mask": ON,
    "use_rope": ON,
    "scale_attn_weights": ON,
    "swiglu": ON,
    "use_swiglu": ON,
    "use_glu": ON,
    "gated_mlp": ON,
    "gated_linear_unit": ON,
    # which layers have experts: all but the first few
    "moe_layer_freq": ONE,
    "decoder_sparse_step": ONE,
    "mlp_only_layers": ([], None),
}
"""Of every family: their key -> the values that are supported."""

TIED: Final = {"untie_embeddings_and_output_weights": "tie_word_embeddings"}
"""Our switch -> their key that says the opposite, in families whose class reads it."""

PLAIN_ROUTER: Final[dict[str, Any]] = {
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": 0,
    "moe_router_group_topk": 0,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": False,
}
"""Our router's settings in a family whose config.json does not have them."""

NO_EXPERTS: Final[dict[str, Any]] = {
    **PLAIN_ROUTER,
    "num_experts": 0,
    "moe_shared_expert_intermediate_size": 0,
    "first_k_dense_replace": 0,
}

TINY: Final[dict[str, Any]] = {
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
"""A tiny version of any model that trains on a CPU in seconds, and what such a run needs (fp32, short
samples)."""

HARMLESS: Final[dict[str, tuple[str, ...]]] = {
    "read by hand: see hf_config": (
        "architectures", "model_type", "rope_parameters", "rope_scaling", "rotary_dim", "layer_types",
        "sliding_window", "moe_shared_expert_intermediate_size",
    ),
    "where files come from and what wrote them": (
        "auto_map", "torch_dtype", "dtype", "transformers_version", "transformers_weights", "name_or_path",
        "tokenizer_class", "license", "language", "tags", "model_name", "base_model_name_or_path",
        "unsloth_version", "unsloth_fixed", "transformers.js_config", "hf_device_map",
    ),
    "training only": (
        "neftune_noise_alpha", "bf16", "fp16", "fp32",
        "attention_dropout", "embedding_dropout", "output_dropout", "hidden_dropout", "resid_pdrop",
        "embd_pdrop", "attn_pdrop", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux",
        "mtp_loss_scaling_factor", "moe_router_bias_update_rate", "gradient_checkpointing", "tf_legacy_loss",
        "moe_aux_loss_coeff", "moe_z_loss_coeff", "router_z_loss_coef", "ep_size",
    ),
    "what a call returns and how it is cached": (
        "use_cache", "return_dict", "use_return_dict", "return_dict_in_generate", "output_attentions",
        "output_hidden_states", "output_router_logits", "output_scores", "add_router_probs", "torchscript",
        "use_bfloat16", "attn_implementation", "experts_implementation", "is_decoder", "output_past",
        "xla_device", "return_legacy_cache",
    ),
    "the same arithmetic in other pieces": (
        "pretraining_tp", "chunk_size_feed_forward", "use_flash_attn", "use_flash_attention",
        "use_flash_attention_2", "flash_attention",
    ),
    "lengths that nothing is computed with": (
        "model_max_length", "tokenizer_model_max_length", "max_sequence_length", "seq_length",
    ),
    "heads for classification, which a language model has none of": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "pruned_heads", "classifier_dropout",
    ),
    "without use_sliding_window nothing looks at it": ("max_window_layers",),
    "tokens and generation": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
        "unk_token_id", "decoder_start_token_id", "bad_words_ids", "max_length", "max_new_tokens",
        "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences",
        "prefix", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "generation_config",
        "bos_token", "eos_token", "pad_token", "chat_template", "renormalize_logits", "stop_strings",
        "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    ),
}  # fmt: skip
"""Why keys are ignored -> the keys."""
