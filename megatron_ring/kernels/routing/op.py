"""``route``: scores, top-k and statistics, with one backward.

Legend: T tokens, E experts, K experts per token.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import dispatch


class Routing(NamedTuple):
    """The router's result for T tokens.

    Example, two tokens and three experts, top-2, softmax; the second token is padding::

        logits = [[1., 0., 1.], [9., 9., 9.]], valid = [True, False]
        probs = [[.5, .5], [0., 0.]], experts = [[0, 2], [3, 3]], counts = [1, 0, 1]

    and top-1 of two experts, where the weight is the score: logits = [[1., 1.]], probs = [[.5]], experts = [[0]].
    """

    probs_TK: Tensor
    """combine weights, fp32 (fp64 for fp64 logits); 0 if dropped"""
    experts_TK: Tensor
    """int64 expert ids, best first; E if dropped"""
    counts_E: Tensor
    """int64 assignments of valid tokens to each expert"""
    prob_sum_E: Tensor
    """sum over valid tokens of the softmax probabilities, or of the sigmoid scores divided by their row's sum"""
    z_sum: Tensor
    """sum over valid tokens of logsumexp(logits)^2, a scalar"""


def route(
    logits_TE: Tensor,
    *,
    topk: int,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    renormalise: bool = True,
    expert_bias_E: Tensor | None = None,
    num_groups: int = 0,
    group_topk: int = 0,
    scaling_factor: float = 1.0,
    valid_T: Tensor | None = None,
    replay_TK: Tensor | None = None,
) -> Routing:
    """Select K experts per token and their weights; probs, prob_sum and z_sum are differentiable in the logits.

    softmax: scores are the softmax over all E; weights are the chosen scores, renormalised to ``scaling_factor``.
    sigmoid: weights are the chosen *unbiased* scores / (their sum + 1e-20) * ``scaling_factor``.
    ``renormalise=False``: the weights are the chosen (unbiased) scores as they are, times ``scaling_factor``, as in
    Qwen3-MoE's gate without ``norm_topk_prob``.
    ``topk=1``: the weight is the (unbiased) score * ``scaling_factor``, as in the gates published with BailingMoe
    and BailingMoeV2 (``BailingMoeGate``, ``BailingMoeV2Gate``); divided by its own sum it would be constant.
    ``expert_bias_E`` is added for selection only and gets no gradient. With ``num_groups``, experts are selected from
    the best ``group_topk`` groups of consecutive experts; a group's score is the sum of its best two.
    Among equal scores the lowest expert index is selected, on every backend.

    A token with ``valid_T`` False is dropped: its experts are all E, its probs 0, and it is in no statistic.
    ``replay_TK`` sets the experts (weights still come from the full scores); ids outside [0, E) are dropped.

    Saved for backward: the logits, the chosen experts and ``valid_T``; scores are recomputed.
    """
    _check(logits_TE, topk, score_function, num_groups, group_topk, replay_TK)
    if logits_TE.element_size() == 2:
        logits_TE = logits_TE.float()
    if replay_TK is not None:
        replay_TK = replay_TK.long()
    sigmoid = score_function == "sigmoid"
    options = (topk, sigmoid, expert_bias_E, num_groups, group_topk, scaling_factor, valid_T, replay_TK)
    if torch.is_grad_enabled():
        routing = Routing(*_Route.apply(logits_TE, options))
    else:
        routing = Routing(*dispatch.implementation(logits_TE, "routing").route(logits_TE, *options))
    if renormalise or topk == 1:
        return routing
    # the kernels choose and count; this gate is rare enough that its weights are plain torch on every backend
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    kept_TK = routing.experts_TK < logits_TE.shape[1]
    chosen_TK = scores_TE.gather(1, routing.experts_TK.clamp(max=logits_TE.shape[1] - 1))
    return routing._replace(probs_TK=(chosen_TK * scaling_factor).masked_fill(~kept_TK, 0))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, options):
        _, ctx.sigmoid, _, _, _, ctx.scaling_factor, valid_T, _ = options
        kernels = dispatch.implementation(logits_TE, "routing")
        probs_TK, experts_TK, counts_E, prob_sum_E, z_sum = kernels.route(logits_TE, *options)
        ctx.save_for_backward(logits_TE, experts_TK, valid_T)
        ctx.mark_non_differentiable(experts_TK, counts_E)
        ctx.set_materialize_grads(False)
        return probs_TK, experts_TK, counts_E, prob_sum_E, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, dprobs_TK, _dexperts, _dcounts, dprob_sum_E, dz_sum):
        logits_TE, experts_TK, valid_T = ctx.saved_tensors
        kernels = dispatch.implementation(logits_TE, "routing")
        dlogits_TE = kernels.route_backward(
            logits_TE, experts_TK, ctx.sigmoid, ctx.scaling_factor, valid_T, dprobs_TK, dprob_sum_E, dz_sum
        )
        return dlogits_TE, None


def _check(
    logits_TE: Tensor,
    topk: int,
    score_function: str,
    num_groups: int,
    group_topk: int,
    replay_TK: Tensor | None,
) -> None:
    num_experts = logits_TE.shape[1]
    if score_function not in ("softmax", "sigmoid"):
        raise ConfigError(f"score_function={score_function!r} is not known; use 'softmax' or 'sigmoid'")
    if not 1 <= topk <= num_experts:
        raise ConfigError(f"topk={topk} must be in 1..num_experts={num_experts}")
    if num_groups:
        if num_experts % num_groups:
            raise ConfigError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        if not 1 <= group_topk <= num_groups:
            raise ConfigError(f"group_topk={group_topk} must be in 1..num_groups={num_groups}")
        if group_topk * (num_experts // num_groups) < topk:
            raise ConfigError(
                f"group_topk={group_topk} groups of {num_experts // num_groups} experts have fewer than "
                f"topk={topk}; raise group_topk"
            )
    if replay_TK is not None and replay_TK.shape != (logits_TE.shape[0], topk):
        raise ConfigError(
            f"replay of shape {tuple(replay_TK.shape)} must be [T, topk] = {(logits_TE.shape[0], topk)}"
        )
