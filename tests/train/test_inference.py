"""A model without gradients answers as the one that trains, and holds nothing that only training needs."""

from __future__ import annotations

import pytest
import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.rl.rollout.inprocess import InProcessEngine, continue_tokens
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.inference import InferenceEngine
from tests.helpers.model.small import OBJECTIVE, batch, config_of, weights
from tests.helpers.parallel.running import randomise
from tests.helpers.rl.sequences import assert_same, by_key, requests, sampling


@pytest.mark.parametrize("model", ["v1", "v2_mtp"])
def test_a_checkpoints_scores_loss_and_responses_are_those_of_the_engine_that_saved_it(model, tmp_path):
    config = config_of(model, save=str(tmp_path / "run"))
    with open_session(config.parallel, seed=1) as session:
        engine = randomised_engine(config, session)
        Checkpointer(config, engine, session, stage="pretrain").save(1, {"step": 1})
        expected = (engine.evaluate(batch(), OBJECTIVE), engine.score(batch()), answers(engine))
        plain = InferenceEngine(config, session)
        Checkpointer(config, plain, session, stage="pretrain").load_weights(tmp_path / "run")
        assert all(map(torch.equal, weights(plain).values(), weights(engine).values()))
        loss, scores, responses = plain.evaluate(batch(), OBJECTIVE), plain.score(batch()), answers(plain)
    assert loss == expected[0]
    for (logp_T, entropy_T), (logp_of_T, entropy_of_T) in zip(scores, expected[1], strict=True):
        assert torch.equal(logp_T, logp_of_T) and torch.equal(entropy_T, entropy_of_T)
    for key, response in responses.items():
        assert_same(response, expected[2][key], tolerance=0)


def randomised_engine(config, session) -> Engine:
    engine = Engine(config, session)
    randomise(engine)
    return engine


def answers(engine: InferenceEngine):
    rollout = InProcessEngine(engine, slots=3)
    rollout.publish(version=1)
    return by_key(list(rollout.generate(requests(), sampling())))


def test_it_has_no_gradient_buffer_and_no_optimizer():
    config = config_of("v1")
    with open_session(config.parallel, seed=1) as session:
        plain, trained = InferenceEngine(config, session), Engine(config, session)
        for engine, trains in ((plain, False), (trained, True)):
            parameters = [p for model in engine.models for p in model.parameters()]
            assert {p.requires_grad for p in parameters} == {trains}
            assert {hasattr(p, "main_grad") for p in parameters} == {trains}
            assert hasattr(engine, "optimizer") is trains
        assert all(map(torch.equal, weights(plain).values(), weights(trained).values())), (
            "one seed, one model"
        )


def test_a_continuation_is_that_of_its_seed_without_its_stop_token():
    config = config_of("v1")
    with open_session(config.parallel, seed=1) as session:
        engine = randomised_engine(config, session)
        whole = continue_tokens(engine, [5, 3, 7], 12, seed=3, stop_ids=())
        assert len(whole) == 12 and whole == continue_tokens(engine, [5, 3, 7], 12, seed=3, stop_ids=())
        stop = whole[5]
        assert continue_tokens(engine, [5, 3, 7], 12, seed=3, stop_ids=[stop]) == whole[: whole.index(stop)]
        assert continue_tokens(engine, [5, 3, 7], 0, seed=3, stop_ids=()) == []
