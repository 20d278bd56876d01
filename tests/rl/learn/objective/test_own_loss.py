"""An objective of a user's own is held to what a PolicyLoss is; log p that an engine does not know enters nothing."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_ring.config import importable
from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.errors import ConfigError
from megatron_ring.rl.learn.objective import POLICY_LOSSES, PolicyObjective
from megatron_ring.rl.learn.objective.policy_losses import StepFacts, token_ratio
from tests.helpers.rl.policy_cases import grid, rollouts

FACTS = StepFacts(token_budget=100, dp_size=1, max_response_length=16)


def terms_of(objective: str, parts):
    own = PolicyObjective(config=ObjectiveConfig(objective=objective, kl_loss_coef=0.0), facts=FACTS)
    own.local_denominator(parts)
    logp_T = torch.linspace(-3, -1, parts[0].num_slots)
    return own.terms(logp_T, torch.ones_like(logp_T), parts[0])


def scored():
    """A microbatch with log p of the old policy."""
    (part,) = grid(rollouts(), "one")
    return replace(part, old_logp_T=torch.full((part.num_slots,), -2.5))


def gave(*words):
    return token_ratio(*words)._replace(value_T=torch.ones(1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"surrogate": lambda *_: torch.ones(180)}, ": its surrogate gave Tensor; return a Surrogate"),
        (
            {"surrogate": gave},
            ": its surrogate gave [1] as value_T, which must be a tensor of one number per token",
        ),
        ({"surrogate": lambda *_: 1 / 0}, " raised ZeroDivisionError: division by zero"),
        (
            {"denominator": lambda *_: math.inf},
            ": its denominator gave inf, which must be finite and at least 0",
        ),
        ({"denominator": lambda *_: "many"}, " raised ValueError: could not convert string to float: 'many'"),
        ({"denominator": 7}, " has denominator=7, not a function"),
        ({"token_weight": "2"}, " has token_weight='2'; write one of '1', '1/|y|'"),
    ],
)
def test_what_gives_something_else_is_one_line(monkeypatch, changed, said):
    loss = replace(POLICY_LOSSES["dapo"], **changed)
    monkeypatch.setitem(sys.modules, "ring_own_loss", SimpleNamespace(mine=loss))
    monkeypatch.setattr(importable, "require_module", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        terms_of("ring_own_loss:mine", [scored()])
    assert str(caught.value).startswith(f"objective=ring_own_loss:mine{said}")


def test_log_p_that_the_engine_does_not_know_is_compared_with_nothing():
    known = terms_of("c3po", [scored()])
    part = scored()
    unknown_T = torch.where(part.loss_mask_T > 0, math.nan, part.rollout_logp_T)
    terms = terms_of("c3po", [replace(part, rollout_logp_T=unknown_T)])
    assert torch.equal(terms.loss_sum, known.loss_sum)
    assert known.sums["mismatch_tokens"] > 0
    assert (terms.sums["mismatch"], terms.sums["mismatch_tokens"], terms.peaks["mismatch_max"]) == (0, 0, 0)
