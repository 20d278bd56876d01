"""Sampling in plain PyTorch, on any device.

Legend: T rows, V vocabulary.
"""

import torch
from torch import Tensor


def sample_token(
    logits_TV: Tensor, uniform_T: Tensor, temperature: float, threshold_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """First token at which the mass of the logits >= threshold exceeds ``uniform`` of its total; log p of it."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    logp_TV = (logits_TV.to(wide) / temperature).log_softmax(-1)
    mass_TV = logp_TV.double().exp()
    if threshold_T is not None:
        mass_TV = mass_TV.masked_fill(logits_TV < threshold_T[:, None], 0.0)
    cumulated_TV = cumulated(mass_TV)
    target_T1 = (uniform_T.double() * cumulated_TV[:, -1])[:, None]
    # target < total, so at least the last token with any mass exceeds it; rounding may make them equal
    last_T1 = (mass_TV > 0).to(torch.int8).cumsum(-1).argmax(-1, keepdim=True)
    tokens_T1 = torch.minimum((cumulated_TV <= target_T1).sum(-1, keepdim=True), last_T1)
    return tokens_T1.squeeze(1), logp_TV.gather(1, tokens_T1).squeeze(1)


def cumulated(mass_TV: Tensor) -> Tensor:
    """Running sums along each row of probabilities, fp64; reproducible where torch is asked to be."""
    if mass_TV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return cumulated_in_integers(mass_TV)
    return mass_TV.cumsum(-1)


def cumulated_in_integers(mass_TV: Tensor) -> Tensor:
    """The running sums in units of 2**-52, whose order cannot matter; torch refuses floating point on CUDA."""
    return (mass_TV * 2.0**52).round().long().cumsum(-1).double() / 2.0**52
