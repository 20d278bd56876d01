"""Corrections for the mismatch between the rollout engine's and the trainer's probabilities.

With ``k = pi_train_old / pi_rollout`` of the sampled token, constant in the backward pass. Legend: T token
slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inside(k_T: Tensor, low: float, high: float) -> Tensor:
    """k inside [low, high], 0 outside: IcePop (arXiv 2510.18855) and masked importance sampling.

    Example: ``inside([.4, 1.2, 1.9, 6.], .5, 5.)`` is ``[0., 1.2, 1.9, 0.]``.
    """
    return torch.where((k_T >= low) & (k_T <= high), k_T, 0.0)


def truncated(k_T: Tensor, low: float, high: float) -> Tensor:
    """min(k, high): truncated importance sampling. Example: ``truncated([.4, 6.], 0., 2.)`` is ``[.4, 2.]``."""
    return k_T.clamp(max=high)


def mask(k_T: Tensor, low: float, high: float) -> Tensor:
    """1 inside [low, high], 0 outside. Example: ``mask([.4, 1.2, 6.], .5, 5.)`` is ``[0., 1., 0.]``."""
    return ((k_T >= low) & (k_T <= high)).to(k_T.dtype)


def none(k_T: Tensor, low: float, high: float) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(k_T)


CORRECTIONS = {"none": none, "icepop": inside, "tis": truncated, "mis": inside, "mask": mask}
"""Weight of a token's policy loss by the name of its ``mismatch_correction``."""
