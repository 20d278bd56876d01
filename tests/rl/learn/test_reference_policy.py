"""The reference policy scores with the start's weights and leaves no trace of itself."""

from __future__ import annotations

import pytest
import torch

from megatron_ring.rl.batch.microbatch import with_routes
from megatron_ring.rl.learn.reference_policy import ReferencePolicy
from tests.helpers.model.small import OBJECTIVE, batch, moments_of, small_engine, weights
from tests.helpers.rl.policy_cases import grid, rollouts


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ["v1", "v2"])
def test_scores_are_the_starts_and_the_policys_weights_come_back_bit_for_bit(model, settings):
    with small_engine(model, **settings) as engine:
        at_start = [logp_T for logp_T, _ in engine.score(batch())]
        reference = ReferencePolicy(engine)
        for _ in range(3):
            engine.step(batch(), OBJECTIVE, 1e-2)
        before, moments = weights(engine), moments_of(engine)
        mains = [p.clone() for group in engine.optimizer.param_groups for p in group["params"]]
        learnt = [logp_T for logp_T, _ in engine.score(batch())]
        scored = reference.score(batch())
        assert all(map(torch.equal, scored, at_start))
        assert not any(map(torch.equal, scored, learnt))
        assert all(map(torch.equal, learnt, [logp_T for logp_T, _ in engine.score(batch())]))
        after = weights(engine)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert all(map(torch.equal, moments, moments_of(engine)))
        now = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert all(map(torch.equal, mains, now))


def test_a_step_after_scoring_is_the_step_without():
    results = []
    for scores in (False, True):
        with small_engine("v2") as engine:
            reference = ReferencePolicy(engine)
            engine.step(batch(), OBJECTIVE, 1e-2)
            if scores:
                reference.score(batch(seed=9))
            report = engine.step(batch(seed=8), OBJECTIVE, 1e-2)
            results.append((report, weights(engine)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], w) for n, w in results[1][1].items())


def test_the_reference_routes_by_itself_whatever_the_microbatches_replay():
    with small_engine("v1") as engine:
        reference = ReferencePolicy(engine)
        parts = grid(rollouts(), "two")
        free = reference.score(parts)
        foreign = [torch.arange(3).expand(4, part.num_slots, 3).short() for part in parts]
        replayed = with_routes(parts, foreign)
        assert not any(map(torch.equal, [logp_T for logp_T, _ in engine.score(replayed)], free))
        assert all(map(torch.equal, reference.score(replayed), free))


def test_the_weights_come_back_when_scoring_fails():
    with small_engine("v1") as engine:
        reference = ReferencePolicy(engine)
        engine.step(batch(), OBJECTIVE, 1e-2)
        before = weights(engine)
        with pytest.raises(KeyError), reference.in_place():
            raise KeyError("scoring failed")
        assert all(torch.equal(before[n], w) for n, w in weights(engine).items())
