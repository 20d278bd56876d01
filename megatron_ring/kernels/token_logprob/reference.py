"""Log-probability and entropy in plain PyTorch, in row chunks that bound the memory; any floating dtype.

Legend: T tokens, V vocabulary columns of this rank. With the shard's maximum logit m and temperature tau, a
shard is reduced to four numbers per token (``token_logprob_partials``)::

    m = max x,  z = (x - m) / tau,  s = sum exp(z),  a = sum z exp(z),  x_target (+inf: in another shard)

which ``merge`` combines over shards. Subtracting the maximum keeps log p and entropy accurate for logits far from 0,
and also handles a shard of -inf only.
"""

import torch
from torch import Tensor

# elements per chunk: 8 MiB of fp32 scratch
_CHUNK = 1 << 21


def _chunks(logits_TV: Tensor):
    rows = max(1, _CHUNK // max(1, logits_TV.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits_TV.shape[0], rows)]


def _wide(logits_tV: Tensor) -> Tensor:
    return logits_tV.float() if logits_tV.element_size() == 2 else logits_tV


def token_logprob_partials(logits_TV: Tensor, local_T: Tensor, columns: int, temperature: float) -> Tensor:
    """[T, 4] partial sums of this shard. ``local_T``: the target's column; -1 in another shard, -2 to skip the row."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    out_T4 = torch.zeros(logits_TV.shape[0], 4, dtype=wide, device=logits_TV.device)
    out_T4[:, 0], out_T4[:, 3] = -torch.inf, torch.inf
    if not columns:
        return out_T4
    for rows in _chunks(logits_TV):
        x_tV, local_t = _wide(logits_TV[rows, :columns]), local_T[rows]
        m_t = x_tV.amax(-1)
        z_tV = (x_tV - m_t.masked_fill(m_t == -torch.inf, 0)[:, None]) / temperature
        exp_tV = z_tV.exp()
        # where exp underflows z may be -inf, and 0 * -inf is not 0
        moment_t = (exp_tV * z_tV.clamp(min=-1e4)).sum(-1)
        target_t = (
            x_tV.gather(1, local_t.clamp(min=0)[:, None]).squeeze(1).masked_fill(local_t < 0, torch.inf)
        )
        merged_t4 = torch.stack([m_t, exp_tV.sum(-1), moment_t, target_t], dim=1)
        out_T4[rows] = torch.where(local_t[:, None] == -2, out_T4[rows], merged_t4)
    return out_T4


def merge(partials_RT4: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(logp_T, entropy_T, max_T, log_sum_T, found_T)`` from the partials of R shards.

    ``log p(x) = (x - max) / temperature - log_sum``. If no shard has the target, log p and entropy are 0.
    """
    m_RT, s_RT, a_RT, target_RT = partials_RT4.unbind(-1)
    max_T, target_T = m_RT.amax(0), target_RT.amin(0)
    empty_RT = m_RT == -torch.inf
    shift_RT = ((m_RT - max_T) / temperature).masked_fill(empty_RT, 0)
    scale_RT = shift_RT.exp().masked_fill(empty_RT, 0)
    s_T = (scale_RT * s_RT).sum(0)
    a_T = (scale_RT * (a_RT + shift_RT * s_RT)).sum(0)
    log_sum_T = s_T.log()
    found_T = target_T != torch.inf
    logp_T = ((target_T - max_T) / temperature - log_sum_T).masked_fill(~found_T, 0)
    entropy_T = (log_sum_T - a_T / s_T).masked_fill(~found_T, 0)
    return logp_T, entropy_T, max_T, log_sum_T, found_T


def token_logprob_gradient(
    logits_TV: Tensor,
    local_T: Tensor,
    columns: int,
    temperature: float,
    max_T: Tensor,
    log_sum_T: Tensor,
    entropy_T: Tensor,
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    out_TV: Tensor,
) -> None:
    """Write d logits of this shard into ``out_TV`` (which may be the logits themselves).

    ``d logit_v = (dlogp (1[v = target] - p_v) - dentropy p_v (log p_v + entropy)) / temperature``.
    Rows with ``local_T`` -2 get zeros.
    """
    for rows in _chunks(logits_TV):
        local_t = local_T[rows]
        x_tV = _wide(logits_TV[rows, :columns])
        logp_tV = (x_tV - max_T[rows, None]) / temperature - log_sum_T[rows, None]
        p_tV = logp_tV.exp()
        factor_tV = -dlogp_T[rows, None]
        if dentropy_T is not None:
            # where p underflows to 0, log p may be -inf: the product is 0
            centred_tV = (logp_tV + entropy_T[rows, None]).masked_fill_(p_tV == 0, 0)
            factor_tV = factor_tV - dentropy_T[rows, None] * centred_tV
        dx_tV = p_tV * factor_tV
        mine_t = local_t >= 0
        dx_tV.scatter_add_(1, local_t.clamp(min=0)[:, None], (dlogp_T[rows] * mine_t)[:, None])
        dx_tV.masked_fill_(local_t[:, None] == -2, 0)
        out_TV[rows, :columns] = (dx_tV / temperature).to(out_TV.dtype)
    out_TV[:, columns:] = 0
