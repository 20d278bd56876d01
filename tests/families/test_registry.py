"""A family is one file: the registry finds it, and everything else takes it from there."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_ring.config.load import preset_config
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.settings import settings
from megatron_ring.families import ARCHITECTURES, FAMILIES
from tests.helpers.paths import python_path

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
import os
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


COUNTING_FAMILY = """
from dataclasses import replace
from megatron_ring.families.bailing_moe_v2 import FAMILY as V2

KEYS = {"num_shared_experts": "n_shared_experts", "n_group": "groups", "topk_group": "groups_kept"}
KEYS["num_nextn_predict_layers"] = "mtp_depth"
FAMILY = replace(
    V2,
    name="toy",
    architecture="ToyForCausalLM",
    model_types=("toy",),
    fields={ours: KEYS.get(key, key) for ours, key in V2.fields.items()},
    defaults={KEYS.get(key, key): value for key, value in V2.defaults.items()},
    aliases={},
    shared_experts_key="n_shared_experts",
    tensors=replace(V2.tensors, expert_bias="mlp.gate.e_score_correction_bias"),
    presets={"toy_tiny": {**V2.presets["ring_mini_v2_tiny"], "moe_shared_expert_intermediate_size": 64}},
    config_class=None,
)
"""
USES_IN_ITS_OWN_WORDS = """
from dataclasses import replace
from pathlib import Path
import torch
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.hf_config import hf_config, model_config, read_hf_config
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.config.load import preset_config
from tests.helpers.checkpoint.convert_cases import Silent
from tools.make_random_checkpoint import write_random_checkpoint

model = preset_config("toy_tiny").model
ungrouped = hf_config(replace(model, moe_router_num_groups=0, moe_router_group_topk=0), {}, "float32")
assert (ungrouped["groups"], ungrouped["groups_kept"]) == (1, 1) and "n_group" not in ungrouped
assert model_config({**ungrouped, "n_shared_experts": None, "mtp_depth": None}, "c").mtp_num_layers == 0
write_random_checkpoint(model, Path("theirs"), "float32", 10**9, seed=1)
said = read_hf_config(Path("theirs"))
assert said["n_shared_experts"] == 2 and "num_shared_experts" not in said
assert model_config(said, "c").moe_shared_expert_intermediate_size == 64
step = hf_to_megatron(Path("theirs"), Path("ours"), Options(dtype=torch.bfloat16), Silent())
back = megatron_to_hf(step, Path("back"), Options(dtype=torch.bfloat16), Silent())
assert read_hf_config(back)["n_shared_experts"] == 2
for folder in (TorchDistFolder(step), SafetensorsFolder(back)):
    fp32 = {name for name, info in folder.tensors.items() if info.dtype == torch.float32}
    assert fp32 == {name for name in folder.tensors if name.endswith(("expert_bias", "correction_bias"))}
    assert len(fp32) == 3
"""


def test_a_new_family_counts_experts_and_names_its_bias_in_its_own_words(tmp_path: Path):
    shutil.copytree(PACKAGE, tmp_path / "megatron_ring", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "megatron_ring/families/toy.py").write_text(COUNTING_FAMILY)
    done = subprocess.run(
        [sys.executable, "-c", USES_IN_ITS_OWN_WORDS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("forgotten", "line"),
    [
        ('presets={"toy_tiny"', "two families have the preset qwen2_7b"),
        ("architecture=", "two families have the architecture Qwen2ForCausalLM"),
        ("name=", "two families have the name qwen2"),
    ],
)
def test_two_families_do_not_answer_to_one_name(forgotten: str, line: str, tmp_path: Path):
    """A family that is made from another one and keeps its preset would take the preset from it."""
    kept = [text for text in NEW_FAMILY.splitlines() if not text.strip().startswith(forgotten)]
    shutil.copytree(PACKAGE / "families", tmp_path / "megatron_ring/families")
    (tmp_path / "megatron_ring/__init__.py").touch()
    (tmp_path / "megatron_ring/families/toy.py").write_text("\n".join(kept))
    done = subprocess.run(
        [sys.executable, "-c", "import megatron_ring.families"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and line in done.stderr


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
    assert not keys & family.only.keys() and set(family.aliases.values()) <= keys | {
        family.shared_experts_key
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_presets_of_a_family_are_models_that_its_config_can_say(family):
    assert any(name.endswith("_tiny") for name in family.presets)
    for name in family.presets:
        model = preset_config(name).model
        assert model.family == family.name and model.is_moe == family.has_experts
        assert {ours: getattr(model, ours) for ours in family.implied} == dict(family.implied)
