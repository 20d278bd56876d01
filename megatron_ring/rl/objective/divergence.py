"""Estimators of KL(pi || pi_ref) from the sampled token alone. Legend: T token slots."""

from __future__ import annotations

from torch import Tensor


def k1(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``log pi - log ref``: unbiased, of either sign; as a loss its expected gradient is 0."""
    return logp_T - ref_T


def k2(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``(log pi - log ref)^2 / 2``: biased, and its gradient is that of the true divergence."""
    return (logp_T - ref_T).square() / 2


def k3(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``ref / pi - 1 - log(ref / pi)``: unbiased and never negative."""
    return (ref_T - logp_T).expm1() - (ref_T - logp_T)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""Divergence per token by the name of its ``kl_loss_type``."""
