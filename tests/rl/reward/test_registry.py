"""Reward functions by path: what leads nowhere is one line, before anything starts."""

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import (
    check_reward_function,
    load_verifiers,
    parse_reward_functions,
    worker_kind,
)
from megatron_ring.rl.types import RewardResult
from tests.helpers.reward.judging import problem


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["poem"], "reward_functions=poem is not domain=module:function; write domain=module:function"),
        (
            ["poem=math"],
            "reward_functions=poem=math is not domain=module:function; write domain=module:function",
        ),
        (
            ["=json:loads"],
            "reward_functions==json:loads is not domain=module:function; write domain=module:function",
        ),
        (
            ["p=json:a b"],
            "reward_functions=p=json:a b is not domain=module:function; write domain=module:function",
        ),
        (["p=no_such:f"], "reward_functions=p=no_such:f: no module no_such; install it or set PYTHONPATH"),
        (
            ["p=json.no.such:f"],
            "reward_functions=p=json.no.such:f: no module json.no.such; install it or set PYTHONPATH",
        ),
        (
            ["p=json:loads", "p=json:dumps"],
            "reward_functions=p=json:dumps names domain p a second time; leave one",
        ),
    ],
)
def test_words_that_lead_nowhere(words: list[str], line: str):
    with pytest.raises(RewardError) as caught:
        parse_reward_functions(words)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("missing", "has no missing; write domain=module:function"),
        ("one_argument", "one_argument: a reward function takes (prompt, text) by position"),
        ("not_a_function", "3 is not a reward function; give a function of (prompt, text)"),
    ],
)
def test_functions_that_are_none(plugin: str, function: str, line: str):
    with pytest.raises(RewardError) as caught:
        load_verifiers(RewardConfig(reward_functions=(f"poem={plugin}:{function}",)), "trusted")
    assert str(caught.value).startswith(f"reward_functions=poem={plugin}:{function}: ")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_adds_a_domain_or_replaces_a_built_in_one(plugin: str):
    config = RewardConfig(reward_functions=(f"poem={plugin}:right", f"math={plugin}:number"))
    verifiers = load_verifiers(config, "trusted")
    assert set(verifiers) == {"math", "code", "poem"}
    assert set(load_verifiers(config, "isolated")) == {"math", "science", "reasoning_gym"}
    kinds = [
        worker_kind(domain, {"poem", "math"})
        for domain in ("math", "science", "reasoning_gym", "code", "poem")
    ]
    assert kinds == ["trusted", "isolated", "isolated", "trusted", "trusted"]
    assert verifiers["poem"].function(problem("poem"), "x").status == "correct"
    assert verifiers["math"].function(problem("math"), "x") == 1.0


def right(prompt, text):
    return RewardResult(score=1.0, status="correct")


def raises(prompt, text):
    return {"": right(prompt, text)}[text]


def returns_a_number(prompt, text):
    return 1.0


def returns_no_number(prompt, text):
    return RewardResult(score=float("nan"), status="correct")


def returns_another_status(prompt, text):
    return RewardResult(score=0.0, status="boring")  # pyright: ignore[reportArgumentType]


def changes_its_mind(prompt, text, asked=[]):  # noqa: B006
    asked.append(text)
    return RewardResult(score=float(len(asked)), status="correct")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (raises, "raises raised KeyError on 'no answer'"),
        (returns_a_number, "returned float, not RewardResult on ''"),
        (returns_no_number, "returned score nan, which is not a finite number"),
        (returns_another_status, "returned status boring, which is none of"),
        (changes_its_mind, "returned two different results for ''"),
        (lambda text: None, "takes (prompt, text) by position"),
    ],
)
def test_the_contract_sees_each_breach(function, why: str):
    with pytest.raises(RewardError) as caught:
        check_reward_function(function, problem("math", answer="1"))
    assert why in str(caught.value)


def test_the_contract_lets_a_good_function_pass():
    check_reward_function(right)
    check_reward_function(right, problem("math", answer="1"))
