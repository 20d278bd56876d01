"""reasoning-gym's own verifiers, at full score only."""

import json

import pytest
import reasoning_gym

from megatron_ring.rl.reward.gym import judge_reasoning_gym
from megatron_ring.rl.reward.registry import check_reward_function
from tests.rl.reward.conftest import problem

NAMES = ["chain_sum", "simple_equations", "word_sorting", "countdown", "syllogism"]


def entry_of(name: str) -> dict:
    # as a JSONL file gives it back
    return json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=5)[0], default=str))


@pytest.mark.parametrize("name", NAMES)
def test_its_own_answer_is_correct_boxed_or_after_the_thought(name: str):
    entry = entry_of(name)
    prompt = problem("reasoning_gym", dataset=name, entry=entry)
    for text in (rf"<think>hm</think> \boxed{{{entry['answer']}}}", f"hm</think>\n{entry['answer']}\n"):
        assert judge_reasoning_gym(prompt, text).status == "correct"


@pytest.mark.parametrize("name", NAMES)
def test_another_answer_is_wrong(name: str):
    result = judge_reasoning_gym(
        problem("reasoning_gym", dataset=name, entry=entry_of(name)), r"\boxed{zebra}"
    )
    assert (result.score, result.status) == (0.0, "wrong")


def test_part_of_the_score_is_none():
    entry = entry_of("chain_sum")
    prompt = problem("reasoning_gym", dataset="chain_sum", entry=entry)
    talk = f"it is {entry['answer']}, I think"
    assert 0 < reasoning_gym.create_dataset("chain_sum", size=1).score_answer(talk, entry) < 1
    assert judge_reasoning_gym(prompt, talk).score == 0.0


def test_no_answer_is_a_parse_error_and_an_unknown_set_an_exception():
    prompt = problem("reasoning_gym", dataset="chain_sum", entry=entry_of("chain_sum"))
    assert judge_reasoning_gym(prompt, "thought</think>  ").status == "parse_error"
    with pytest.raises(ValueError, match="no_such_set"):
        judge_reasoning_gym(problem("reasoning_gym", dataset="no_such_set", entry={}), "1")


def test_it_keeps_the_contract_of_reward_functions():
    check_reward_function(
        judge_reasoning_gym, problem("reasoning_gym", dataset="chain_sum", entry=entry_of("chain_sum"))
    )
