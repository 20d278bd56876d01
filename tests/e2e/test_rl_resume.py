"""An RL run that is killed at any line of a step and started again is the run that never died."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.rl_worker import LINES
from tests.e2e.runs import environment, losses
from tests.parallel.spawning import several_worlds
from tests.parallel.watching import assert_ended_well, run_to_the_end

pytestmark = several_worlds

STEPS = 4


def settings(corpus: dict[str, object], problems: Path, **more: object) -> dict[str, object]:
    """Everything that a resume has to keep is in use: interrupted and carried responses, a reference policy."""
    return {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "kv_channels": 32,
        "vocab_size": 512,
        "family": "bailing_moe",
        "norm_head": True,
        "num_experts": 4,
        "moe_ffn_hidden_size": 32,
        "moe_aux_loss_coeff": 1e-3,
        "max_position_embeddings": 128,
        "seq_length": 64,
        "bf16": False,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "train_iters": STEPS,
        "tokenizer_model": str(corpus["tokenizer-model"]),
        "prompt_data": [str(problems)],
        "prompts_per_step": 6,
        "group_size": 4,
        "max_prompt_length": 40,
        "max_response_length": 24,
        "rollout_slots": 9,
        "rollout_token_budget": 300,
        "token_budget": 80,
        "minibatches_per_step": 2,
        "budget_overshoot": "carry",
        "microbatch_capacity": 128,
        "kl_loss_coef": 1e-2,
        "reward_functions": ["toy=tests.e2e.toy_reward:even"],
        "reward_workers": 1,
        "save_interval": 1,
        **more,
    }


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "toy.jsonl"
    rows = [{"prompt": f"def f{i}(x):", "domain": "toy", "answer": str(i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(corpus, problems, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    (folder / "settings.json").write_text(json.dumps(settings(corpus, problems)))
    command = [sys.executable, "-m", "tests.e2e.rl_worker", str(folder)]
    result = run_to_the_end(command, env=environment(), timeout=2400)
    assert_ended_well(result)
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["straight"] == [0], result.stderr[-4000:]
    return folder


def sampled(path: Path) -> dict[int, object]:
    """Step -> what was sampled and carried; of a step that was done twice, the later word."""
    return dict(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_run_killed_at_any_line_repeats_the_straight_run(runs, line):
    codes = json.loads((runs / "codes.json").read_text())
    assert codes[line] == [-9, 0]
    assert sampled(runs / f"{line}.jsonl") == sampled(runs / "straight.jsonl")
    assert losses(runs / line) == losses(runs / "straight")
    assert set(losses(runs / line)) == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_the_runs_interrupt_and_carry_responses(runs):
    """Else the test above would not show that they are kept."""
    steps = sampled(runs / "straight.jsonl")
    assert any(rows[-1] for rows in steps.values()), "nothing was carried"
    state = json.loads((runs / "straight/iter_0000002/trainer_state.json").read_text())
    assert state["trainer"]["open"][0]["prompts"], "nothing was interrupted"
