"""Settings that are fine alone and senseless together end in one line: value, rule, remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ring.config.check import problems
from megatron_ring.config.load import config_from_mapping, load_config
from megatron_ring.config.rules import budget, objective, rollout
from megatron_ring.config.stages import STAGES

EXAMPLES = Path(__file__).parents[2] / "examples"
MOE = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}


COMBINATIONS = (
    objective.advantages,
    objective.objective,
    objective.mismatch,
    objective.replay,
    objective.further_tokens,
    rollout.sampling,
    budget.budget,
    budget.supply,
)


def found(world_size: int = 1, **settings: object) -> list[str]:
    config = config_from_mapping(settings)
    return [problem for rule in COMBINATIONS for problem in rule(config, world_size)]


def test_the_stage_has_every_rule_that_is_tried_here():
    assert set(COMBINATIONS) <= set(STAGES["rl"].rules)


def test_the_defaults_and_the_papers_choices_are_sound():
    assert found() == []
    assert found(**MOE, mismatch_correction="icepop", routing_replay="R2") == []
    assert found(objective="grpo", minibatches_per_step=1, old_logprobs="current") == []
    assert found(advantage_estimator="gae", critic=True) == []
    assert found(top_p=0.95) == []


CASES = [
    (dict(critic=True), "critic=True trains values that advantage_estimator=group_norm never reads"),
    (
        dict(objective="gspo", critic=True, advantage_estimator="gae"),
        "objective=gspo has one ratio per response",
    ),
    (dict(objective="cispo", eps_clip_c=3.0), "eps_clip_c=3.0 does nothing in objective=cispo"),
    (dict(objective="gspo", budget_overshoot="carry"), "objective=gspo averages over responses"),
    (dict(objective="dr_grpo", budget_overshoot="carry"), "objective=dr_grpo averages over responses"),
    (
        dict(old_logprobs="current", minibatches_per_step=2),
        "old_logprobs=current makes every ratio 1, so with minibatches_per_step=2 nothing corrects",
    ),
    (dict(mismatch_low=0.4), "mismatch_low=0.4 does nothing in mismatch_correction=none"),
    (dict(mismatch_high=4.0), "mismatch_high=4.0 does nothing in mismatch_correction=none"),
    (
        dict(mismatch_correction="tis", mismatch_low=0.4),
        "mismatch_low=0.4 does nothing in mismatch_correction=tis",
    ),
    (
        dict(mismatch_correction="icepop", mismatch_low=9.0),
        "mismatch_low=9.0 must be at most mismatch_high=5.0",
    ),
    (dict(whiten_advantages=True), "whiten_advantages=True is for gae"),
    (
        dict(critic=True, advantage_estimator="gae", zero_advantage="exclude"),
        "zero_advantage=exclude needs one advantage per response, and gae gives each token its own; set --zero-advantage",
    ),
    (
        dict(critic=True, advantage_estimator="gae", group_size=1, dynamic_sampling=True),
        "group_size=1 with dynamic_sampling: a response that is alone never differs",
    ),
    (dict(rollout_concurrency=8), "rollout_concurrency=8 is for C3PO++"),
    (dict(mismatch_correction="mask", mismatch_high=0.7), "leaves out 1, at which engine and trainer agree"),
    (dict(mismatch_correction="tis", mismatch_high=0.5), "leaves out 1, at which engine and trainer agree"),
    (
        dict(objective="dapo", token_budget=0, token_budget_scope="per_gpu"),
        "token_budget_scope=per_gpu has no effect without a token budget",
    ),
    (
        dict(objective="grpo", token_budget=0, minibatches_per_step=9, prompts_per_step=2, group_size=4),
        "minibatches_per_step=9 is more than the 2*4 responses of a step",
    ),
    (
        dict(objective="dapo", token_budget=0, budget_order="arrival"),
        "budget_order=arrival has no effect without a token budget",
    ),
    (
        dict(objective="dapo", token_budget=0, budget_overshoot="response"),
        "budget_overshoot=response has no effect without a token budget",
    ),
    (
        dict(objective="dapo", token_budget=0, budget_shortfall="refill"),
        "budget_shortfall=refill has no effect without a token budget",
    ),
    (dict(budget_overshoot="carry", rollout_max_staleness=0), "rollout_max_staleness=0 drops what"),
    (
        dict(budget_shortfall="refill", dynamic_sampling_max_rounds=1),
        "leaves budget_shortfall=refill no second",
    ),
    (
        dict(
            token_budget=10, minibatches_per_step=2, prompts_per_step=1, group_size=3, max_response_length=8
        ),
        "need 4 responses of 8 tokens, and a step samples 3",
    ),
    (dict(old_logprobs="rollout", mismatch_correction="icepop"), "compares the rollout's log p with itself"),
    (dict(mismatch_correction="tis", top_p=0.9), "top_p=0.9 samples from another distribution"),
    (dict(mismatch_correction="mis", top_k=20), "top_k=20 samples from another distribution"),
    (dict(old_logprobs="rollout", top_p=0.9), "top_p=0.9 samples from another distribution"),
    (dict(overlong="penalise", overlong_buffer=0), "overlong_buffer=0 must be from 1 to max_response_length"),
    (
        dict(overlong="penalise", max_response_length=1000),
        "overlong_buffer=4096 must be from 1 to max_response_length=1000; try 250",
    ),
    (dict(routing_replay="R3"), "routing_replay=R3 needs experts"),
    (
        dict(**MOE, routing_replay="R2", old_logprobs="rollout"),
        "routing_replay=R2 records routes while old log p",
    ),
    (dict(mtp_num_layers=1, **MOE), "mtp_num_layers=1: reinforcement learning does not train these layers"),
]


@pytest.mark.parametrize(("settings", "line"), CASES, ids=[line[:50] for _, line in CASES])
def test_what_makes_no_sense_together_is_one_line_with_a_remedy(settings, line):
    problems = found(**settings)
    assert len(problems) == 1
    assert line in problems[0] and any(
        word in problems[0] for word in ("; set --", "; try ", "; drop ", "; lower ")
    )


PAPER = {
    "prompts_per_step": 512,
    "group_size": 16,
    "max_response_length": 22528,
    "token_budget_scope": "per_gpu",
}


def test_the_papers_budget_is_one_minibatch_two_can_never_be_filled():
    assert found(256, **PAPER) == []
    (problem,) = found(256, **PAPER, minibatches_per_step=2)
    assert problem == (
        "minibatches_per_step*token_budget=2*104857600 (per_gpu of 409600)=209715200 response tokens can never be filled: "
        "a step samples at most 184549376 (prompts_per_step*group_size*max_response_length=512*16*22528); lower "
        "--token-budget or --minibatches-per-step, or raise --prompts-per-step"
    )


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 4 * 2 * 10),
        ({"budget_shortfall": "refill", "dynamic_sampling_max_rounds": 3}, 3 * 4 * 2 * 10),
        # the round of 5 that reaches the budget is decoded to its end
        ({"rollout_token_budget": 50}, 54),
        ({"rollout_token_budget": 50, "budget_shortfall": "refill", "dynamic_sampling_max_rounds": 3}, 162),
        ({"rollout_token_budget": 10_000}, 4 * 2 * 10),
        ({"minibatches_per_step": 2}, 40),
    ],
)
def test_a_budget_is_refused_from_the_first_token_that_no_step_can_sample(settings, most):
    small = {"prompts_per_step": 4, "group_size": 2, "max_response_length": 10, **settings}
    assert found(**small, token_budget=most) == []
    (problem,) = found(**small, token_budget=most + 1)
    assert f"{most + 1}" in problem and "can never be filled" in problem


def test_a_generation_budget_must_let_responses_end_before_they_are_stale():
    few = {"token_budget": 10, "max_response_length": 100, "rollout_max_staleness": 4, "group_size": 1}
    assert found(**few, rollout_token_budget=25) == [], "one at a time, a quarter of it in each of four steps"
    (problem,) = found(**few, rollout_token_budget=24)
    assert "may take 5 steps to end 1 responses of max_response_length=100" in problem
    assert problem.endswith("set --rollout-token-budget 25 or more")
    (problem,) = found(**few, rollout_token_budget=100, rollout_concurrency=5)
    assert "may take 5 steps to end 5 responses" in problem
    # members of one group wait for one another
    assert len(found(**few | {"group_size": 5}, rollout_token_budget=100)) == 1
    assert found(**few | {"group_size": 4}, rollout_token_budget=100) == []
    assert found(**few, rollout_token_budget=100, rollout_concurrency=4) == []
    # no more are decoded than there are
    two = {
        **few,
        "rollout_max_staleness": 0,
        "prompts_per_step": 1,
        "group_size": 2,
        "rollout_concurrency": 1000,
    }
    assert found(**two, rollout_token_budget=200) == []
    assert len(found(**two, rollout_token_budget=199)) == 1


@pytest.mark.parametrize(
    ("recipe", "flags", "world_size"),
    [
        ("tiny/rl.toml", "", 1),
        ("tiny/rl.toml", "", 2),
        ("tiny/rl.toml", "--objective grpo --token-budget 0 --budget-shortfall train", 2),
        *(
            (f"ring_lite/{name}.toml", "", world)
            for name in ("rl_math", "rl_code_science")
            for world in (8, 64, 256)
        ),
    ],
)
def test_the_recipes_break_no_rule(recipe, flags, world_size):
    config = load_config(["--config", str(EXAMPLES / recipe), *flags.split()])
    assert list(problems(config, world_size, "rl")) == []


def test_a_concurrency_above_what_there_is_to_decode_fills_no_budget():
    few = {"prompts_per_step": 6, "group_size": 4, "max_response_length": 24, "token_budget": 500}
    for concurrency in (24, 10**6):
        (problem,) = found(**few, rollout_token_budget=150, rollout_concurrency=concurrency)
        assert "a step samples at most 173" in problem
