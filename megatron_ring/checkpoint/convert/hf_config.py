"""``config.json`` of a Hugging Face folder and our model configuration, into each other.

Only here do Hugging Face's words for a model's settings appear. What a config says beyond what this project
can compute is refused by name; what it leaves out has the published configuration class's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ring.config.model import Family, ModelConfig
from megatron_ring.config.model_rules import model_problems
from megatron_ring.errors import CheckpointError

ARCHITECTURES: dict[str, Family] = {
    "BailingMoeForCausalLM": "bailing_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
    "Qwen2ForCausalLM": "qwen2",
}
_MODEL_TYPES: dict[Family, str] = {
    "bailing_moe": "bailing_moe",
    "bailing_moe_v2": "bailing_moe_v2",
    "qwen2": "qwen2",
}

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
_FIELDS: dict[Family, dict[str, str]] = {
    "bailing_moe": {**_SAME_EVERYWHERE, **_EXPERTS, "norm_head": "norm_head"},
    "bailing_moe_v2": {
        **_SAME_EVERYWHERE,
        **_EXPERTS,
        "norm_head": "norm_head",
        "rotary_percent": "partial_rotary_factor",
        "qk_layernorm": "use_qk_norm",
        "moe_router_score_function": "score_function",
        "moe_router_num_groups": "n_group",
        "moe_router_group_topk": "topk_group",
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
        "mtp_num_layers": "num_nextn_predict_layers",
    },
    "qwen2": _SAME_EVERYWHERE,
}
"""Our field -> their field, where the value is the same."""

_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "norm_head": False,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "n_group": 0,
    "topk_group": 0,
}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "norm_topk_prob": (True,),
    "norm_softmax": (False,),
    "multi_gate": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
"""Settings that this project computes in one way only; absent is as good as right."""

_CONFIG_CLASS = '''"""Configuration class of this model; every setting is in config.json."""

from transformers import PretrainedConfig


class BailingMoeConfig(PretrainedConfig):
    model_type = "{model_type}"
'''


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json``.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: {reason}; name a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object; name a Hugging Face model folder")
    return config


def family_of(config: Mapping[str, Any], origin: str) -> Family:
    """Which of our families ``architectures`` names.

    Raises:
        CheckpointError: none.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    raise CheckpointError(
        f"{origin}: architectures={named} is another family's model; convertible are {', '.join(ARCHITECTURES)}"
    )


