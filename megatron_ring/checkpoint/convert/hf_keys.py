"""What the keys of a ``config.json`` mean: a table per family.

Each key is one of four kinds: read into a field of ours; right at a few values only, because this project
computes the setting in one way; without effect on what the model computes; or unknown, and then refused unless
it says nothing (null, false, empty). Defaults are those of the published configuration classes
(inclusionAI/Ling ``configuration_bailing_moe.py``, Ling 2.0's ``configuration_bailing_moe_v2.py``, transformers'
``Qwen2Config``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ring.config.model import Family


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyKeys:
    """How one family's configs are read and written. Example: ``KEYS["qwen2"].fields["num_layers"]``."""

    architecture: str
    model_types: tuple[str, ...]
    """What ``model_type`` may say; the first is written."""
    fields: dict[str, str]
    """Our field -> their key, where the value is the same."""
    defaults: dict[str, Any]
    """Their key -> what the published class takes where it is absent; keys without one have to be there."""
    only: dict[str, tuple[Any, ...]]
    """Their key -> the values that are computed here; absent is as good as the first."""
    implied: dict[str, Any]
    """Our field -> the one value of it that this family's config can say."""
    aliases: dict[str, str]
    """Another name of a key -> the key."""


_SAME_EVERYWHERE = {
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
_EXPERTS = {
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
}
_V2_ONLY = {
    "rotary_percent": "partial_rotary_factor",
    "qk_layernorm": "use_qk_norm",
    "moe_router_score_function": "score_function",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
    "mtp_num_layers": "num_nextn_predict_layers",
}
_ALIASES = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}

_OFF: tuple[Any, ...] = (None, False)
_ON: tuple[Any, ...] = (True, None)
_ONE: tuple[Any, ...] = (1, None)
_ONLY_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "mlp_bias": _OFF,
    # factors of other families, harmless where they are 1
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "attention_multiplier": (None,),
    "residual_multiplier": _ONE,
    "mup_enabled": _OFF,
    "use_mup": _OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    # on unless a config says otherwise, and always on here; transformers and vLLM obey the first
    "is_causal": _ON,
    "causal": _ON,
    "use_causal_mask": _ON,
    "use_rope": _ON,
    "scale_attn_weights": _ON,
    "swiglu": _ON,
    "use_swiglu": _ON,
    "use_glu": _ON,
    "gated_mlp": _ON,
    "gated_linear_unit": _ON,
    "moe_layer_freq": _ONE,
    "decoder_sparse_step": _ONE,
    "mlp_only_layers": ([], None),
}
_ONLY_BAILING: dict[str, tuple[Any, ...]] = {
    **_ONLY_EVERYWHERE,
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "attention_bias": _OFF,
    "norm_topk_prob": (True,),
    "norm_softmax": (False, None),
    "multi_gate": (False, None),
    "use_rmsnorm": _ON,
    # mlx-lm's ports have them on unless a config says otherwise, and obey the first
    "moe_router_enable_shared_expert": _ON,
    "moe_router_enable_routed_scaling": _ON,
    "router_type": ("topN", None),
    # precision of the gate, not which model it is: it is computed in fp32 or better here, as published
    # (the published exporter writes the word None)
    "router_dtype": ("fp32", "fp64", "float32", "float64", None, "None"),
}
_NO_EXPERTS: dict[str, Any] = {
    "num_experts": 0,
    "moe_shared_expert_intermediate_size": 0,
    "first_k_dense_replace": 0,
}
_PLAIN: dict[str, Any] = {
    "rotary_percent": 1.0,
    "qk_layernorm": False,
    "moe_router_score_function": "softmax",
    "moe_router_num_groups": 0,
    "moe_router_group_topk": 0,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": False,
    "mtp_num_layers": 0,
}

KEYS: dict[Family, FamilyKeys] = {
    "bailing_moe": FamilyKeys(
        architecture="BailingMoeForCausalLM",
        model_types=("bailing_moe",),
        fields={**_SAME_EVERYWHERE, **_EXPERTS, "norm_head": "norm_head"},
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
            **_ONLY_BAILING,
            # engines that read both generations with one piece of code would obey these
            "partial_rotary_factor": (1.0, None),
            "use_qk_norm": (False, None),
            "score_function": ("softmax", None),
            "n_group": (1, 0, None),
            "topk_group": (1, 0, None),
            "routed_scaling_factor": (1.0, None),
            "moe_router_enable_expert_bias": (False, None),
            "num_nextn_predict_layers": (0, None),
        },
        implied={**_PLAIN, "add_qkv_bias": False},
        aliases=_ALIASES,
    ),
    "bailing_moe_v2": FamilyKeys(
        architecture="BailingMoeV2ForCausalLM",
        # the published folders say bailing_moe
        model_types=("bailing_moe_v2", "bailing_moe"),
        fields={**_SAME_EVERYWHERE, **_EXPERTS, **_V2_ONLY},
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
        # the published code of v2 has no NormHead, where some engines obey the key
        only={**_ONLY_BAILING, "norm_head": (False, None)},
        implied={"add_qkv_bias": False, "norm_head": False},
        aliases=_ALIASES,
    ),
    "qwen2": FamilyKeys(
        architecture="Qwen2ForCausalLM",
        model_types=("qwen2",),
        fields=_SAME_EVERYWHERE,
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
        },
        only={
            **_ONLY_EVERYWHERE,
            # Qwen2 has them on query, key and value whatever this says, and nowhere else
            "attention_bias": _ON,
            "qkv_bias": _ON,
            "partial_rotary_factor": (1.0, None),
            "num_experts": (0, None),
        },
        implied={**_PLAIN, **_NO_EXPERTS, "add_qkv_bias": True, "norm_head": False},
        aliases={},
    ),
}

HARMLESS: dict[str, tuple[str, ...]] = {
    "read by hand: see hf_config": (
        "architectures", "model_type", "rope_parameters", "rope_scaling", "rotary_dim", "layer_types",
        "sliding_window", "num_shared_experts", "moe_shared_expert_intermediate_size",
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
"""Why keys are passed over -> the keys."""

TRAINING_ONLY = frozenset(
    {
        "make_vocab_size_divisible_by", "mtp_loss_scaling_factor", "moe_router_bias_update_rate",
        "moe_aux_loss_coeff", "moe_z_loss_coeff", "freeze_moe_router", "moe_router_warmup_iters",
        "transformer_impl", "moe_router_dtype",
    }
)  # fmt: skip
"""Our fields that say how a model is trained, not what it computes: no config.json holds them."""

SAID_OTHERWISE = frozenset({"family", "moe_shared_expert_intermediate_size"})
"""Our fields that are neither copied nor implied: ``architectures`` and the shared experts' count say them."""

_PASSED_OVER = frozenset(key for keys in HARMLESS.values() for key in keys)


def is_known(family: Family, key: str) -> bool:
    """Is the key read, checked, or known to change nothing? transformers notes things of its own behind ``_``."""
    keys = KEYS[family]
    return (
        key in keys.defaults
        or key in keys.only
        or key in keys.aliases
        or key in keys.fields.values()
        or key in _PASSED_OVER
        or key.startswith("_")
    )
