"""Routing in plain PyTorch: differentiable by autograd, any floating dtype, any device.

Legend: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

# Megatron's guard (moe_utils.topk_routing_with_score_function) against a row of sigmoid scores that are all 0
SUM_EPSILON = 1e-20


def group_mask(selection_TE: Tensor, num_groups: int, group_topk: int) -> Tensor:
    """True at the experts of each token's best ``group_topk`` groups; a group's score is the sum of its best two.

    Experts ``[g * E/num_groups, (g+1) * E/num_groups)`` form group g. Ties: the lowest group is selected.
    """
    tokens, experts = selection_TE.shape
    grouped = selection_TE.view(tokens, num_groups, experts // num_groups)
    group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = top_k(group_scores, group_topk)
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return mask.repeat_interleave(experts // num_groups, dim=1)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices of the k largest, best first; ties: the lowest index (``torch.topk`` does not define their order)."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def select(
    logits_TE: Tensor,
    scores_TE: Tensor,
    topk: int,
    sigmoid: bool,
    expert_bias_E: Tensor | None,
    num_groups: int,
    group_topk: int,
) -> Tensor:
    """The selected experts of each token [T, K], best first.

    Selection is by score (+ bias). Softmax without bias or groups selects by the logits, which have the same order and
    do not tie by underflow.
    """
    plain = not sigmoid and expert_bias_E is None and not num_groups
    selection_TE = logits_TE if plain else scores_TE
    if expert_bias_E is not None:
        selection_TE = selection_TE + expert_bias_E.to(selection_TE.dtype)
    if num_groups:
        allowed_TE = group_mask(selection_TE, num_groups, group_topk)
        selection_TE = selection_TE.masked_fill(~allowed_TE, -torch.inf)
    return top_k(selection_TE, topk)


def weigh(logits_TE: Tensor, scores_TE: Tensor, index_TK: Tensor, kept_TK: Tensor, sigmoid: bool) -> Tensor:
    """Weights [T, K] of the experts ``index_TK``: their scores divided by their sum; 0 if not kept.

    For K = 1 that would always be 1, so the weight is the score itself.
    """
    chosen_TK = scores_TE.gather(1, index_TK).masked_fill(~kept_TK, 0)
    if index_TK.shape[1] == 1:
        return chosen_TK
    if sigmoid:
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + SUM_EPSILON)
    # renormalised softmax equals the softmax of the chosen logits, without 0/0 for tiny scores
    chosen_TK = logits_TE.gather(1, index_TK).masked_fill(~kept_TK, -torch.inf)
    nothing_T1 = ~kept_TK.any(-1, keepdim=True)
    return chosen_TK.masked_fill(nothing_T1, 0).softmax(-1).masked_fill(~kept_TK, 0)


def route(
    logits_TE: Tensor,
    topk: int,
    sigmoid: bool,
    expert_bias_E: Tensor | None,
    num_groups: int,
    group_topk: int,
    scaling_factor: float,
    valid_T: Tensor | None,
    replay_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(probs_TK, experts_TK, counts_E, prob_sum_E, z_sum)``; see ``op.route``."""
    num_experts = logits_TE.shape[1]
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    with torch.no_grad():
        experts_TK = replay_TK
        if experts_TK is None:
            experts_TK = select(logits_TE, scores_TE, topk, sigmoid, expert_bias_E, num_groups, group_topk)
        kept_TK = (experts_TK >= 0) & (experts_TK < num_experts)
        if valid_T is not None:
            kept_TK = kept_TK & valid_T[:, None]
        experts_TK = torch.where(kept_TK, experts_TK, num_experts)
        counts_E = torch.bincount(experts_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]

    probs_TK = weigh(logits_TE, scores_TE, experts_TK.clamp(max=num_experts - 1), kept_TK, sigmoid)
    normalised_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + SUM_EPSILON) if sigmoid else scores_TE
    z_T = logits_TE.logsumexp(-1).square()
    if valid_T is not None:
        normalised_TE = normalised_TE.masked_fill(~valid_T[:, None], 0)
        z_T = z_T.masked_fill(~valid_T, 0)
    return probs_TK * scaling_factor, experts_TK, counts_E, normalised_TE.sum(0), z_T.sum()


