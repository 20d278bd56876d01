"""A family is one file: the registry finds it, and everything else takes it from there."""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from megatron_ring.config.load import preset_config
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.settings import settings
from megatron_ring.families import ARCHITECTURES, FAMILIES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ring"

NEW_FAMILY = """
from dataclasses import replace
from megatron_ring.families.qwen2 import FAMILY as QWEN2

FAMILY = replace(
    QWEN2,
    name="toy",
    architecture="ToyForCausalLM",
    model_types=("toy",),
    tensors=replace(QWEN2.tensors, head="model.head", attention_output="self_attn.out"),
    presets={"toy_tiny": {**QWEN2.presets["qwen2_tiny"], "num_layers": 2}},
)
"""
USES = """
import json
from megatron_ring.checkpoint.convert.hf_config import hf_config, model_config
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.config.load import load_config
from megatron_ring.config.model_stats import count_parameters
from megatron_ring.config.check import validate

config = load_config(["--preset", "toy_tiny", "--family", "toy"])
validate(config, 1)
theirs = hf_config(config.model, {}, "float32")
assert theirs["architectures"] == ["ToyForCausalLM"]
assert model_config(theirs, "config.json").family == "toy"
mapping = tensor_map(config.model, config.model.vocab_size)
assert "model.head.weight" in mapping.names and "model.layers.1.self_attn.out.weight" in mapping.names
print(json.dumps({"layers": config.model.num_layers, "parameters": count_parameters(config.model).total}))
"""


def test_a_new_file_is_a_new_family(tmp_path: Path):
    """Flag, preset, rules, counting, config.json and tensors, without a line elsewhere."""
    shutil.copytree(PACKAGE, tmp_path / "megatron_ring", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "megatron_ring/families/toy.py").write_text(NEW_FAMILY)
    done = subprocess.run([sys.executable, "-c", USES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == 2 and found["parameters"] > 100_000


def test_no_other_file_names_a_family():
    names = {
        *FAMILIES,
        *ARCHITECTURES,
        *(kind for family in FAMILIES.values() for kind in family.model_types),
    }
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} says {node.value!r}"
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE / "families"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    # the default of --family has to be one
    assert [line for line in found if not line.startswith("config/model.py")] == []
    assert len(found) == 1


def test_families_are_choices_of_the_setting():
    assert settings()["family"].choices == tuple(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_family_speaks_of_fields_that_exist_and_of_each_once(family):
    ours = {field.name for field in fields(ModelConfig)}
    said = [*family.fields, *family.opposites, *family.implied]
    assert len(said) == len(set(said)) and set(said) <= ours
    assert {name for rule in family.needs for name, _ in (rule.when, rule.then)} <= ours
    keys = {*family.fields.values(), *family.opposites.values()}
    assert not keys & family.only.keys() and set(family.aliases.values()) <= keys | {"num_shared_experts"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_presets_of_a_family_are_models_that_its_config_can_say(family):
    assert any(name.endswith("_tiny") for name in family.presets)
    for name in family.presets:
        model = preset_config(name).model
        assert model.family == family.name and model.is_moe == family.has_experts
        assert {ours: getattr(model, ours) for ours in family.implied} == dict(family.implied)


@pytest.mark.parametrize(
    "module",
    [
        "megatron_ring.families.bailing_moe",
        "megatron_ring.families.bailing_moe_v2",
        "megatron_ring.families.qwen2",
        "megatron_ring.families.qwen3",
        "megatron_ring.families.qwen3_moe",
    ],
)
def test_a_familys_presets_are_models_of_it(module: str):
    family = import_module(module).FAMILY
    assert FAMILIES[family.name] is family and family.presets
    for name in family.presets:
        assert preset_config(name).model.family == family.name


def test_every_family_is_named_here():
    names = {path.stem for path in (PACKAGE / "families").glob("*.py")} - {"__init__", "family", "shared"}
    assert names == {
        family.split(".")[-1] for family in test_a_familys_presets_are_models_of_it.pytestmark[0].args[1]
    }
