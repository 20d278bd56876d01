"""The policy's loss as the engine takes it: any policy loss, with KL, entropy and mismatch correction around it.

Ring-lite, eq. 2 and 6. *Readings*: entropy H is the mean over the selected tokens and higher entropy lowers
the loss; IcePop's weight falls on the surrogate only, so KL and entropy also apply to masked tokens.

Legend: T token slots of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ring.config.rl import ObjectiveConfig, mismatch_bounds
from megatron_ring.errors import ConfigError
from megatron_ring.model.build import Logits
from megatron_ring.rl.batch.microbatch import RLMicrobatch
from megatron_ring.rl.learn.objective.divergence import ESTIMATORS, K3_LIMIT, LOG_RATIO_LIMIT
from megatron_ring.rl.learn.objective.policy_losses import (
    PolicyLoss,
    StepFacts,
    Surrogate,
    policy_loss,
)
from megatron_ring.rl.mismatch import CORRECTIONS
from megatron_ring.rl.own_code import own_code
from megatron_ring.train.engine import StepReport
from megatron_ring.train.objective import LossTerms, logprob

_PER_TOKEN = (
    "kl",
    "entropy",
    "clip_fraction",
    "ratio",
    "masked_fraction",
    "clamped_fraction",
    "approx_kl",
    "older_policy_share",
)
"""Metrics that are means over loss tokens; the objective sums them up, unweighted."""


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of one minibatch. Pure: microbatches may come in any order, on any rank.

    Example: ``PolicyObjective(config=ObjectiveConfig(), facts=StepFacts(token_budget=4096, dp_size=2,
    max_response_length=512), temperature=1.0)``.
    """

    config: ObjectiveConfig
    facts: StepFacts
    temperature: float = 1.0
    loss: PolicyLoss = field(init=False)
    """What ``config.objective`` names."""
    sum_names: tuple[str, ...] = ("policy_loss", "tokens", "mismatch", "mismatch_tokens", *_PER_TOKEN)
    peak_names: tuple[str, ...] = ("mismatch_max", "ratio_max")

    def __post_init__(self) -> None:
        """Raises ConfigError if ``config.objective`` names no usable loss."""
        object.__setattr__(self, "loss", policy_loss(self.config.objective, self.facts))

    def local_denominator(self, microbatches: Sequence[RLMicrobatch]) -> float:
        """This rank's part of the step's denominator."""
        with own_code("objective", self.config.objective):
            found = float(self.loss.denominator(microbatches, self.facts))
        if not math.isfinite(found) or found < 0:
            raise ConfigError(
                f"objective={self.config.objective}: its denominator gave {found}, which must be finite and at least 0; "
                "correct it"
            )
        return found

    def __call__(self, logits: Logits, microbatch: RLMicrobatch) -> LossTerms:
        """Communicates over the tensor-parallel group (log p and entropy)."""
        logp_T, entropy_T = logprob(
            logits.main_TV,
            microbatch.labels_T,
            logits,
            temperature=self.temperature,
            inplace_backward=True,
        )
        assert entropy_T is not None
        return self.terms(logp_T, entropy_T, microbatch)

    def terms(self, logp_T: Tensor, entropy_T: Tensor, microbatch: RLMicrobatch) -> LossTerms:
        """The loss from log p and entropy of this pass; no communication."""
        c = self.config
        mask_T = (microbatch.loss_mask_T > 0).to(logp_T.dtype)
        old_T, trainer_T = self._denominators(logp_T.detach(), microbatch)
        free_T = logp_T - old_T
        log_ratio_T = free_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        surrogate = self._surrogate(logp_T, log_ratio_T, microbatch)
        known_T = ~microbatch.rollout_logp_T.isnan()
        gap_T = torch.where(known_T, trainer_T - microbatch.rollout_logp_T, 0.0) * mask_T
        k_T = gap_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        correction_T = CORRECTIONS[c.mismatch_correction](k_T, *mismatch_bounds(c))
        clamped_T = (free_T.detach().abs() > LOG_RATIO_LIMIT) | (gap_T.abs() > LOG_RATIO_LIMIT)
        if surrogate.held_T is not None:
            clamped_T = clamped_T | surrogate.held_T
        policy_T = -correction_T * surrogate.value_T
        total_T = policy_T
        kl_T = torch.zeros_like(policy_T)
        if c.kl_loss_coef > 0:
            kl_T = ESTIMATORS[c.kl_loss_type](logp_T, _scored(microbatch.ref_logp_T))
            if c.kl_loss_type == "k3":
                clamped_T = clamped_T | (kl_T.detach() >= K3_LIMIT)
            total_T = total_T + c.kl_loss_coef * kl_T
        if c.entropy_coef > 0:
            total_T = total_T - c.entropy_coef * entropy_T
        weight_T = microbatch.weights_T if self.loss.token_weight == "1/|y|" else mask_T
        per_token = {
            "kl": kl_T,
            "entropy": entropy_T,
            "clip_fraction": surrogate.clipped_T,
            "ratio": surrogate.ratio_T,
            "masked_fraction": correction_T == 0,
            "clamped_fraction": clamped_T,
            "approx_kl": -log_ratio_T,
            "older_policy_share": 1.0 - microbatch.fresh_T,
        }
        compared_T = self._compared(microbatch) * mask_T * known_T
        sums = {name: (value_T.detach() * mask_T).double().sum() for name, value_T in per_token.items()}
        sums["policy_loss"] = (policy_T.detach() * weight_T).double().sum()
        sums["tokens"] = mask_T.double().sum()
        sums["mismatch"] = (gap_T.abs() * compared_T).double().sum()
        sums["mismatch_tokens"] = compared_T.double().sum()
        peaks = {
            "mismatch_max": (gap_T.abs() * compared_T).max(),
            "ratio_max": (surrogate.ratio_T.detach() * mask_T).max(),
        }
        return LossTerms(loss_sum=(total_T * weight_T).sum(), sums=sums, peaks=peaks)

    def _surrogate(self, logp_T: Tensor, log_ratio_T: Tensor, microbatch: RLMicrobatch) -> Surrogate:
        """What the loss maximises per token.

        Raises:
            ConfigError: a loss of the user's own raises, or gives something else.
        """
        name = self.config.objective
        with own_code("objective", name):
            found = self.loss.surrogate(logp_T, log_ratio_T, microbatch, self.config)
        if not isinstance(found, Surrogate):
            raise ConfigError(
                f"objective={name}: its surrogate gave {type(found).__name__}; return a Surrogate of policy_losses.py"
            )
        for row, value_T in found._asdict().items():
            if value_T is not None and getattr(value_T, "shape", None) != logp_T.shape:
                what = list(value_T.shape) if isinstance(value_T, Tensor) else type(value_T).__name__
                raise ConfigError(
                    f"objective={name}: its surrogate gave {what} as {row}, which must be a tensor of one number per "
                    f"token, {list(logp_T.shape)}; correct it"
                )
        return found

    def _denominators(self, current_T: Tensor, microbatch: RLMicrobatch) -> tuple[Tensor, Tensor]:
        """log p under the old policy, and the trainer's log p that the rollout engine's is compared with."""
        match self.config.old_logprobs:
            case "recompute":
                old_T = _scored(microbatch.old_logp_T)
                return old_T, old_T
            case "rollout":
                return microbatch.rollout_logp_T, current_T
            case "current":
                return current_T, current_T

    def _compared(self, microbatch: RLMicrobatch) -> Tensor:
        """1 where the engine's and the trainer's log p are of the same weights, else 0, [T].

        The token must come from the policy that this step updates, and the trainer must have scored it before the
        step's first update: at the start of the step (recompute), or in the pass of the first minibatch.
        """
        moved = self.config.old_logprobs != "recompute" and microbatch.weights_moved
        return torch.zeros_like(microbatch.fresh_T) if moved else microbatch.fresh_T


