"""Settings that are fine alone and senseless together end in one line: value, rule, remedy."""

from __future__ import annotations

import pytest

from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.rl_rules import rl_problems

MOE = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}


def found(**settings: object) -> list[str]:
    return list(rl_problems(config_from_mapping(settings), 1))


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
    (dict(old_logprobs="current"), "old_logprobs=current never clips, so minibatches_per_step=2"),
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
    (dict(mtp_num_layers=1, **MOE), "mtp_num_layers=1 would stand still"),
]


@pytest.mark.parametrize(("settings", "line"), CASES, ids=[line[:50] for _, line in CASES])
def test_what_makes_no_sense_together_is_one_line_with_a_remedy(settings, line):
    problems = found(**settings)
    assert len(problems) == 1
    assert line in problems[0] and ("; set --" in problems[0] or "; try " in problems[0])
