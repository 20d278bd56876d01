"""Convert between ``config.json`` of a Hugging Face folder and our model configuration.

A family's file says what its keys mean (:mod:`megatron_ring.families`). A setting that this project cannot
compute is refused by name; a missing one has the default of the published configuration class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_ring.checkpoint.convert.hf_rules import (
    LARGEST_SIZE,
    is_size,
    refuse_what_is_not_computed,
    said_or_default,
    shown,
    under_one_name,
)
from megatron_ring.checkpoint.plain_files import read_json
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.rules.model import export_problems, model_problems
from megatron_ring.errors import CheckpointError
from megatron_ring.families import ARCHITECTURES, FAMILIES, Family

TRAINING_ONLY = frozenset(
    {
        "make_vocab_size_divisible_by", "mtp_loss_scaling_factor", "moe_router_bias_update_rate",
        "moe_aux_loss_coeff", "moe_z_loss_coeff", "freeze_moe_router", "moe_router_warmup_iters",
        "transformer_impl", "moe_router_dtype",
    }
)  # fmt: skip
"""Our fields that say how a model is trained, not what it computes: no config.json holds them."""
_EXPERTS_ONLY = frozenset({"moe_router_topk", "moe_ffn_hidden_size"})
"""Our fields that mean nothing in a dense model, and that no family of such models implies."""

_GROUPS = ("moe_router_num_groups", "moe_router_group_topk")

_MAX_BYTES = 10_000_000
_LARGEST = {"num_layers": 10_000, "num_experts": 100_000, "mtp_num_layers": 100}
_MOST_EXPERTS = 10_000_000
"""Experts of all layers together."""

_CONFIG_CLASS = '''"""Configuration class of this model; every setting is in config.json."""

from transformers import PretrainedConfig


class {name}(PretrainedConfig):
    model_type = "{model_type}"
'''


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json``.

    Raises:
        CheckpointError: it is missing, no plain file, or no JSON object.
    """
    return read_json(folder / "config.json", "name a Hugging Face model folder", max_bytes=_MAX_BYTES)