def _scored(column_T: Tensor | None) -> Tensor:
    if column_T is None:
        raise ValueError("the microbatch lacks log p: score it first")
    return column_T


def loss_tokens(report: StepReport) -> float:
    """Loss tokens of an update, over the whole job, as counted in its loss masks."""
    return report.means["tokens"] * report.denominator


def mean_mismatch(reports: Sequence[StepReport]) -> float | None:
    """Mean difference of log p of rollout engine and trainer over the tokens of a step that can be compared; None without
    any.
    """
    compared = sum(report.means["mismatch_tokens"] * report.denominator for report in reports)
    gap = sum(report.means["mismatch"] * report.denominator for report in reports)
    return gap / compared if compared else None


def metrics(reports: Sequence[StepReport]) -> dict[str, float]:
    """Metrics of the updates of one RL step, from the reports of :class:`PolicyObjective`.

    By kind: ``loss_tokens`` is their sum; ``loss`` and ``policy_loss`` are means weighted by each update's
    denominator; ``..._max`` are maxima; all else are means over loss tokens, ``mismatch`` over those on which
    the two engines can be compared (left out, with its maximum, where there are none). Updates without tokens
    are skipped.

    Example: ``{"loss": .02, "policy_loss": .019, "loss_tokens": 8192., "kl": .001, "entropy": .4, ...}``.
    """
    made = [report for report in reports if loss_tokens(report)]
    if not made:
        return {"loss": 0.0, "loss_tokens": 0.0}

    def total(name: str) -> float:
        return sum(report.means[name] * report.denominator for report in made)

    weight, tokens = sum(report.denominator for report in made), total("tokens")
    found = {
        "loss": sum(report.loss * report.denominator for report in made) / weight,
        "policy_loss": total("policy_loss") / weight,
        "loss_tokens": tokens,
        **{name: total(name) / tokens for name in _PER_TOKEN},
        **{name: max(report.peaks[name] for report in made) for name in made[0].peaks},
    }
    mismatch = mean_mismatch(made)
    if mismatch is None:
        del found["mismatch_max"]
        return found
    return found | {"mismatch": mismatch}
