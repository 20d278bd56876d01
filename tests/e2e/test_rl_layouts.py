"""An RL run is the same run at every layout: same responses, same selection, same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.e2e.rl_settings import settings
from tests.helpers.e2e.runs import records, run
from tests.helpers.e2e.waiting import waiting_samples
from tests.helpers.parallel.spawning import several_worlds
from tests.helpers.parallel.watching import assert_ended_well

pytestmark = several_worlds

# one update: later ones start from weights that Adam has moved apart by rounding
PLAIN = {
    "rollout_token_budget": 0,
    "budget_overshoot": "token",
    "train_iters": 1,
    "minibatches_per_step": 1,
    "eval_interval": 1,
}
# C3PO++: what a step interrupts goes on in the next one; the updates are too small to move a weight
BUDGETED = {
    "rollout_token_budget": 330,
    "budget_order": "arrival",
    "budget_overshoot": "carry",
    "train_iters": 3,
    "lr": 1e-12,
    "save_interval": 1,
}
LAYOUTS = [
    pytest.param({"expert_model_parallel_size": 2}, 2, id="dp2ep2"),
    pytest.param(
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
        4,
        id="tp2pp2ep2",
    ),
]
LEDGER = ("sampled", "trained", "cut", "carried", "carried_in", "wasted", "stale")
EXACT = ("reward", "response_length", "loss_tokens", "c3po/selected", *(f"c3po/{name}" for name in LEDGER))
SAMPLED = ("reward_std", "response_length_std", "cut_share")
CLOSE = ("loss", "policy_loss", "kl", "entropy", "grad_norm", "balance_loss")


def rl(corpus: dict[str, object], problems: Path, folder: Path, world: int, **more: object) -> Path:
    values = settings(corpus, problems, **{**PLAIN, "num_attention_heads": 4, "num_query_groups": 2, **more})
    values |= {"save": folder, "load": folder, "eval_prompt_data": [problems], "eval_prompts": 4}
    result = run(
        "examples/rl_ring.py", {name.replace("_", "-"): value for name, value in values.items()}, world
    )
    assert_ended_well(result)
    return folder


@pytest.fixture(scope="module")
def single(corpus, problems, tmp_path_factory) -> Path:
    return rl(corpus, problems, tmp_path_factory.mktemp("single") / "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_a_run_is_the_same_at_every_layout(single, corpus, problems, tmp_path, layout, world):
    other = rl(corpus, problems, tmp_path / "run", world, **layout)
    for ours, theirs in zip(records(other), records(single), strict=True):
        for name in EXACT:
            assert ours[name] == theirs[name], name
        for name in CLOSE:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-7), name
        assert ours["mismatch"] < 1e-4
    assert [r["accuracy"] for r in records(other, "eval")] == [r["accuracy"] for r in records(single, "eval")]


@pytest.fixture(scope="module")
def single_budgeted(corpus, problems, tmp_path_factory) -> Path:
    return rl(corpus, problems, tmp_path_factory.mktemp("single") / "budgeted", 1, **BUDGETED)


def waiting(folder: Path, step: int) -> dict[int, list[int]]:
    """Prompt -> samples that have not ended by ``step``."""
    return waiting_samples(folder / f"iter_{step:07d}")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_a_budgeted_run_interrupts_the_same_responses_at_every_layout(
    single_budgeted,
    corpus,
    problems,
    tmp_path,
    layout,
    world,
):
    other = rl(corpus, problems, tmp_path / "run", world, **BUDGETED, **layout)
    ours, theirs = records(other), records(single_budgeted)
    assert [step["step"] for step in ours] == [1, 2, 3]
    for name in EXACT + SAMPLED:
        assert [step[name] for step in ours] == [step[name] for step in theirs], name
    # the balance loss is a mean over microbatches, which each layout packs in its own way
    for name in set(CLOSE) - {"balance_loss"}:
        expected = pytest.approx([step[name] for step in theirs], rel=2e-4, abs=1e-7)
        assert [step[name] for step in ours] == expected, name
    for step in (1, 2, 3):
        assert waiting(single_budgeted, step) and waiting(other, step) == waiting(single_budgeted, step)


def test_samples_tell_what_the_best_and_worst_responses_were(single):
    rows = [json.loads(line) for line in (single / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 4
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
