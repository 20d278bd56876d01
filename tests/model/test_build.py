"""The published models have the published number of parameters; what cannot be built says so in a line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ring.config.load import preset_config
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import count_parameters
from megatron_ring.config.presets import PRESETS
from megatron_ring.errors import ConfigError
from megatron_ring.model.build import RingModel
from megatron_ring.model.moe import RingExperts
from megatron_ring.model.spec import layer_spec
from megatron_ring.model.translate import transformer_config
from megatron_ring.runtime.session import open_session


def build_without_allocating(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> RingModel:
    parallel = preset_config("ring_lite").parallel
    with open_session(parallel, seed=1) as session, torch.device("meta"):
        # Megatron's linears name the current device themselves
        monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("meta"))
        built = RingModel(model, parallel, transformer_config(model, parallel), session.topology)
        monkeypatch.undo()
    assert all(parameter.is_meta for parameter in built.parameters())
    return built


def counts(built: RingModel) -> tuple[int, int]:
    """(total, active) of the built tensors: a token visits topk of num_experts experts."""
    total = sum(parameter.numel() for parameter in built.parameters())
    routed = sum(
        parameter.numel()
        for module in built.modules()
        if isinstance(module, RingExperts)
        for parameter in module.parameters()
    )
    model = built.model
    return total, total - (routed - routed * model.moe_router_topk // model.num_experts if routed else 0)


def test_ring_lite_is_16_8_billion_parameters_of_which_2_75_are_active(monkeypatch):
    model = preset_config("ring_lite").model
    built = build_without_allocating(model, monkeypatch)
    assert counts(built) == (16_801_974_272, 2_753_153_024)
    counted = count_parameters(model)
    assert (counted.total, counted.active) == counts(built)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ring_lite"])
def test_the_count_from_the_config_is_the_count_of_the_built_tensors(preset, monkeypatch):
    model = preset_config(preset).model
    counted = count_parameters(model)
    assert counts(build_without_allocating(model, monkeypatch)) == (counted.total, counted.active)


@pytest.mark.parametrize("preset", ["ring_lite", "ring_mini_v2"])
def test_multi_token_prediction_layers_are_counted_as_built(preset, monkeypatch):
    model = replace(preset_config(preset).model, mtp_num_layers=1)
    assert counts(build_without_allocating(model, monkeypatch))[0] == count_parameters(model).total


def test_transformer_engine_without_transformer_engine_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)
    model = replace(preset_config("ring_lite_tiny").model, transformer_impl="transformer_engine")
    with pytest.raises(ConfigError) as caught:
        layer_spec(model, is_moe=True)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("transformer_impl=transformer_engine", "does not import", "use --transformer-impl local"):
        assert part in line
