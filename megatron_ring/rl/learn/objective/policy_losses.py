"""Policy losses. Each is a surrogate per token, the token's weight, and the step's denominator.

Every one minimises, over the loss tokens t of a step::

    (1 / denominator) * sum_t weight_t * (-correction_t * surrogate_t + beta * KL_t - alpha * H_t)

Legend: T token slots of a microbatch, S segments (responses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_ring.config.importable import resolve
from megatron_ring.config.rl import ObjectiveConfig, clip_bounds
from megatron_ring.errors import ConfigError
from megatron_ring.rl.batch.microbatch import RLMicrobatch


class Surrogate(NamedTuple):
    """What to maximise per token, its ratio, where clipping removed the gradient, and where the ratio was
    capped because it was too large (None: nowhere).
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

    @property
    def local_token_budget(self) -> float:
        """One data-parallel rank's part of Phi; the parts of all ranks sum to Phi."""
        return self.token_budget / self.dp_size


SEQUENCE_LIMIT = 10.0
"""Largest mean log ratio of a response (GSPO), as in verl."""

SurrogateFunction = Callable[[Tensor, Tensor, RLMicrobatch, ObjectiveConfig], Surrogate]
"""(log p [T], log p - old log p [T], microbatch, config) -> surrogate."""

DenominatorFunction = Callable[[Sequence[RLMicrobatch], StepFacts], float]
"""(this rank's microbatches of the step, facts) -> its part of the step's denominator; parts are summed over
data-parallel ranks."""


TokenWeight = Literal["1", "1/|y|"]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """One objective.

    ``token_weight``: 1 for each token, or 1/|y| for each token of a response y, so that all responses weigh the
    same. An objective that averages over responses cannot be combined with budget_overshoot=carry, which cuts
    them in two.

    Example: ``PolicyLoss(surrogate=token_ratio, token_weight="1/|y|", denominator=responses)`` is GRPO.
    """

    surrogate: SurrogateFunction
    token_weight: TokenWeight
    denominator: DenominatorFunction


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
    """Phi, however many tokens are trained on (Ring-lite, eq. 2)."""
    return facts.local_token_budget


def tokens(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Loss tokens of the step."""
    return float(sum(microbatch.num_loss_tokens for microbatch in microbatches))


def responses(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Responses of the step."""
    return float(sum(microbatch.num_responses for microbatch in microbatches))


def longest_responses(microbatches: Sequence[RLMicrobatch], facts: StepFacts) -> float:
    """Responses of the step, each counted with the maximum response length (Dr. GRPO)."""
    return responses(microbatches, facts) * facts.max_response_length


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "c3po": PolicyLoss(surrogate=token_ratio, token_weight="1", denominator=budget),
    "grpo": PolicyLoss(surrogate=token_ratio, token_weight="1/|y|", denominator=responses),
    "dapo": PolicyLoss(surrogate=token_ratio, token_weight="1", denominator=tokens),
    "dr_grpo": PolicyLoss(surrogate=token_ratio, token_weight="1", denominator=longest_responses),
    "gspo": PolicyLoss(surrogate=sequence_ratio, token_weight="1/|y|", denominator=responses),
    "cispo": PolicyLoss(surrogate=cispo_surrogate, token_weight="1", denominator=tokens),
}
"""Objectives by the name of the setting ``objective``."""


def register(name: str, loss: PolicyLoss) -> None:
    """Add an objective. A module that does so when it is imported is named by ``objective=module:name``.

    Raises:
        ValueError: the name is taken.
    """
    if name in POLICY_LOSSES:
        raise ValueError(f"objective {name} exists")
    POLICY_LOSSES[name] = loss


def policy_loss(objective: str, facts: StepFacts) -> PolicyLoss:
    """The loss that the setting ``objective`` names: a registered one, or ``module:name`` of the user's own.

    Raises:
        ConfigError: it does not exist or is no PolicyLoss, its module cannot be imported, or it divides by a
        token budget that the run does not have.
    """
    loss: PolicyLoss = resolve("objective", objective, POLICY_LOSSES, _problem)
    if loss.denominator is budget and not facts.token_budget:
        raise ConfigError(f"token_budget=0 is what objective={objective} divides by; set --token-budget")
    return loss


def _problem(found: object) -> str | None:
    if isinstance(found, PolicyLoss):
        for name in ("surrogate", "denominator"):
            if not callable(getattr(found, name)):
                return (
                    f"has {name}={getattr(found, name)!r}, not a function; write one as policy_losses.py does"
                )
        weights = get_args(TokenWeight)
        if found.token_weight not in weights:
            return f"has token_weight={found.token_weight!r}; write one of {', '.join(map(repr, weights))}"
        return None
    return f"is {type(found).__name__}, not PolicyLoss; name a PolicyLoss(surrogate=..., token_weight=..., denominator=...)"
