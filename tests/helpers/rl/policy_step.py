"""A policy step at a small engine: rollouts scored near its own policy, their microbatches, a hard objective."""

from __future__ import annotations

import torch

from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.rl.learn.objective import PolicyObjective
from megatron_ring.rl.learn.objective.policy_losses import StepFacts
from tests.helpers.rl.policy_cases import (
    PACKINGS,
    PICKS,
    columns_of,
    grid,
    off_policy,
    rollouts,
    with_columns,
)

FACTS = StepFacts(token_budget=100, dp_size=1, max_response_length=16)


HARD = dict(
    eps_clip_high=0.28,
    kl_loss_coef=0.1,
    entropy_coef=0.05,
    mismatch_correction="icepop",
    mismatch_low=0.6,
    mismatch_high=1.8,
)


TEMPERATURE = 1.3


def scored_rollouts(engine, temperature: float = TEMPERATURE):
    """Rollouts with other policies near the engine's own, and the columns of any packing."""
    samples = rollouts()
    own = []
    for (logp_T, _), row, microbatch in zip(
        engine.score(grid(samples, "two"), temperature), PACKINGS["two"], grid(samples, "two"), strict=True
    ):
        place = 0
        for index in row:
            prompt, stop = len(samples[index].prompt.tokens), PICKS[index].stop
            logp_R = torch.zeros(samples[index].response.length)
            logp_R[:stop] = logp_T[place + prompt - 1 : place + prompt - 1 + stop]
            own.append((index, logp_R))
            place += prompt + stop - 1
        assert place == microbatch.num_valid
    return off_policy([logp_R for _, logp_R in sorted(own, key=lambda pair: pair[0])], samples)


def microbatches_of(scored, samples, packing: str, **options):
    parts = grid(samples, packing, **options)
    slots = [part.num_slots for part in parts]
    columns = {"old_logp_T": scored.old, "ref_logp_T": scored.ref}
    return with_columns(
        parts, {name: columns_of(rows, samples, packing, slots) for name, rows in columns.items()}
    )


def objective_of(name: str = "c3po", temperature: float = TEMPERATURE, **options) -> PolicyObjective:
    config = ObjectiveConfig(objective=name, **{**HARD, **options})
    return PolicyObjective(config=config, facts=FACTS, temperature=temperature)
