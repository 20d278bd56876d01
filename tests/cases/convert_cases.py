"""What a Hugging Face folder's config.json says: read as it is meant, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ring.checkpoint.convert.hf_config import hf_config, model_config
from megatron_ring.config.load import preset_config
from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import CheckpointError
from tests.cases import FOLDER, Row


def _patch(case: str) -> dict[str, Any]:
    return json.loads((FOLDER / case / "config_patch.json").read_text(encoding="utf-8"))


def _as(model: ModelConfig, config: dict[str, Any]) -> str:
    """Whether ``config`` is read as ``model``, or the first words of the line that refuses it."""
    try:
        read = model_config(config, "config.json")
    except CheckpointError as error:
        return f"refused: {error}".replace("config.json: ", "")[:45]
    return "the same model" if read == model else f"another model: {read}"


def rows() -> Iterator[Row]:
    case = "convert_aliases"
    patch = _patch(case)
    lite = preset_config("ring_lite").model
    named = hf_config(replace(lite, moe_shared_expert_intermediate_size=1408), {}, "bfloat16")
    aliased = {k: v for k, v in named.items() if k not in ("num_experts", "num_shared_experts")} | patch
    got = _as(model_config(named, "config.json"), aliased)
    yield Row(case=case, given=json.dumps(patch), expected="the same model", got=got)

    case = "convert_rope_parameters"
    mini = hf_config(preset_config("ring_mini_v2").model, {}, "bfloat16")
    model = model_config(mini, "config.json")
    without_base = {k: v for k, v in mini.items() if k != "rope_theta"}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": mini["rope_theta"]}}
    refused = "refused: rope_parameters={'rope_type': 'yarn'"
    for said, expected in ((_patch(case), refused), (plain, "the same model")):
        yield Row(case=case, given=json.dumps(said), expected=expected, got=_as(model, without_base | said))
