"""The critic: values stand where they should, the loss is PPO's, and expected scores are learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.model.value import Values
from megatron_ring.rl.batch.microbatch import build_microbatch
from megatron_ring.rl.learn.advantage import assign
from megatron_ring.rl.learn.critic import Critic, ValueObjective
from megatron_ring.rl.types import RewardResult
from tests.helpers.model.small import small_engine, weights
from tests.helpers.rl.policy_cases import PACKINGS, PICKS, grid, rollouts

GAE = ObjectiveConfig(advantage_estimator="gae", critic=True, gae_lambda=0.95)


def randomise_head(critic: Critic) -> None:
    with torch.no_grad():
        critic.engine.models[0].output_layer.weight.normal_(
            std=0.3, generator=torch.Generator().manual_seed(1)
        )
    critic.engine.optimizer.reload_model_params()


def new_critic(engine) -> Critic:
    config = replace(engine.config, budget=replace(engine.config.budget, microbatch_capacity=48))
    critic = Critic(config, engine.session)
    critic.start_from(engine)
    return critic


def test_it_starts_from_the_policys_layers_and_says_0():
    with small_engine("v2") as engine:
        critic = new_critic(engine)
        mine, theirs = weights(critic.engine), weights(engine)
        assert mine.keys() == theirs.keys() and mine.pop("output_layer.weight").shape == (1, 64)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        assert all((values_R == 0).all() for values_R in critic.values(rollouts()))


def test_values_stand_before_the_token_they_judge_wherever_it_is_packed():
    with small_engine("v1") as engine:
        critic = new_critic(engine)
        randomise_head(critic)
        samples = rollouts()
        values = critic.values(samples)
        assert [len(values_R) for values_R in values] == [s.response.length for s in samples]
        judged = assign(samples, GAE, 16, values)
        parts = grid(judged, "four", with_values=True)
        for row, part in zip(PACKINGS["four"], parts, strict=True):
            place = 0
            for index in row:
                prompt, stop = len(samples[index].prompt.tokens), PICKS[index].stop
                there = slice(place + prompt - 1, place + prompt - 1 + stop)
                # those of PICKS[7] before its start are context only
                begin = PICKS[index].start
                own = slice(there.start + begin, there.stop)
                assert part.values_T[own].numpy() == pytest.approx(values[index][begin:stop], abs=1e-5)
                place += prompt + stop - 1
            torch.testing.assert_close(part.returns_T - part.values_T, part.advantages_T, atol=1e-6, rtol=0)
        # the value of the first token does not know the response, the second one's knows its first token
        other = list(samples)
        changed = samples[0].response.tokens_R.copy()
        changed[0] = (changed[0] + 1) % 250
        other[0] = replace(samples[0], response=replace(samples[0].response, tokens_R=changed))
        again = critic.values(other)[0]
        assert again[0] == pytest.approx(values[0][0], abs=1e-6) and abs(again[1] - values[0][1]) > 1e-3


def test_the_clipped_loss_by_hand():
    sample = rollouts()[0]
    part = build_microbatch([sample], [PICKS[0]], 20)
    assert part.values_T is None and part.returns_T is None
    T = part.num_slots
    first = len(sample.prompt.tokens) - 1
    old_T, returns_T, values_T = torch.zeros(T), torch.zeros(T), torch.full((T,), 9.0)
    values_T[first : first + 11] = 0.0
    # pulled away beyond the clip towards the return: held back; away from it: free
    values_T[first], returns_T[first] = 0.5, 1.0
    values_T[first + 1], returns_T[first + 1] = -0.5, 1.0
    values_T.requires_grad_()
    terms = ValueObjective()(Values(values_T=values_T), replace(part, values_T=old_T, returns_T=returns_T))
    assert terms.loss_sum.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2))
    terms.loss_sum.backward()
    assert values_T.grad.nonzero().flatten().tolist() == [first + 1]


def test_expected_scores_are_learnt():
    """Prompts of which every response scores 1, or none: values move to that, and advantages vanish."""
    with small_engine("v1") as engine:
        critic = new_critic(engine)
        samples = [
            replace(s, reward=RewardResult(score=float(s.prompt.uid % 2), status="correct"))
            for s in rollouts()
        ]
        before = weights(engine)
        sizes = []
        for _ in range(25):
            judged = assign(samples, GAE, 16, critic.values(samples))
            sizes.append(np.mean([np.abs(s.advantages_R).mean() for s in judged]))
            report = critic.step(grid(judged, "four", with_values=True), lr=3e-3)
            assert report.finite
        assert sizes[0] > 0.4 and sizes[-1] < 0.5 * sizes[0]
        assert all(torch.equal(before[n], w) for n, w in weights(engine).items()), "the policy stands still"


def test_the_returns_of_carried_tokens_are_those_of_their_own_step():
    """Every response scores 1, so with gamma = lambda = 1 every return is 1, however values move meanwhile."""
    with small_engine("v1") as engine:
        critic = new_critic(engine)
        samples = [replace(s, reward=RewardResult(score=1.0, status="correct")) for s in rollouts()]
        plain = replace(GAE, gae_lambda=1.0)
        judged = assign(samples, plain, 16, critic.values(samples))
        for _ in range(3):
            critic.step(grid(judged, "four", with_values=True), lr=3e-3)
        assert max(np.abs(v).max() for v in critic.values(samples)) > 0.01, "values have moved"
        for part in grid(judged, "four", with_values=True):
            torch.testing.assert_close(part.returns_T[part.loss_mask_T > 0], torch.ones(part.num_loss_tokens))
