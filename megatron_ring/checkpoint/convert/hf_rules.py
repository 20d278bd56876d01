"""The rules of ``config.json``: settings under one name, their defaults, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ring.errors import CheckpointError
from megatron_ring.families import Family
from megatron_ring.families.shared import HARMLESS

LARGEST_SIZE = 2**31
_SAYABLE_IN_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_PASSED_OVER = frozenset(key for keys in HARMLESS.values() for key in keys)


def short(text: str) -> str:
    """One line of ``text``, cut."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


def shown(value: Any) -> str:
    """A JSON value, shortened for an error line."""
    try:
        return short(repr(value))
    except RecursionError:
        return "something nested deeply"


def under_one_name(config: Mapping[str, Any], family: Family, origin: str) -> dict[str, Any]:
    """``config`` with every setting at its own key: aliases and keys inside the rope's settings included."""
    theirs = dict(config)

    def put(name: str, value: Any, said_by: str) -> None:
        if theirs.get(name, value) != value:
            raise CheckpointError(
                f"{origin}: {name}={shown(theirs[name])} but {said_by}={shown(value)}; remove the wrong one"
            )
        theirs[name] = value

    for alias, name in family.aliases.items():
        if alias in theirs:
            put(name, theirs.pop(alias), alias)
    for block in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(block)
        if rope is None:
            continue
        if not _is_plain_rope(rope):
            raise CheckpointError(
                f"{origin}: {block}={shown(rope)} is not supported; only rope_type 'default' is computed"
            )
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                put(name, rope[name], f"{name} in {block}")
    rotated = theirs.pop("rotary_dim", None)
    if rotated is not None:
        width = said_or_default("head_dim", theirs, family, origin)
        if not is_size(rotated) or not is_size(width):
            raise CheckpointError(
                f"{origin}: rotary_dim={shown(rotated)} is no part of head_dim={shown(width)}; correct it"
            )
        # channels, where partial_rotary_factor is a share of them
        put("partial_rotary_factor", rotated / width, f"rotary_dim={rotated} of head_dim={width}, a share")
    return theirs


def is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST_SIZE


def _is_plain_rope(rope: Any) -> bool:
    """Is the rope unscaled? ``default`` says so explicitly."""
    if not isinstance(rope, dict):
        return False
    kinds = {rope.get("rope_type", "default"), rope.get("type", "default")} if _hashable(rope) else set()
    unread = [name for name in rope if name not in _SAYABLE_IN_ROPE and rope[name] is not None]
    return kinds == {"default"} and not unread


def _hashable(rope: dict[str, Any]) -> bool:
    return all(isinstance(rope.get(name), str | None) for name in ("rope_type", "type"))


def refuse_what_is_not_computed(theirs: dict[str, Any], family: Family, origin: str) -> None:
    """
    Raises:
        CheckpointError: a setting has a value that is not supported, or a key is unknown.
    """
    if family.keeps_score_of_one and theirs.get("num_experts_per_tok") == 1:
        theirs.pop("norm_topk_prob", None)
    for name, allowed in family.only.items():
        if name in theirs and theirs[name] not in allowed:
            wanted = "absent" if allowed[0] is None else repr(allowed[0])
            raise CheckpointError(
                f"{origin}: {name}={shown(theirs[name])} is not supported; it must be {wanted}"
            )
    kinds = theirs.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise CheckpointError(
            f"{origin}: layer_types={shown(kinds)} is not supported; every layer must be 'full_attention'"
        )
    layers = said_or_default("num_hidden_layers", theirs, family, origin)
    if kinds is not None and len(kinds) != layers:
        raise CheckpointError(
            f"{origin}: layer_types names {len(kinds)} layers but num_hidden_layers={shown(layers)}; correct it"
        )
    window = theirs.get("sliding_window")
    off = (False, None) if family.window_is_off_by_default else (False,)
    if window is not None and theirs.get("use_sliding_window") not in off:
        raise CheckpointError(
            f"{origin}: sliding_window={shown(window)} is not supported; without a window it is null, or "
            "use_sliding_window is false"
        )
    for name, value in theirs.items():
        if not is_known(family, name) and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{origin}: {short(name)}={shown(value)} is not known here and may change what a "
                f"{family.name} computes; if it does not, remove it from a copy of config.json"
            )


def said_or_default(name: str, theirs: Mapping[str, Any], family: Family, origin: str) -> Any:
    """The value of ``name`` in the published class: the one given, or the default.

    Null is refused for a number, except where it has a meaning; for a switch it means off.
    """
    default = family.defaults.get(name)
    value = theirs.get(name, default)
    if value is None and isinstance(default, bool):
        return False
    if value is None and name in (family.shared_experts_key, family.fields.get("mtp_num_layers")):
        return 0
    if value is None and name == "head_dim":
        width = said_or_default("hidden_size", theirs, family, origin)
        heads = said_or_default("num_attention_heads", theirs, family, origin)
        if is_size(width) and is_size(heads):
            return width // heads
    if value is None and name == "intermediate_size" and not theirs.get("first_k_dense_replace"):
        # no layer has this width, so any value will do
        value = theirs.get("moe_intermediate_size")
    null_is_heads = family.null_kv_heads_are_query_heads or name not in theirs
    if value is None and name == "num_key_value_heads" and null_is_heads:
        return said_or_default("num_attention_heads", theirs, family, origin)
    if value is None:
        raise CheckpointError(f"{origin}: {name} is missing; add it as the model was trained")
    return value


def is_known(family: Family, key: str) -> bool:
    """Is the key read, checked, or known to change nothing? Keys that begin with ``_`` are transformers' own
    notes."""
    return (
        key in family.defaults
        or key in family.only
        or key in family.aliases
        or key in family.fields.values()
        or key in family.opposites.values()
        or key in _PASSED_OVER
        or key.startswith("_")
    )
