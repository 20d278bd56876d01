"""Objectives: the loss sum of a microbatch from the last pipeline stage's logits.

The engine divides the sum by the objective's denominator. The denominator is a property of the whole step (every
microbatch of every data-parallel rank), never of one microbatch, so that a token's weight does not depend on packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ring.data.batch.microbatch import IGNORE, Microbatch
from megatron_ring.kernels import token_logprob
from megatron_ring.model.build import Logits


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One microbatch's share of the objective.

    ``loss_sum`` is differentiable. ``sums`` and ``peaks`` are detached scalars: over the step, the engine adds up the
    sums and takes the maximum of the peaks. Example:
    ``LossTerms(loss_sum=tensor(812.4), sums={"lm_loss": tensor(806.1)})``.
    """

    loss_sum: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A pure function of what the model's last stage gives and of the microbatch, and its denominator.

    An objective takes its own kind of output (:class:`~megatron_ring.model.build.Logits`, a critic's values) and of
    microbatch; the engine hands them through.
    """

    @property
    def sum_names(self) -> tuple[str, ...]: ...

    @property
    def peak_names(self) -> tuple[str, ...]: ...

    def local_denominator(self, microbatches: Sequence[Any], /) -> float:
        """This rank's part of the denominator; the engine sums it over data-parallel ranks."""
        ...

    def __call__(self, output: Any, microbatch: Any, /) -> LossTerms: ...


def logprob(
    logits_TV: Tensor, targets_T: Tensor, logits: Logits, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """log p of the targets (0 if ignored), and entropy unless ``with_entropy=False``.

    ``options`` are those of :func:`~megatron_ring.kernels.token_logprob`. Communicates over the tensor-parallel group.
    """
    group = logits.tp_group if logits.tp_group.size() > 1 else None
    return token_logprob(
        logits_TV,
        targets_T,
        vocab_start=logits.vocab_start,
        vocab_size=logits.vocab_size,
        group=group,
        **options,
    )


@dataclass(frozen=True, kw_only=True)
class NextTokenObjective:
    """Cross entropy of the next token, plus multi-token prediction if the model has it.

    ``sum_t mask_t * -log p(y_t)  +  (mtp_loss_scaling_factor / depths) * sum_d sum_t mask_(t+d) * -log
    p_d(y_(t+d))``, divided by the step's loss tokens.
    """

    mtp_loss_scaling_factor: float = 0.0
    sum_names: tuple[str, ...] = ("lm_loss", "mtp_loss")
    peak_names: tuple[str, ...] = ()

    def local_denominator(self, microbatches: Sequence[Microbatch]) -> float:
        return float(sum(microbatch.loss_mask_T.sum().item() for microbatch in microbatches))

    def __call__(self, logits: Logits, microbatch: Microbatch) -> LossTerms:
        logp_T, _ = logprob(
            logits.main_TV, microbatch.labels_T, logits, with_entropy=False, inplace_backward=True
        )
        main = -(logp_T * microbatch.loss_mask_T).sum()
        further = torch.zeros_like(main)
        for depth, mtp_TV in enumerate(logits.mtp_TV, start=1):
            labels_T = microbatch.shifted(microbatch.labels_T, fill=IGNORE, by=depth)
            mask_T = microbatch.shifted(microbatch.loss_mask_T, fill=0.0, by=depth)
            logp_T, _ = logprob(mtp_TV, labels_T, logits, with_entropy=False, inplace_backward=True)
            further = further - (logp_T * mask_T).sum() / len(logits.mtp_TV)
        total = main + self.mtp_loss_scaling_factor * further
        return LossTerms(loss_sum=total, sums={"lm_loss": main.detach(), "mtp_loss": further.detach()})