def weigh_backward(
    logits_TE: Tensor,
    scores_TE: Tensor,
    experts_TK: Tensor,
    sigmoid: bool,
    scaling_factor: float,
    dprobs_TK: Tensor,
) -> Tensor:
    """From dprobs to the gradient [T, E] of the logits (softmax) or of the scores (sigmoid)."""
    num_experts = logits_TE.shape[1]
    kept_TK = experts_TK < num_experts
    index_TK = experts_TK.clamp(max=num_experts - 1)
    d_TE = torch.zeros_like(logits_TE)
    if experts_TK.shape[1] == 1:
        d_TE.scatter_(1, index_TK, (dprobs_TK * scaling_factor).masked_fill(~kept_TK, 0))
        return d_TE if sigmoid else (d_TE - (d_TE * scores_TE).sum(-1, keepdim=True)) * scores_TE
    dropped = 0 if sigmoid else -torch.inf
    chosen_TK = (scores_TE if sigmoid else logits_TE).gather(1, index_TK).masked_fill(~kept_TK, dropped)
    if not sigmoid:
        chosen_TK = (chosen_TK - chosen_TK.amax(-1, keepdim=True)).exp().masked_fill(~kept_TK, 0)
    epsilon = SUM_EPSILON if sigmoid else 0.0
    sum_T1 = (chosen_TK.sum(-1, keepdim=True) + epsilon).masked_fill(~kept_TK.any(-1, keepdim=True), 1)
    mean_T1 = (dprobs_TK * chosen_TK).sum(-1, keepdim=True) / sum_T1
    # softmax: ds/dlogit is the chosen score itself, relative to the chosen sum
    factor_TK = 1 / sum_T1 if sigmoid else chosen_TK / sum_T1
    d_TK = ((dprobs_TK - mean_T1) * factor_TK * scaling_factor).masked_fill(~kept_TK, 0)
    return d_TE.scatter_add_(1, index_TK, d_TK)


def route_backward(
    logits_TE: Tensor,
    experts_TK: Tensor,
    sigmoid: bool,
    scaling_factor: float,
    valid_T: Tensor | None,
    dprobs_TK: Tensor | None,
    dprob_sum_E: Tensor | None,
    dz_sum: Tensor | None,
) -> Tensor:
    """Gradient of the logits from those of probs, prob_sum and z_sum (None: 0).

    With ``w = a s_k / sum(s chosen)`` and ``q = s / sum(s)``, for scores s (softmax: exp of the logits)::

        ds_k = a (dw_k - <dw, s chosen> / sum) / sum,   ds_e += (dq_e - <dq, s> / sum) / sum

    and ``ds/dlogit`` is s for softmax, s (1 - s) for sigmoid; ``d logsumexp^2 = 2 logsumexp softmax``.
    With K = 1 the weight is ``a s_k / sum(s)`` for softmax, of which q's line is the gradient, and ``a s_k``
    for sigmoid, ``ds_k = a dw_k``.
    """
    p_TE = logits_TE.softmax(-1)
    scores_TE = logits_TE.sigmoid() if sigmoid else p_TE
    epsilon = SUM_EPSILON if sigmoid else 0.0
    dscores_TE = torch.zeros_like(logits_TE)
    if dprobs_TK is not None:
        dscores_TE += weigh_backward(logits_TE, scores_TE, experts_TK, sigmoid, scaling_factor, dprobs_TK)
    if dprob_sum_E is not None:
        sum_T1 = scores_TE.sum(-1, keepdim=True) + epsilon
        mean_T1 = (dprob_sum_E * scores_TE).sum(-1, keepdim=True) / sum_T1
        dscores_TE += (dprob_sum_E - mean_T1) * (1 / sum_T1 if sigmoid else scores_TE)
    dlogits_TE = dscores_TE * scores_TE * (1 - scores_TE) if sigmoid else dscores_TE
    if dz_sum is not None:
        dlogits_TE = dlogits_TE + 2 * dz_sum * logits_TE.logsumexp(-1, keepdim=True) * p_TE
    return dlogits_TE if valid_T is None else dlogits_TE.masked_fill(~valid_T[:, None], 0)
