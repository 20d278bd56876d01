"""Estimators of KL(pi || pi_ref) from the sampled token alone. Legend: T token slots."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log ratios are held within plus and minus this, so that their exponential is finite in fp32."""
K3_LIMIT = 10.0
"""Largest k3 of a token; it is reached at a log ratio of about 2.6."""


def k1(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``log pi - log ref``: unbiased, of either sign; as a loss its expected gradient is 0."""
    return logp_T - ref_T


def k2(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``(log pi - log ref)^2 / 2``: biased, and its gradient is that of the true divergence."""
    return (logp_T - ref_T).square() / 2


def k3(logp_T: Tensor, ref_T: Tensor) -> Tensor:
    """``ref / pi - 1 - log(ref / pi)``: unbiased and never negative.

    The log ratio is held within +-20 and the result within 10, as verl does: a token beyond them has no gradient.
    """
    log_ratio_T = (ref_T - logp_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (log_ratio_T.expm1() - log_ratio_T).clamp(max=K3_LIMIT)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""Divergence per token by the name of its ``kl_loss_type``."""