def model_config(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """Our configuration of the model that ``config`` (of file ``origin``) describes.

    Raises:
        CheckpointError: another family, a missing or unsupported setting, or sizes that fit no model.
    """
    family = family_of(config, origin)
    theirs = {**(config.get("rope_parameters") or {}), **config}
    if theirs.get("num_experts_per_tok") == 1:
        # the published gates normalise nothing where there is one weight, whatever this says
        theirs.pop("norm_topk_prob", None)
    for name, allowed in _MUST_BE.items():
        if name in theirs and theirs[name] not in allowed:
            raise CheckpointError(
                f"{origin}: {name}={theirs[name]!r} is not supported; it must be {allowed[0]!r}"
            )
    values: dict[str, Any] = {}
    for ours, name in _FIELDS[family].items():
        value = theirs.get(name)
        values[ours] = _default(name, theirs, origin) if value is None else value
    if family != "qwen2":
        shared = int(theirs.get("num_shared_experts") or 0)
        values["moe_shared_expert_intermediate_size"] = shared * values["moe_ffn_hidden_size"]
    if values.get("moe_router_num_groups") == 1:
        values["moe_router_num_groups"] = values["moe_router_group_topk"] = 0
    model = ModelConfig(family=family, add_qkv_bias=family == "qwen2", **_typed(values, origin))
    for problem in model_problems(model):
        raise CheckpointError(f"{origin}: {problem}")
    return model


def _default(name: str, theirs: Mapping[str, Any], origin: str) -> Any:
    if name == "head_dim" and theirs.get("hidden_size") and theirs.get("num_attention_heads"):
        return theirs["hidden_size"] // theirs["num_attention_heads"]
    if name == "num_key_value_heads" and theirs.get("num_attention_heads"):
        return theirs["num_attention_heads"]
    if name == "intermediate_size" and theirs.get("num_experts") and not theirs.get("first_k_dense_replace"):
        return theirs.get("moe_intermediate_size")
    if name not in _DEFAULTS:
        raise CheckpointError(f"{origin}: {name} is missing; add it as the model was trained")
    return _DEFAULTS[name]


def _typed(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Numbers as our fields have them. JSON writes 600000 for 600000.0."""
    defaults = ModelConfig()
    typed = {}
    for name, value in values.items():
        kind = type(getattr(defaults, name))
        good = (
            isinstance(value, int | float) and not isinstance(value, bool)
            if kind is float
            else type(value) is kind
        )
        if not good:
            raise CheckpointError(
                f"{origin}: the value {value!r} for {name} is no {kind.__name__}; correct it"
            )
        typed[name] = kind(value)
    return typed


def hf_config(model: ModelConfig, base: Mapping[str, Any], torch_dtype: str) -> dict[str, Any]:
    """``config.json`` of ``model``: ``base`` (the config it once came with, or empty) with what we know put
    in.

    Raises:
        CheckpointError: ``base`` is another family's, or the shared experts have a width that no config can
        say.
    """
    if base and family_of(base, "config.json to carry over") != model.family:
        raise CheckpointError(
            f"config.json to carry over is of {base['architectures']} but the checkpoint is a {model.family}; "
            "name the folder the model came from"
        )
    config: dict[str, Any] = {
        "architectures": [name for name, family in ARCHITECTURES.items() if family == model.family],
        "model_type": _MODEL_TYPES[model.family],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **base,
    }
    for ours, name in _FIELDS[model.family].items():
        config[name] = getattr(model, ours)
    if config.get("n_group") == 0:
        # one group of all experts is how the format says that there are none
        config |= {"n_group": 1, "topk_group": 1}
    config["torch_dtype"] = torch_dtype
    config.pop("dtype", None)
    if isinstance(config.get("rope_parameters"), dict):
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": model.rotary_base}
    if model.family == "qwen2":
        return config
    return config | _bailing_settings(model)


def _bailing_settings(model: ModelConfig) -> dict[str, Any]:
    """What BailingMoe configs say besides, so that engines compute what was trained."""
    shared, width = model.moe_shared_expert_intermediate_size, model.moe_ffn_hidden_size
    if model.is_moe and shared % width:
        raise CheckpointError(
            f"moe_shared_expert_intermediate_size={shared} must be a multiple of moe_ffn_hidden_size={width}: "
            "the format counts shared experts; train with a multiple"
        )
    return {
        "num_shared_experts": shared // width if model.is_moe else 0,
        "moe_shared_expert_intermediate_size": width,
        # engines that take it at its word would make the one weight of a top-1 model 1
        "norm_topk_prob": model.moe_router_topk > 1,
        "router_dtype": model.moe_router_dtype,
        "use_rmsnorm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    }


def config_class_files(config: dict[str, Any]) -> dict[str, str]:
    """Code files that let transformers and vLLM read ``config``, which gets the ``auto_map`` that names them.

    None where the class is built in, or where the model's own code was carried over. transformers runs
    them with ``trust_remote_code``; there is nothing in them but a name.
    """
    if config["model_type"] not in ("bailing_moe", "bailing_moe_v2") or "auto_map" in config:
        return {}
    module = f"configuration_{config['model_type']}"
    config["auto_map"] = {"AutoConfig": f"{module}.BailingMoeConfig"}
    return {f"{module}.py": _CONFIG_CLASS.format(model_type=config["model_type"])}