def family_of(config: Mapping[str, Any], origin: str) -> Family:
    """Which of our families ``architectures`` names.

    Raises:
        CheckpointError: none, or ``model_type`` says another.
    """
    named = config.get("architectures")
    known = [n for n in named if isinstance(n, str) and n in ARCHITECTURES] if isinstance(named, list) else []
    if not named:
        raise CheckpointError(
            f"{origin}: architectures is missing; add the model's class, one of {', '.join(ARCHITECTURES)}"
        )
    if not known:
        raise CheckpointError(
            f"{origin}: architectures={shown(named)} is another family's model; convertible are "
            f"{', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[known[0]]
    said = config.get("model_type")
    if said is not None and said not in family.model_types:
        raise CheckpointError(
            f"{origin}: model_type={shown(said)} is another family's than architectures={known[0]}, "
            f"which is {' or '.join(family.model_types)}; correct the one that is wrong"
        )
    return family


def model_config(config: Mapping[str, Any], origin: str) -> ModelConfig:
    """Our configuration of the model that ``config`` (of file ``origin``) describes.

    Raises:
        CheckpointError: another family, a missing or unsupported setting, or sizes that fit no model.
    """
    family = family_of(config, origin)
    theirs = under_one_name(config, family, origin)
    refuse_what_is_not_computed(theirs, family, origin)
    values = {
        ours: _typed(ours, name, said_or_default(name, theirs, family, origin), origin)
        for ours, name in family.fields.items()
    }
    for ours, name in family.opposites.items():
        values[ours] = not _typed(ours, name, said_or_default(name, theirs, family, origin), origin)
    if family.shared_experts_key:
        values["moe_shared_expert_intermediate_size"] = _shared_width(
            family.shared_experts_key, theirs, values, family, origin
        )
    if values.get("moe_router_num_groups") == 1:
        values["moe_router_num_groups"] = values["moe_router_group_topk"] = 0
    model = ModelConfig(family=family.name, **{**family.implied, **values})
    layers = model.num_layers + model.mtp_num_layers
    if layers * model.num_experts > _MOST_EXPERTS:
        raise CheckpointError(
            f"{origin}: num_experts={model.num_experts} in each of {layers} layers is more than any model has; "
            "correct it"
        )
    for problem in model_problems(model):
        raise CheckpointError(f"{origin}: {_in_their_words(problem, family)}; correct it")
    return model


def _in_their_words(problem: str, family: Family) -> str:
    """The rule of ``problem`` with the keys of config.json; its remedy is a flag, which a conversion has not.

    Example: ``"num_query_groups=3 must divide num_attention_heads=4; try 2 or 4"`` becomes
    ``"num_key_value_heads=3 must divide num_attention_heads=4"``.
    """
    rule = problem.split("; ")[0]
    for ours, theirs in family.fields.items():
        rule = re.sub(rf"\b{ours}(?==)", theirs, rule)
    opposites = [
        f" ({theirs} says the opposite of {ours})"
        for ours, theirs in family.opposites.items()
        if ours in rule
    ]
    return rule + "".join(opposites)


def defaults_taken(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Which settings of the model ``config`` leaves out, and the published class's default of each.

    Example: ``{"n_group": 8, "topk_group": 4}``.
    """
    family = family_of(config, origin)
    theirs = under_one_name(config, family, origin)
    return {
        name: value
        for name, value in family.defaults.items()
        if name not in theirs and value is not None and name != "initializer_range"
    }


def _shared_width(
    key: str, theirs: Mapping[str, Any], values: dict[str, Any], family: Family, origin: str
) -> int:
    """Width of all shared experts together: engines read the width of one from its own key if that is there."""
    shared = said_or_default(key, theirs, family, origin)
    each = theirs.get("moe_shared_expert_intermediate_size")
    each = values["moe_ffn_hidden_size"] if each is None else each
    for name, value in ((key, shared), ("moe_shared_expert_intermediate_size", each)):
        if value != 0 and not is_size(value):
            raise CheckpointError(f"{origin}: the value {shown(value)} for {name} is no int; correct it")
    return shared * each


def _typed(ours: str, name: str, value: Any, origin: str) -> Any:
    """``value`` as our field has it (JSON writes 600000 for 600000.0), if a model can have it at all."""
    default = getattr(ModelConfig(), ours)
    kind = type(default)
    good = type(value) in (int, float) if kind is float else type(value) is kind
    if not good:
        raise CheckpointError(
            f"{origin}: the value {shown(value)} for {name} is no {kind.__name__}; correct it"
        )
    largest = 1e30 if kind is float else _LARGEST.get(ours, LARGEST_SIZE)
    # NaN fails the comparison too
    if kind in (int, float) and not abs(value) <= largest:
        raise CheckpointError(f"{origin}: {name}={shown(value)} is beyond what any model has; correct it")
    choices = get_args(get_type_hints(ModelConfig)[ours])
    if kind is str and value not in choices:
        raise CheckpointError(
            f"{origin}: {name}={shown(value)} is not supported; it must be {' or '.join(choices)}"
        )
    return kind(value)


def hf_config(
    model: ModelConfig,
    base: Mapping[str, Any],
    torch_dtype: str,
    token_ids: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """``config.json`` of ``model``: ``base`` (the config it once came with, or empty) with our settings written
    into it.

    ``token_ids`` are the tokenizer's ``pad_token_id`` and ``eos_token_id``, for a new config: the published
    classes' defaults may exceed a smaller vocabulary, and null means that there is none.

    Raises:
        CheckpointError: ``base`` is another family's or has tokens beyond the vocabulary, or the family's
        config cannot express a setting of ``model``.
    """
    family = FAMILIES[model.family]
    if base and family_of(base, "config.json to carry over") != family:
        raise CheckpointError(
            f"config.json to carry over is of {base['architectures']} but the checkpoint is a {model.family}; "
            "name the folder the model came from"
        )
    _refuse_what_cannot_be_said(model)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **({"pad_token_id": None, "eos_token_id": None, **(token_ids or {})} if not base else {}),
        **{name: value for name, value in base.items() if name not in (*family.aliases, "rotary_dim")},
    }
    config |= {name: getattr(model, ours) for ours, name in family.fields.items()}
    config |= {name: not getattr(model, ours) for ours, name in family.opposites.items()}
    if model.moe_router_num_groups == 0:
        # the formats write "no groups" as one group of all experts
        config |= {family.fields[ours]: 1 for ours in _GROUPS if ours in family.fields}
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        # one word per layer: transformers loads no model that has another number of them
        config["layer_types"] = (
            [kinds[0]] * model.num_layers if kinds.count(kinds[0]) == len(kinds) else kinds
        )
    config["torch_dtype"] = torch_dtype
    config.pop("dtype", None)
    for block in ("rope_parameters", "rope_scaling"):
        rope = config.get(block)
        if isinstance(rope, dict):
            own = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
            config[block] = {name: own.get(name, value) for name, value in rope.items()}
    config |= family.written
    if family.shared_experts_key:
        config |= _shared_experts(family.shared_experts_key, model)
    if family.keeps_score_of_one:
        # engines that normalise would set the only routing weight of a top-1 model to 1
        config["norm_topk_prob"] = model.moe_router_topk > 1
    for name in ("pad_token_id", "eos_token_id"):
        _refuse_tokens_beyond(name, config.get(name), model.vocab_size)
    if base:
        _refuse_another_model(config, model)
    return config


def _refuse_another_model(config: Mapping[str, Any], model: ModelConfig) -> None:
    """A config.json that is copied may have settings beside ours: check it by the rules for reading one.

    Raises:
        CheckpointError: it describes another model than ``model``.
    """
    origin = "config.json to carry over"
    try:
        again = model_config(config, origin)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the weights were trained without: correct a copy of it and name its folder with --hf-files"
        ) from None
    ungrouped = _GROUPS if model.moe_router_num_groups < 2 else ()
    family = FAMILIES[model.family]
    for ours, name in {**family.fields, **family.opposites}.items():
        assert ours in ungrouped or getattr(again, ours) == getattr(model, ours), f"{name} was not put in"


def _refuse_what_cannot_be_said(model: ModelConfig) -> None:
    """
    Raises:
        CheckpointError: the family's config and code describe another model than this one.
    """
    family = FAMILIES[model.family]
    for problem in export_problems(model):
        raise CheckpointError(problem)
    unsaid = {field.name for field in fields(model)} - _accounted_for(family)
    assert not unsaid, f"{family.name} does not say what becomes of {unsaid}"


def _accounted_for(family: Family) -> set[str]:
    otherwise = {
        "family",
        *(("moe_shared_expert_intermediate_size",) if family.shared_experts_key else ()),
    }
    unused = set() if family.has_experts else _EXPERTS_ONLY
    return {*family.fields, *family.opposites, *family.implied, *TRAINING_ONLY, *otherwise, *unused}


def _refuse_tokens_beyond(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, list) else [value]:
        # -1 is how some configs say that there is none
        if type(token) is int and token != -1 and not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{name}={token} of config.json to carry over is not below vocab_size={vocab_size}, so that no "
                "engine loads the model; name the folder of the model's tokenizer with --hf-files"
            )


def _shared_experts(key: str, model: ModelConfig) -> dict[str, Any]:
    """The shared experts as a family that counts them writes them."""
    shared, width = model.moe_shared_expert_intermediate_size, model.moe_ffn_hidden_size
    return {
        key: shared // width if model.is_moe else 0,
        "moe_shared_expert_intermediate_size": width,
    }


def config_class_files(config: dict[str, Any]) -> dict[str, str]:
    """Code files that let transformers and vLLM read ``config``, which gets the ``auto_map`` that names them.

    None if the class is built in, or if the model's own code was copied. transformers runs them with
    ``trust_remote_code``; they define nothing but a name.
    """
    name = family_of(config, "config.json").config_class
    if name is None or "auto_map" in config:
        return {}
    module = f"configuration_{config['model_type']}"
    config["auto_map"] = {"AutoConfig": f"{module}.{name}"}
    return {f"{module}.py": _CONFIG_CLASS.format(name=name, model_type=config["model_type"])}
