"""The policy's loss as the engine takes it: any recipe, with KL, entropy and mismatch correction around it.

Ring-lite, eq. 2 and 6. *Readings*: entropy H is the mean over the selected tokens and higher entropy lowers
the loss; IcePop's weight falls on the surrogate only, so that KL and entropy hold a masked token too.

Legend: T token slots of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.model.build import Logits
from megatron_ring.rl.batch import RLMicrobatch
from megatron_ring.rl.mismatch import CORRECTIONS
from megatron_ring.rl.objective.divergence import ESTIMATORS
from megatron_ring.rl.objective.recipes import RECIPES, StepFacts
from megatron_ring.train.engine import StepReport
from megatron_ring.train.objective import LossTerms, logprob

_PER_TOKEN = ("kl", "entropy", "clip_fraction", "ratio", "mismatch", "masked_fraction", "approx_kl")
"""Metrics that are means over loss tokens; the objective sums them up, unweighted."""


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of one minibatch; pure, so that every microbatch of every rank may be given in any order.

    Example: ``PolicyObjective(config=ObjectiveConfig(), facts=StepFacts(token_budget=4096, dp_size=2,
    max_response_length=512), temperature=1.0)``.
    """

    config: ObjectiveConfig
    facts: StepFacts
    temperature: float = 1.0
    sum_names: tuple[str, ...] = ("policy_loss", "tokens", *_PER_TOKEN)
    peak_names: tuple[str, ...] = ("mismatch_max", "ratio_max")

    def local_weight(self, microbatches: Sequence[RLMicrobatch]) -> float:
        """This rank's part of the recipe's normaliser."""
        return RECIPES[self.config.objective].normaliser(microbatches, self.facts)

    def __call__(self, logits: Logits, microbatch: RLMicrobatch) -> LossTerms:
        """Communicates over the tensor-parallel group (log p and entropy)."""
        logp_T, entropy_T = logprob(
            logits.main_TV,
            microbatch.labels_T,
            logits,
            temperature=self.temperature,
            inplace_backward=True,
        )
        return self.terms(logp_T, entropy_T, microbatch)

    def terms(self, logp_T: Tensor, entropy_T: Tensor, microbatch: RLMicrobatch) -> LossTerms:
        """The loss from log p and entropy of this pass; local."""
        c, recipe = self.config, RECIPES[self.config.objective]
        mask_T = (microbatch.loss_mask_T > 0).to(logp_T.dtype)
        old_T, trainer_T = self._denominators(logp_T.detach(), microbatch)
        log_ratio_T = logp_T - old_T
        surrogate = recipe.surrogate(logp_T, log_ratio_T, microbatch, c)
        gap_T = (trainer_T - microbatch.rollout_logp_T) * mask_T
        correction_T = CORRECTIONS[c.mismatch_correction](gap_T.exp(), c.mismatch_low, c.mismatch_high)
        policy_T = -correction_T * surrogate.value_T
        total_T = policy_T
        kl_T = torch.zeros_like(policy_T)
        if c.kl_loss_coef > 0:
            kl_T = ESTIMATORS[c.kl_loss_type](logp_T, microbatch.ref_logp_T)
            total_T = total_T + c.kl_loss_coef * kl_T
        if c.entropy_coef > 0:
            total_T = total_T - c.entropy_coef * entropy_T
        weight_T = microbatch.weights_T if recipe.weight == "response" else mask_T
        per_token = {
            "kl": kl_T,
            "entropy": entropy_T,
            "clip_fraction": surrogate.clipped_T,
            "ratio": surrogate.ratio_T,
            "mismatch": gap_T.abs(),
            "masked_fraction": correction_T == 0,
            "approx_kl": -log_ratio_T,
        }
        sums = {name: (value_T.detach() * mask_T).double().sum() for name, value_T in per_token.items()}
        sums["policy_loss"] = (policy_T.detach() * weight_T).double().sum()
        sums["tokens"] = mask_T.double().sum()
        peaks = {
            "mismatch_max": gap_T.abs().max(),
            "ratio_max": (surrogate.ratio_T.detach() * mask_T).max(),
        }
        return LossTerms(loss_sum=(total_T * weight_T).sum(), sums=sums, peaks=peaks)

    def _denominators(self, current_T: Tensor, microbatch: RLMicrobatch) -> tuple[Tensor, Tensor]:
        """log p under the old policy, and the trainer's log p that the rollout engine's is compared with."""
        match self.config.old_logprobs:
            case "recompute":
                return microbatch.old_logp_T, microbatch.old_logp_T
            case "rollout":
                return microbatch.rollout_logp_T, current_T
            case "current":
                return current_T, current_T


def metrics(report: StepReport) -> dict[str, float]:
    """What a step of :class:`PolicyObjective` says of itself: per-token means are over loss tokens, whatever
    the loss is divided by.

    Example: ``{"loss": .02, "policy_loss": .019, "loss_tokens": 4096., "kl": .001, "entropy": .4, ...}``.
    """
    tokens = max(report.means["tokens"] * report.weight, 1.0)
    means = {name: report.means[name] * report.weight / tokens for name in _PER_TOKEN}
    whole = {
        "loss": report.loss,
        "policy_loss": report.means["policy_loss"],
        "loss_tokens": report.means["tokens"] * report.weight,
    }
    return {**whole, **means, **report.peaks}
