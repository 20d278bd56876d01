"""Qwen3 through the entry points: pre-training over a pipeline, SFT, reinforcement learning with a critic under tensor
parallelism, and the export of what came out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint.convert_cases import run_tool
from tests.helpers.e2e.runs import records, run
from tests.helpers.parallel.watching import assert_ended_well
from tests.helpers.stages.every_setting import make_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL: dict[str, Any] = {
    "num-layers": 2,
    "hidden-size": 64,
    "ffn-hidden-size": 96,
    "vocab-size": 400,
    "max-position-embeddings": 128,
    "seq-length": 32,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "train-iters": 2,
    "lr": 2e-3,
    "log-interval": 1,
}
RL: dict[str, Any] = {
    "prompts-per-step": 6,
    "group-size": 4,
    "max-prompt-length": 40,
    "max-response-length": 24,
    "rollout-slots": 9,
    "token-budget": 80,
    "minibatches-per-step": 1,
    "microbatch-capacity": 128,
    "reward-functions": "toy=tests.helpers.e2e.toy_reward:even",
    "reward-workers": 1,
    "critic": True,
    "advantage-estimator": "gae",
    "kl-loss-coef": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_tiny": {},
    "qwen3_moe_tiny": {
        "moe-ffn-hidden-size": 32,
        "moe-router-pre-softmax": True,
        "untie-embeddings-and-output-weights": False,
    },
}


@pytest.mark.parametrize("preset", MODELS)
def test_a_family_trains_in_every_stage_and_is_exported(preset: str, tmp_path: Path):
    inputs = make_inputs(tmp_path)
    common = {"preset": preset, **SMALL, **MODELS[preset]}
    stages: dict[str, tuple[int, dict[str, Any]]] = {
        "pretrain": (2, {"data-path": inputs["data_path"][0], "pipeline-model-parallel-size": 2}),
        "sft": (1, {"sft-data": inputs["sft_data"][0]}),
        "rl": (2, {"prompt-data": inputs["prompt_data"][0], "tensor-model-parallel-size": 2, **RL}),
    }
    before: Path | None = None
    for stage, (world, settings) in stages.items():
        folder = tmp_path / stage
        settings = {**common, **settings, "save": folder, "metrics-file": folder / "metrics.jsonl"}
        if stage != "pretrain":
            settings |= {"tokenizer-model": inputs["tokenizer_model"], "pretrained-checkpoint": before}
        if settings.get("tensor-model-parallel-size"):
            settings["sequence-parallel"] = True
        assert_ended_well(run(f"examples/{stage}_ring.py", settings, world))
        steps = records(folder)
        assert [record["step"] for record in steps] == [1, 2]
        assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in steps)
        before = folder
    done = run_tool("megatron-to-hf", before, tmp_path / "exported", "--verify", "--check-logits")
    assert done.returncode == 0, done.stderr
    assert "logits agree" in done.stdout
