"""The objectives' differences, and nothing else: a surrogate per token, its weight, and the step's divisor.

Every one minimises, over the loss tokens t of a step::

    (1 / normaliser) * sum_t weight_t * (-correction_t * surrogate_t + beta * KL_t - alpha * H_t)

Legend: T token slots of a microbatch, S segments (responses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_ring.config.rl import ObjectiveConfig, clip_bounds
from megatron_ring.rl.batch.microbatch import RLMicrobatch


class Surrogate(NamedTuple):
    """What to maximise per token, the ratio it was made of, where clipping took the gradient away, and where the
    ratio was too large to be kept (None: nowhere).
    """

    value_T: Tensor
    ratio_T: Tensor
    clipped_T: Tensor
    held_T: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What is fixed for every step of a run.

    ``token_budget`` is Phi, loss tokens of one optimizer step summed over data-parallel ranks.
    Example: ``StepFacts(token_budget=409600, dp_size=4, max_response_length=22528)``.
    """

    token_budget: int
    dp_size: int
    max_response_length: int


SEQUENCE_LIMIT = 10.0
"""Largest mean log ratio of a response (GSPO), as in verl."""

SurrogateFunction = Callable[[Tensor, Tensor, RLMicrobatch, ObjectiveConfig], Surrogate]
"""(log p [T], log p - old log p [T], microbatch, config) -> surrogate."""

NormaliserFunction = Callable[[Sequence[RLMicrobatch], StepFacts], float]
"""This rank's part of the divisor of the step; parts are summed over data-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One objective. ``weight``: every token 1, or 1/|y| of its response.

    Example: ``Recipe(surrogate=token_ratio, weight="response", normaliser=responses)`` is GRPO.
    """

    surrogate: SurrogateFunction
    weight: Literal["token", "response"]
    normaliser: NormaliserFunction


def clipped_surrogate(ratio_T: Tensor, advantages_T: Tensor, config: ObjectiveConfig) -> Surrogate:
    """``min(r A, clip(r) A)``, and where A < 0 at least ``eps_clip_c * A`` (dual clip, if above 0).

    Example, eps_clip 0.2, A = 1: r = 1.5 gives 1.2 and is clipped, r = 0.5 gives 0.5 and is not.
    """
    free_T = ratio_T * advantages_T
    bounded_T = ratio_T.clamp(*clip_bounds(config)) * advantages_T
    value_T = torch.minimum(free_T, bounded_T)
    clipped_T = bounded_T < free_T
    if config.eps_clip_c > 0:
        floor_T = config.eps_clip_c * advantages_T
        dual_T = (advantages_T < 0) & (value_T < floor_T)
        value_T = torch.where(dual_T, floor_T, value_T)
        clipped_T = clipped_T | dual_T
    return Surrogate(value_T, ratio_T, clipped_T)


def token_ratio(
    logp_T: Tensor, log_ratio_T: Tensor, microbatch: RLMicrobatch, config: ObjectiveConfig
) -> Surrogate:
    """PPO's surrogate with the ratio of each token (C3PO, GRPO, DAPO, Dr. GRPO)."""
    return clipped_surrogate(log_ratio_T.exp(), microbatch.advantages_T, config)


def sequence_ratio(
    logp_T: Tensor, log_ratio_T: Tensor, microbatch: RLMicrobatch, config: ObjectiveConfig
) -> Surrogate:
    """GSPO (arXiv 2507.18071): one ratio per response, ``exp(mean over its tokens of log r)``, at most e^10."""
    segment_T = microbatch.segment_of_T
    mean_S = log_ratio_T.new_zeros(len(microbatch.segment_lengths))
    mean_S = mean_S.index_add(0, segment_T, log_ratio_T * microbatch.weights_T)
    ratio_T = mean_S.clamp(max=SEQUENCE_LIMIT).exp()[segment_T]
    surrogate = clipped_surrogate(ratio_T, microbatch.advantages_T, config)
    return surrogate._replace(held_T=(mean_S.detach() > SEQUENCE_LIMIT)[segment_T])


def cispo_surrogate(
    logp_T: Tensor, log_ratio_T: Tensor, microbatch: RLMicrobatch, config: ObjectiveConfig
) -> Surrogate:
    """CISPO (arXiv 2506.13585): ``clip(r) A log p`` with a constant clipped ratio, so no token's gradient is
    lost. The ratio is clipped from above alone unless ``eps_clip`` asks for a lower bound.
    """
    ratio_T = log_ratio_T.detach().exp()
    low, high = clip_bounds(config)
    weight_T = ratio_T.clamp(low, high)
    return Surrogate(weight_T * microbatch.advantages_T * logp_T, ratio_T, weight_T != ratio_T)


def budget(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Phi, whatever is there to train on (Ring-lite, eq. 2)."""
    return facts.token_budget / facts.dp_size


def tokens(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Loss tokens of the step."""
    return float(sum(microbatch.num_loss_tokens for microbatch in microbatches))


def responses(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Responses of the step."""
    return float(sum(microbatch.num_responses for microbatch in microbatches))


def longest_responses(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Responses of the step, each as if it were of the longest length allowed (Dr. GRPO)."""
    return responses(microbatches, facts) * facts.max_response_length


RECIPES: dict[str, Recipe] = {
    "c3po": Recipe(surrogate=token_ratio, weight="token", normaliser=budget),
    "grpo": Recipe(surrogate=token_ratio, weight="response", normaliser=responses),
    "dapo": Recipe(surrogate=token_ratio, weight="token", normaliser=tokens),
    "dr_grpo": Recipe(surrogate=token_ratio, weight="token", normaliser=longest_responses),
    "gspo": Recipe(surrogate=sequence_ratio, weight="response", normaliser=responses),
    "cispo": Recipe(surrogate=cispo_surrogate, weight="token", normaliser=tokens),
}
"""Objectives by the name of the setting ``objective``."""


def register(name: str, recipe: Recipe) -> None:
    """Add an objective of one's own.

    Raises:
        ValueError: the name is taken.
    """
    if name in RECIPES:
        raise ValueError(f"objective {name} exists")
    RECIPES[name] = recipe
