"""Advantages by hand, and what happens to responses that were cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.config.settings import settings
from megatron_ring.rl.learn.advantage import (
    ESTIMATORS,
    assign,
    gae,
    group_mean,
    group_norm,
    length_penalty,
    moments,
    register,
    rloo,
    whiten,
)
from megatron_ring.rl.types import RewardResult
from tests.helpers.rl.policy_cases import rollouts


def judged(scores: list[float]):
    samples = rollouts()[: len(scores)]
    return [
        replace(s, advantages_R=None, reward=RewardResult(score=score, status="correct"))
        for s, score in zip(samples, scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (group_norm, [0.5 / 0.500001, -0.5 / 0.500001, -0.5 / 0.500001, 0.5 / 0.500001]),
        (group_mean, [0.5, -0.5, -0.5, 0.5]),
        (rloo, [1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3]),
    ],
)
def test_group_relative_estimators_by_hand(estimator, expected):
    assert estimator(np.array([1.0, 0.0, 0.0, 1.0])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", [group_norm, group_mean, rloo])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.7] * 7, [1.0], [0.3] * 10])
def test_equal_rewards_have_no_advantage_at_all(estimator, rewards):
    """0.1 + 0.1 + 0.1 is not 0.3: the rounding must not become an advantage."""
    assert (estimator(np.array(rewards)) == 0).all()


@pytest.mark.parametrize("estimator", [group_norm, group_mean, rloo])
def test_advantages_of_a_group_sum_to_0(estimator):
    rewards = np.random.default_rng(3).random(16)
    assert abs(estimator(rewards).sum()) < 1e-9


def test_groups_are_the_prompts_responses_wherever_they_stand():
    samples = judged([1, 0, 0, 1, 1, 1])
    shuffled = [samples[i] for i in (4, 0, 3, 2, 5, 1)]
    assigned = assign(shuffled, ObjectiveConfig(advantage_estimator="group_mean"), 100)
    assert [a.response.key for a in assigned] == [s.response.key for s in shuffled]
    by_key = {a.response.key: a.advantages_R for a in assigned}
    assert by_key[0, 0] == pytest.approx(np.full(11, 2 / 3))
    assert by_key[0, 1] == pytest.approx(np.full(4, -1 / 3))
    assert all((by_key[1, sample] == 0).all() for sample in range(3))
    assert by_key[0, 0].dtype == np.float32


def test_gae_is_the_sum_of_discounted_errors():
    values, gamma, lam = np.array([0.3, -0.2, 0.5, 0.1]), 0.9, 0.7
    deltas = [gamma * values[t + 1] - values[t] for t in range(3)] + [2.0 - values[3]]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
    advantages, returns = gae(values, 2.0, gamma, lam)
    assert advantages == pytest.approx(expected, rel=1e-12)
    assert returns == pytest.approx(np.array(expected) + values, rel=1e-12)


def test_gae_without_discount_is_the_score_minus_the_value():
    advantages, returns = gae(np.array([0.3, 0.9]), 1.0, 1.0, 1.0)
    assert advantages == pytest.approx([0.7, 0.1]) and returns == pytest.approx([1.0, 1.0])


def test_a_critics_values_give_advantages_per_token():
    samples = judged([1, 0])
    config = ObjectiveConfig(advantage_estimator="gae", critic=True, gae_lambda=0.9)
    values = [np.linspace(0, 1, s.response.length) for s in samples]
    first, second = assign(samples, config, 100, values)
    assert first.advantages_R == pytest.approx(gae(values[0], 1.0, 1.0, 0.9)[0], rel=1e-6)
    assert second.advantages_R == pytest.approx(gae(values[1], 0.0, 1.0, 0.9)[0], rel=1e-6)
    with pytest.raises(ValueError, match="critic's values"):
        assign(samples, config, 100)


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (130, -1.0)]
)
def test_the_length_penalty_grows_over_the_buffer(length, penalty):
    assert length_penalty(length, max_response_length=100, buffer=20) == pytest.approx(penalty)


def test_overlong_responses_keep_lose_or_leave():
    samples = judged([1, 1, 0])
    samples[0] = replace(samples[0], response=replace(samples[0].response, stop="length"))
    kept = assign(samples, ObjectiveConfig(advantage_estimator="group_mean"), 11)
    assert [a.advantages_R[0] for a in kept] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    punished = assign(
        samples,
        ObjectiveConfig(advantage_estimator="group_mean", overlong="penalise", overlong_buffer=4),
        11,
    )
    scores = [0.0, 1.0, -0.5]  # 11, 4 and 9 tokens of at most 11
    assert [a.advantages_R[0] for a in punished] == pytest.approx([s - sum(scores) / 3 for s in scores])
    masked = assign(samples, ObjectiveConfig(advantage_estimator="group_mean", overlong="mask"), 11)
    assert [a.response.key for a in masked] == [s.response.key for s in samples[1:]]
    assert [a.advantages_R[0] for a in masked] == pytest.approx([1 / 3, -2 / 3]), "its reward still counts"


def test_whitening_is_over_the_tokens_of_all_ranks_and_leaves_returns_alone():
    samples = [replace(s, returns_R=s.advantages_R + 1) for s in rollouts()]
    shares = [samples[0::3], samples[1::3], samples[2::3]]
    of_all = [row for share in shares for row in moments(share)]
    whitened = [rollout for share in shares for rollout in whiten(share, of_all)]
    tokens = np.concatenate([r.advantages_R for r in whitened]).astype(np.float64)
    assert tokens.mean() == pytest.approx(0, abs=1e-6) and tokens.std() == pytest.approx(1, abs=1e-6)
    # a long response weighs by its tokens, and the order of ranks changes no bit
    alone = {r.response.key: r for r in whiten(samples, moments(samples[::-1]))}
    before = {r.response.key: r for r in samples}
    for rollout in whitened:
        assert np.array_equal(rollout.advantages_R, alone[rollout.response.key].advantages_R)
        assert rollout.returns_R is before[rollout.response.key].returns_R


def test_whitening_by_hand():
    row = replace(rollouts()[0], advantages_R=np.float32([1.0, 2.0, 3.0]))
    (found,) = whiten([row], moments([row]))
    assert found.advantages_R.tolist() == pytest.approx([-1.224745, 0, 1.224745], abs=1e-5)
    one = replace(row, advantages_R=np.float32([5.0]))
    assert whiten([one], moments([one]))[0].advantages_R.tolist() == [5.0], "nothing to compare with"
    assert whiten([], []) == []


def test_the_setting_offers_what_is_registered_and_gae():
    assert settings()["advantage_estimator"].choices == (*ESTIMATORS, "gae")
    for name in ("rloo", "gae"):
        with pytest.raises(ValueError, match=f"advantage_estimator {name} exists"):
            register(name, rloo)
