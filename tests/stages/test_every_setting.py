"""Every setting is read somewhere, and every choice of every setting runs and makes a difference.

Both lists come from the dataclasses: a new field or choice is tested by being there.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_ring.config.settings import sections, settings
from megatron_ring.config.stages import STAGES as REGISTERED
from megatron_ring.errors import ConfigError
from megatron_ring.stages.run import open_stage
from tests.helpers.parallel.cases import MODELS
from tests.helpers.stages.every_setting import Choice, configure, every_choice, make_inputs, outcome
from tests.helpers.stages.settings_read import settings_read

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ring"

ONLY_RULES = {
    "context_parallel_size": "known to users of Megatron; anything but 1 is refused",
    "fp8": "known to users of Megatron; anything but none is refused",
}
"""Settings that nothing outside config reads, and why they are there."""

RESOLVED = {
    "make_vocab_size_divisible_by": "padded_vocab_size",
    "eps_clip": "clip_bounds",
    "eps_clip_high": "clip_bounds",
    "mismatch_low": "mismatch_bounds",
    "mismatch_high": "mismatch_bounds",
    "rollout_concurrency": "rollout_concurrency",
    "moe_router_bias_update_rate": "with_still_bias",
}
"""Settings that a function of config resolves, and that function, which is called outside it."""

ALL: tuple[str, ...] = ("pretrain", "sft", "rl")
STAGES: dict[str, tuple[str, ...]] = {"deterministic": ALL, "bf16": ALL, "tokenizer_type": ("sft",)}
"""Where a choice is tried, when it is not its section's own stage."""

_SAVES: dict[str, Any] = {"save": "{run}/saved"}
_LOADS: dict[str, Any] = {"load": "{inputs}/saved", "train_iters": 4, "moe_router_warmup_iters": 9}
_V2: dict[str, Any] = {**MODELS["v2"], "num_layers": 2, "vocab_size": 400, "max_position_embeddings": 128}
_WARM: dict[str, Any] = {"kl_loss_coef": 0.1, "lr": 0.02, "minibatches_per_step": 3, "token_budget": 40}
_STALE: dict[str, Any] = {**_WARM, "rollout_token_budget": 200, "train_iters": 4}

COMPANY: dict[str, dict[str, Any]] = {
    "family=qwen2": {"num_experts": 0, "moe_shared_expert_intermediate_size": 0, "norm_head": False},
    "family=qwen3": {
        "num_experts": 0,
        "moe_shared_expert_intermediate_size": 0,
        "norm_head": False,
        "qk_layernorm": True,
    },
    "family=qwen3_moe": {"moe_shared_expert_intermediate_size": 0, "norm_head": False, "qk_layernorm": True},
    "untie_embeddings_and_output_weights": {"norm_head": False},
    "moe_router_enable_expert_bias": {**_V2, "moe_router_bias_update_rate": 0.05},
    "recompute_method": {"recompute_granularity": "full"},
    "recompute_modules": {**_V2, "recompute_granularity": "selective"},
    "overlap_param_gather": {"overlap_grad_reduce": True},
    "use_distributed_optimizer": _SAVES,
    "lr_decay_style": {"train_iters": 4},
    "lr_decay_style=WSD": {"lr_wsd_decay_iters": 2},
    "lr_wsd_decay_style": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "train_iters": 4},
    "tokenizer_type=huggingface": {"tokenizer_model": "{inputs}/huggingface"},
    "ckpt_format": _SAVES,
    "async_save": _SAVES,
    "finetune": _LOADS,
    "no_load_optim": _LOADS,
    "no_load_rng": _LOADS,
    "verify_checkpoint_integrity": _LOADS,
    "profile": {"profile_step_start": 0, "profile_step_end": 1},
    "sft_save_every_epoch": {**_SAVES, "sft_epochs": 2.0, "train_iters": 0},
    "budget_order": {"max_response_length": 80, "rollout_slots": 4, "token_budget": 300},
    "budget_overshoot": {"token_budget": 70},
    "zero_advantage": {"token_budget": 200, "minibatches_per_step": 1, "budget_order": "arrival"},
    "budget_shortfall": {"token_budget": 560, "minibatches_per_step": 1},
    "advantage_estimator=gae": {"critic": True},
    "critic=True": {"advantage_estimator": "gae"},
    "objective": {**_WARM, "token_budget": 190},
    "kl_loss_type": _WARM,
    "overlong": {"overlong_buffer": 8},
    "old_logprobs": {**_STALE, "mismatch_correction": "tis"},
    "old_logprobs=rollout": {"mismatch_correction": "none"},
    "mismatch_correction": _STALE,
    "mismatch_correction=icepop": {"mismatch_low": 0.98, "mismatch_high": 1.02},
    "mismatch_correction=mask": {"mismatch_low": 0.98, "mismatch_high": 1.02},
    "mismatch_correction=mis": {"mismatch_low": 0.99, "mismatch_high": 1.01},
    "mismatch_correction=tis": {"mismatch_high": 1.0},
    "whiten_advantages": {"critic": True, "advantage_estimator": "gae"},
    "routing_replay": _STALE,
}
"""What a choice needs beside it to be allowed, or to matter: by setting, then by setting=choice."""

REFUSED = {"sequence_parallel=True": "needs tensor_model_parallel_size > 1"}
"""Choices that one process on this machine has to refuse, and the words of the line; tests/parallel has them."""
if importlib.util.find_spec("transformer_engine") is None:
    REFUSED["transformer_impl=transformer_engine"] = "needs Transformer Engine, which does not import"

