"""A model family as data: everything that the rest of the package needs to know of one.

Words: *ours* are the fields of ``ModelConfig``, which are Megatron's; *theirs* are the keys of a ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """What a family calls its tensors in Hugging Face's folders.

    Names without a default differ between families. Names of a layer's parts follow ``layer``; a linear's name
    has no ``.weight`` or ``.bias``. Example: ``names.layer.format(3) + names.qkv[0] + ".weight"`` is
    ``"model.layers.3.self_attn.q_proj.weight"`` for Qwen.
    """

    embedding: str
    qkv: tuple[str, ...]
    """Query, key and value; or one tensor of all queries, all keys, all values in this order."""
    attention_output: str
    q_norm: str | None = None
    """Norm of each query head; None in a family that has none."""
    k_norm: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    """The output layer; a model with tied embeddings has no such tensor."""
    layer: str = "model.layers.{}."
    """Multi-token-prediction layers are counted after the model's own."""
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp."
    """Prefix of a dense layer's MLP, whose parts are ``gate_up_down``."""
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "mlp.gate"
    expert_bias: str = "mlp.gate.expert_bias"
    """Added to the scores for the choice of experts alone; the tensor's whole name."""
    expert: str = "mlp.experts.{}."
    """Prefix of one expert's MLP."""
    shared_experts: str = "mlp.shared_experts."
    """Prefix of the MLP that every token passes."""
    mtp_norms: tuple[str, ...] = ("enorm", "hnorm", "final_layernorm")
    """Norms of a multi-token-prediction layer; Megatron calls them the same."""
    mtp_projection: str = "eh_proj"
    """Of (embedding, hidden); Megatron calls it the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """A rule between two settings: if ``when`` holds, ``then`` must hold.

    Example: ``Needs(when=("moe_router_topk", 1), then=("moe_router_pre_softmax", True), because="...")``.
    """

    when: tuple[str, Any]
    """Our field and its value."""
    then: tuple[str, Any]
    """Our field and the value it must have."""
    because: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A published architecture: its config.json, its tensors, its known models and their rules.

    Each key of a config.json is one of four kinds: read into a field of ours (``fields``, ``opposites``); right at a
    few values only, because this project computes the setting in one way (``only``); without effect on what the model
    computes (:data:`megatron_ring.families.shared.HARMLESS`); or unknown, and then refused unless it is null,
    false or empty.
    """

    name: str
    """Its name in ``--family``."""
    architecture: str
    """Its class, as ``architectures`` in config.json names it."""
    model_types: tuple[str, ...]
    """Allowed values of ``model_type``; the first is written."""
    fields: Mapping[str, str]
    """Our field -> their key, where the value is the same."""
    opposites: Mapping[str, str] = field(default_factory=dict[str, str])
    """Our switch -> their key that says the opposite."""
    defaults: Mapping[str, Any]
    """Their key -> the published class's default; a key without one is required."""
    only: Mapping[str, tuple[Any, ...]]
    """Their key -> the values that are supported; if it is absent, the first is assumed."""
    implied: Mapping[str, Any]
    """Our field -> the only value of it that this family's config.json can express."""
    written: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Their key -> a value that is written for every model."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Another name of a key -> the key."""
    tensors: TensorNames
    presets: Mapping[str, Mapping[str, Any]]
    """Name of a model -> our flat settings that differ from the defaults; the family itself is added."""
    has_experts: bool
    """Do all its models have routed experts, or none?"""
    has_mtp: bool = False
    """May its models have multi-token-prediction layers?"""
    needs: tuple[Needs, ...] = ()
    """Rules between our settings that its models must keep."""
    shared_experts_key: str | None = None
    """The config.json key for the number of shared experts, where ours has the width of all together."""
    keeps_score_of_one: bool = False
    """Its gate weighs the only expert of a token by its score, whatever ``norm_topk_prob`` says."""
    null_kv_heads_are_query_heads: bool = False
    """``num_key_value_heads`` null means as many as query heads; elsewhere null is a mistake, and only absent means so."""
    window_is_off_by_default: bool = True
    """Its class has a switch ``use_sliding_window``, off unless a config says otherwise."""
    config_class: str | None = None
    """Name of a configuration class to write beside config.json; None where transformers has the class built in."""
