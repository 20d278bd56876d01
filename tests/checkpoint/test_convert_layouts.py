"""Converted weights at every layout: the model computes what the Hugging Face tensors say, publishes them,
and saves them.

The reference is a forward pass written from the paper's description (``reference_model.py``). One spawn per
world size runs all its layouts; all start from one conversion per model.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.hf_config import read_hf_config
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.plain_forward import plain_logits
from megatron_ring.checkpoint.convert.publish import Assembler, Part
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.config.load import config_from_mapping
from tests.helpers.checkpoint.convert_cases import (
    LAYOUT_MODELS,
    LAYOUTS,
    Silent,
    assert_same,
    layout_name,
    layout_settings,
    prompt,
    read_hf,
    run_tool,
    write_hf,
)
from tests.helpers.checkpoint.reference_model import logits_TV, mtp_logits_TV
from tests.helpers.parallel.spawning import ROOT, several_worlds, spawn
from tests.helpers.parallel.watching import assert_ended_well
from tests.helpers.paths import python_path

pytestmark = several_worlds

CASES = [
    pytest.param(
        model,
        world,
        layout,
        id=layout_name(model, world, layout),
        marks=[pytest.mark.slow] if world >= 4 else [],
    )
    for world, models in LAYOUTS.items()
    for model, layouts in models.items()
    for layout in layouts
]


def model_of(name: str):
    return config_from_mapping(layout_settings(name)).model


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Per model, ``hf`` and ``megatron``, converted at another padding than most layouts have."""
    root = tmp_path_factory.mktemp("convert")
    for name in LAYOUT_MODELS:
        (root / name).mkdir()
        source = write_hf(model_of(name), root / name / "hf", max_file_bytes=500_000)
        hf_to_megatron(
            source, root / name / "megatron", Options(max_file_bytes=300_000), Silent(), divisible_by=6
        )
    return root


@pytest.fixture(scope="module")
def run_world(converted: Path):
    # a failed spawn fails every test of its world once, without another spawn
    spawned = cache(
        lambda world: spawn(world, "tests.helpers.checkpoint.convert_worker", str(world), str(converted))
    )

    def run(world: int) -> Path:
        assert_ended_well(spawned(world))
        return converted

    return run


@cache
def expected_logits(folder: Path, has_mtp: bool) -> list[torch.Tensor]:
    tensors, config = read_hf(folder), read_hf_config(folder)
    tokens_T = torch.tensor(prompt(config["vocab_size"]))
    whole = [logits_TV(tensors, config, tokens_T)]
    return [*whole, mtp_logits_TV(tensors, config, tokens_T)] if has_mtp else whole


@pytest.mark.parametrize(("model", "world", "layout"), CASES)
def test_logits_are_the_reference_models(model: str, world: int, layout: dict[str, int], run_world):
    folder = run_world(world)
    found = torch.load(folder / layout_name(model, world, layout) / "logits.pt", weights_only=True)
    expected = expected_logits(folder / model / "hf", model == "v2_mtp")
    assert len(found) == len(expected)
    for own_TV, reference_TV in zip(found, expected, strict=True):
        assert reference_TV.std() > 0.1, "logits too flat to tell anything"
        gap = (own_TV - reference_TV).abs().max() / reference_TV.abs().max()
        assert gap < 1e-5, f"{gap:.1e}"


@pytest.mark.parametrize(("model", "world", "layout"), CASES)
def test_published_parts_make_the_same_tensors(model: str, world: int, layout: dict[str, int], run_world):
    folder = run_world(world)
    assembler = Assembler(tensor_map(model_of(model), model_of(model).vocab_size))
    whole = {}
    for rank in range(world):
        path = folder / layout_name(model, world, layout) / f"parts.{rank}.pt"
        for name, offset, data in torch.load(path, weights_only=True):
            tensor = assembler.add(Part(name, Box(offset, tuple(data.shape)), data))
            if tensor is not None:
                whole[name] = tensor
    assert assembler.missing() == []
    assert_same(whole, read_hf(folder / model / "hf"))


@pytest.mark.parametrize(("model", "world", "layout"), CASES)
def test_a_runs_checkpoint_exports_to_the_same_tensors(
    model: str, world: int, layout: dict[str, int], run_world, tmp_path
):
    folder = run_world(world)
    saved = folder / layout_name(model, world, layout) / "saved"
    back = megatron_to_hf(saved, tmp_path / "hf", Options(verify=True), Silent())
    assert_same(read_hf(back), read_hf(folder / model / "hf"))
    assert read_hf_config(back) == read_hf_config(folder / model / "hf")


@pytest.mark.parametrize("model", LAYOUT_MODELS)
def test_the_tools_own_forward_pass_is_the_reference_models(model: str, converted: Path):
    folder = converted / model / "hf"
    tokens_T = torch.tensor(prompt(model_of(model).vocab_size))
    found_TV = plain_logits(SafetensorsFolder(folder), model_of(model), tokens_T)
    reference_TV = expected_logits(folder, model == "v2_mtp")[0]
    assert (found_TV - reference_TV).abs().max() / reference_TV.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("hf-to-megatron", ["--dtype", "bf16"]),
        ("megatron-to-hf", ["--dtype", "bf16"]),
        ("megatron-to-hf", ["--dtype", "bf16", "--normalize-head"]),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else words,
)
def test_check_logits_expects_what_the_conversion_was_asked_to_change(
    command: str, changes: list[str], converted: Path, tmp_path: Path
):
    """Weights that were cast, or a head that was normalised and rounded, are no other model."""
    source = converted / "v1" / ("hf" if command == "hf-to-megatron" else "megatron")
    done = run_tool(command, source, tmp_path / "to", *changes, "--check-logits")
    assert done.returncode == 0 and "logits agree" in done.stdout, done.stderr


def test_check_logits_tells_the_same_model_from_another(converted: Path, tmp_path: Path):
    """In processes of their own: the check opens a session."""
    tool, source = ROOT / "tools/convert_checkpoint.py", converted / "v1/hf"
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    words = [str(tool), "hf-to-megatron", str(source), str(tmp_path / "m"), "--check-logits"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "logits agree: log p over 32 tokens x 250" in done.stdout, done.stderr
    other = write_hf(dataclasses.replace(model_of("v1"), norm_head=False), tmp_path / "other")
    code = (
        "from pathlib import Path; from megatron_ring.checkpoint.convert.check_logits import check_logits; "
        f"check_logits(Path({str(other)!r}), Path({str(tmp_path / 'm')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "compute different models: log p differs by" in done.stderr