ELSEWHERE = {
    "family": "tests/helpers/checkpoint/convert_cases.py",
    "use_distributed_optimizer": "tests/checkpoint/test_plain_optimizer.py",
    "overlap_grad_reduce": "tests/helpers/parallel/cases.py",
    "overlap_param_gather": "tests/helpers/parallel/cases.py",
    "recompute_granularity": "tests/model/test_recompute.py",
    "recompute_method": "tests/model/test_recompute.py",
    "recompute_modules": "tests/model/test_recompute.py",
    "deterministic": "tests/runtime/test_deterministic.py",
    "async_save": "tests/checkpoint/test_checkpointer.py",
    "verify_checkpoint_integrity": "tests/checkpoint/test_checksums.py",
    "ckpt_format": "tests/stages/test_every_setting.py",
    "log_level": "tests/stages/test_every_setting.py",
    "token_budget_scope": "tests/rl/batch/test_select.py",
}
"""Settings whose choices give one process the same figures, and the test that shows what they change."""

CHOICES = every_choice(STAGES)


def test_every_setting_is_read_outside_config():
    """Fails where a field is added that nothing reads, where its last reader goes though a field of that name elsewhere
    is still read, and where one of the tables above is read after all.
    """
    paths = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "config")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    found = set().union(*map(settings_read, trees))
    unread = {s.name for s in settings().values() if (s.section, s.name) not in found}
    assert unread == {*ONLY_RULES, *RESOLVED}
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert called >= set(RESOLVED.values()), (
        "a function of config that says what none means is called outside it"
    )


@pytest.mark.parametrize("stage", REGISTERED)
def test_a_section_belongs_to_a_stage(stage: str):
    assert set(REGISTERED[stage].sections) <= set(sections())


def test_no_section_is_left_without_a_stage():
    assert {section for spec in REGISTERED.values() for section in spec.sections} == set(sections())


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x = config.train.lr", {("train", "lr")}),
        ("def f(t: TrainConfig): return t.lr", {("train", "lr")}),
        ("t, p = config.train, config.parallel\ny = t.lr + p.bf16", {("train", "lr"), ("parallel", "bf16")}),
        (
            "class A:\n  c: ObjectiveConfig | None\n  def f(self): return self.c.eps_clip",
            {("objective", "eps_clip")},
        ),
        ("new = replace(config.train, lr=1)\nx = new.lr", {("train", "lr")}),
        ("config.train.lr = 3", set()),
        ("words = data.split(',')", set()),
        ("x = sampling.temperature", set()),
        ("t = config.train\nx = other.lr", set()),
    ],
)
def test_a_setting_counts_as_read_where_it_is_loaded_from_its_section(code: str, found: set):
    assert {pair for pair in settings_read(ast.parse(code)) if pair[0] != pair[1]} == found


def company(choice: Choice) -> dict[str, Any]:
    """Settings beside the choice; the choice's own win."""
    shown = str(choice).partition("-")[2]
    return {**COMPANY.get(choice.name, {}), **COMPANY.get(shown, {})}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("every")
    found = make_inputs(folder)
    warm = {"save": "{inputs}/saved", "moe_router_warmup_iters": 9}
    outcome("pretrain", configure("pretrain", found, folder / "first", warm))
    return found


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Runs a choice once, and remembers what it left."""
    seen: dict[str, dict[str, Any]] = {}

    def run(choice: Choice) -> dict[str, Any]:
        if str(choice) not in seen:
            folder = tmp_path_factory.mktemp("run")
            chosen = company(choice) | {choice.name: choice.value}
            seen[str(choice)] = outcome(choice.stage, configure(choice.stage, inputs, folder, chosen))
        return seen[str(choice)]

    return run


def refusal(choice: Choice) -> str | None:
    return REFUSED.get(str(choice).partition("-")[2])


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_choice_runs_or_is_refused_in_one_line(choice, run):
    words = refusal(choice)
    if words is None:
        run(choice)
        return
    with pytest.raises(ConfigError) as caught:
        run(choice)
    assert words in str(caught.value) and "\n" not in str(caught.value)


DIFFERENT = sorted({choice.name for choice in CHOICES} - set(ELSEWHERE))


@pytest.mark.parametrize("name", DIFFERENT)
def test_no_two_choices_give_the_same_run(name, run):
    left = [(choice, run(choice)) for choice in CHOICES if choice.name == name and refusal(choice) is None]
    for place, (one, its) in enumerate(left):
        for other, theirs in left[place + 1 :]:
            assert one.stage != other.stage or its != theirs, f"{one} and {other} give the same run"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_changes_no_figure_is_shown_elsewhere(name):
    assert name in {choice.name for choice in CHOICES}
    assert name in (ROOT / ELSEWHERE[name]).read_text(encoding="utf-8")


def test_a_checkpoint_says_that_it_has_the_format_asked_for(inputs):
    folder = Path(inputs["tokenizer_model"]).parent / "saved" / "iter_0000002"
    said = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    assert said == settings()["ckpt_format"].default


@pytest.mark.parametrize("level", settings()["log_level"].choices)
def test_messages_are_shown_from_log_level_on(inputs, tmp_path, monkeypatch, level):
    monkeypatch.setattr(logging.root, "handlers", [])
    before = logging.root.level
    try:
        with open_stage(configure("pretrain", inputs, tmp_path, {"log_level": level})):
            assert logging.root.level == getattr(logging, level.upper())
    finally:
        logging.root.setLevel(before)


def test_the_tables_name_choices_that_exist():
    known = {str(choice).partition("-")[2] for choice in CHOICES} | {choice.name for choice in CHOICES}
    allowed = known | {"transformer_impl=transformer_engine"}
    assert {*COMPANY, *REFUSED, *STAGES} <= allowed
