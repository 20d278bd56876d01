"""``sample_token``: inverse-CDF sampling with given uniform numbers, and log p of the sampled token.

Legend: T rows, V vocabulary.
"""

import torch
from torch import Tensor

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import dispatch
from megatron_ring.kernels.sample_token.reference import cumulated


@torch.no_grad()
def sample_token(
    logits_TV: Tensor, uniform_T: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """``(tokens_T int64, logp_T)``: a token of each row, and its log p under ``softmax(logits / temperature)``.

    The token is the first, in vocabulary order, at which the cumulative mass of the allowed tokens exceeds
    ``uniform`` (in [0, 1)) of their total. ``top_k`` > 0 allows the K most likely tokens; ``top_p`` < 1 then allows the
    most likely of these up to ``top_p`` of their mass. Ties with the last allowed token are allowed too. log p is that
    of the full softmax, without ``top_k`` and ``top_p``, in fp32 (fp64 for fp64 logits). Temperature 0 takes the most
    likely token (ties: the lowest index), with log p at temperature 1. A row with NaN or +inf gives any token of the
    vocabulary and log p NaN.

    Example, p = [.5, .25, .25]::

        logits = log p, uniform = .6                ->  token 1, log p -1.3863
        logits = log p, uniform = .6, top_k = 1     ->  token 0, log p -.6931
    """
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}: need temperature >= 0, 0 < top_p <= 1 "
            "and top_k >= 0"
        )
    if temperature == 0:
        return _greedy(logits_TV)
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    threshold_T = _threshold(logits_TV, temperature, top_p, top_k)
    kernels = dispatch.implementation(logits_TV, "sample_token")
    return kernels.sample_token(logits_TV, uniform_T, temperature, threshold_T)


def _greedy(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    tokens_T = wide_TV.argmax(-1)
    return tokens_T, wide_TV.gather(1, tokens_T[:, None]).squeeze(1) - wide_TV.logsumexp(-1)


def _threshold(logits_TV: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor | None:
    """The smallest allowed logit of each row; None if all are allowed."""
    V = logits_TV.shape[1]
    bounded = 0 < top_k < V
    if top_p >= 1:
        return logits_TV.topk(top_k, -1).values[:, -1].contiguous() if bounded else None
    kept = top_k if bounded else V
    best_TK = logits_TV.topk(kept, -1).values
    mass_TK = (best_TK.double() / temperature).softmax(-1)
    before_TK = cumulated(mass_TK) - mass_TK
    # the best token is always allowed; clamp is for rows that are not finite, where no comparison is true
    last_T = ((before_TK < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
    return best_TK.gather(1, last_T).squeeze(1)
