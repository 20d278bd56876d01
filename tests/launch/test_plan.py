"""Planned layouts are valid, fit, and come in a sensible order."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from megatron_ring.config.check import validate
from megatron_ring.config.load import load_config
from megatron_ring.config.parallel import RecomputeModule
from megatron_ring.errors import ConfigError
from megatron_ring.launch.plan import USABLE, activation_bytes, feasible_layouts, format_plans, layout_flags
from tests.helpers.paths import python_path

GIB = 2**30
TOOL = Path(__file__).parents[2] / "tools" / "plan_run.py"
RING_LITE = ["--preset", "ring_lite", "--seq-length", "4096", "--global-batch-size", "256"]


def test_every_plan_is_valid_and_fits():
    config = load_config(RING_LITE)
    plans = feasible_layouts(config, 16, 8, 80 * GIB)
    assert len(plans) > 10
    for plan in plans:
        validate(replace(config, parallel=plan.parallel), 16)
        assert plan.total_bytes <= USABLE * 80 * GIB
        assert plan.parallel.tensor_model_parallel_size <= 8


def test_a_plan_is_what_its_flags_describe():
    config = load_config(RING_LITE)
    for plan in feasible_layouts(config, 16, 8, 80 * GIB):
        assert load_config([*RING_LITE, *layout_flags(plan.parallel)]).parallel == plan.parallel


def test_less_memory_leaves_fewer_plans_and_none_in_the_end():
    config = load_config(RING_LITE)
    counts = [len(feasible_layouts(config, 16, 8, memory * GIB)) for memory in (140, 80, 40, 4)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] and counts[-1] == 0


def test_recompute_and_sharding_need_less_memory_for_activations():
    config = load_config(RING_LITE)
    plain = activation_bytes(config, 0, 8)
    full = replace(config, parallel=replace(config.parallel, recompute_granularity="full"))
    moe = replace(
        config,
        parallel=replace(config.parallel, recompute_granularity="selective", recompute_modules=("moe",)),
    )
    tp = replace(
        config, parallel=replace(config.parallel, tensor_model_parallel_size=4, sequence_parallel=True)
    )
    assert activation_bytes(full, 0, 8) < activation_bytes(moe, 0, 8) < plain
    assert activation_bytes(tp, 0, 8) * 4 == plain


def test_every_module_that_is_recomputed_needs_less_but_flash_attention_itself():
    def needed(preset: str, *modules: RecomputeModule) -> int:
        config = load_config(["--preset", preset, "--seq-length", "4096", "--global-batch-size", "256"])
        selective = replace(config.parallel, recompute_granularity="selective", recompute_modules=modules)
        return activation_bytes(replace(config, parallel=selective), 0, 8)

    plain = {preset: needed(preset) for preset in ("ring_lite", "qwen2_7b")}
    for module in get_args(RecomputeModule):
        preset = "qwen2_7b" if module == "mlp" else "ring_lite"
        if module == "core_attn":
            assert needed(preset, module) == plain[preset]
        else:
            assert needed(preset, module) < plain[preset], module
    moe = needed("ring_lite", "moe")
    assert needed("ring_lite", "layernorm", "moe") < moe < needed("ring_lite", "shared_experts")
    assert needed("ring_lite", "moe", "shared_experts") == moe


def test_the_tool_prints_layouts_or_one_line():
    env = {**os.environ, "PYTHONPATH": python_path()}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(TOOL), *argv], env=env, capture_output=True, text=True)

    good = run("--gpus", "8", "--memory-gib", "80", *RING_LITE)
    assert good.returncode == 0, good.stderr
    assert "layouts fit 8 devices" in good.stdout and "--expert-model-parallel-size" in good.stdout
    small = run("--gpus", "1", "--memory-gib", "1", *RING_LITE)
    assert (small.returncode, small.stderr.count("\n")) == (2, 1)
    assert small.stderr.startswith("error: no layout of this model fits 1 devices of 1 GiB; add devices")
    assert run("--gpus", "8", "--memory-gib", "nan").stderr.startswith(
        "error: --memory-gib nan must be positive"
    )
    assert run("--gpus", "0", "--memory-gib", "1").stderr.startswith("error: --gpus 0 must be positive")
    assert run("--gpus", "8").stderr.startswith("error: the following arguments are required: --memory-gib")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--preset qwen3_8b --num-query-groups 5", "num_query_groups=5 must divide num_attention_heads=32"),
        ("--preset qwen3_moe_tiny --moe-router-topk 9", "moe_router_topk=9 must be from 1 to num_experts=8"),
        ("--preset qwen3_tiny --global-batch-size 3", "global_batch_size=3"),
    ],
)
def test_what_no_memory_helps_is_not_blamed_on_the_memory(flags: str, problem: str):
    with pytest.raises(ConfigError, match=f"^{problem}"):
        feasible_layouts(load_config(flags.split()), 8, 8, 80 * 2**30)


def test_the_default_layout_needs_no_flags():
    config = load_config(["--preset", "qwen3_tiny"])
    plans = feasible_layouts(config, 1, 8, 80 * 2**30)
    assert "flags of the first:\n  none: it is the default\n" in format_plans(config, plans, 1, len(plans))


@pytest.mark.parametrize(
    "words", [["plan", "--gpus", "8", "--memory-gib", "80"], ["pretrain", "--dry-run"]], ids=" ".join
)
def test_a_reader_that_has_seen_enough_ends_the_plan_without_a_traceback(words: list[str]):
    """``ring plan ... | head``: the pipe is closed before the plan is printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_ring", *words, "--preset", "qwen3_tiny"],
        env={**os.environ, "PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE
