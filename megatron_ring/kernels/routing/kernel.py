"""Routing in Triton; every launcher has the name and signature of its reference.

Legend: T tokens, E experts (EP: E padded to a power of two), K experts per token, G groups.

No atomics and no host synchronisation, so every result is deterministic. ``route`` is one launch over the
tokens and a small one that sums the per-block statistics in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ring.kernels.routing.reference import SUM_EPSILON

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def best_of(score, open_TE, lane, none):
    """Per row: the largest open score and its lowest index (``none`` if nothing is open)."""
    value = tl.max(tl.where(open_TE, score, -float("inf")), 1)
    index = tl.min(tl.where(open_TE & (score == value[:, None]), lane, none), 1)
    return value, index


@triton.jit
def open_groups(
    score, inside, lane, size, G: tl.constexpr, GP: tl.constexpr, TOP: tl.constexpr, none: tl.constexpr
):
    """True at the experts of each row's best TOP groups; a group's score is the sum of its best two."""
    group_lane = tl.arange(0, GP)[None, :]
    group_score = tl.full([score.shape[0], GP], -float("inf"), score.dtype)
    for g in tl.static_range(G):
        mine = inside & (lane // size == g)
        first, index = best_of(score, mine, lane, none)
        second, _ = best_of(score, mine & (lane != index[:, None]), lane, none)
        both = tl.where(size > 1, first + second, first)
        group_score = tl.where(group_lane == g, both[:, None], group_score)
    group_open = (group_lane < G) & (tl.zeros([score.shape[0], GP], tl.int32) == 0)
    chosen = inside & (lane < 0)
    for _ in tl.static_range(TOP):
        _value, g = best_of(group_score, group_open, group_lane, GP)
        group_open = group_open & (group_lane != g[:, None])
        chosen = chosen | (inside & (lane // size == g[:, None]))
    return chosen


@triton.jit
def softmax_of(x, inside):
    """(softmax [BT, EP], logsumexp [BT]) of each row's real experts."""
    x = tl.where(inside, x, -float("inf"))
    high = tl.max(x, 1)
    e = tl.exp(x - high[:, None])
    mass = tl.sum(e, 1)
    return e / mass[:, None], high + tl.log(mass)


@triton.jit
def choose(
    weighed,
    selection,
    open_TE,
    live,
    t,
    replay_ptr,
    lane,
    k_lane,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    REPLAYED: tl.constexpr,
    BT: tl.constexpr,
):
    """Experts [BT, KP], best first (E: dropped); their entries of ``weighed``; and a 1 at every chosen expert."""
    experts = tl.full([BT, KP], E, tl.int64)
    chosen = tl.zeros([BT, KP], weighed.dtype)
    taken = tl.zeros([BT, EP], tl.int32)
    for k in tl.static_range(K):
        if REPLAYED:
            index = tl.load(replay_ptr + t * K + k, mask=live, other=E)
            index = tl.where((index >= 0) & (index < E), index, E)
        else:
            _value, index = best_of(selection, open_TE, lane, E)
            open_TE = open_TE & (lane != index[:, None])
        index = tl.where(live, index, E)
        hit = (lane == index[:, None]) & (lane < E)
        weight = tl.sum(tl.where(hit, weighed, 0.0), 1)
        experts = tl.where(k_lane == k, index[:, None].to(tl.int64), experts)
        chosen = tl.where(k_lane == k, weight[:, None], chosen)
        taken += hit.to(tl.int32)
    return experts, chosen, taken


@triton.jit
def weights_of(chosen, kept, epsilon: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr):
    """Weights [BT, KP] of the chosen experts: scores divided by their sum; for K = 1 the score itself."""
    if not SIGMOID and K > 1:
        high = tl.max(tl.where(kept, chosen, -float("inf")), 1)
        chosen = tl.exp(chosen - high[:, None])
    chosen = tl.where(kept, chosen, 0.0)
    if K > 1:
        total = tl.sum(chosen, 1) + (epsilon if SIGMOID else 0.0)
        chosen = chosen / total[:, None]
    return chosen


@triton.jit
def weights_backward(x, score, dw_TE, taken, guard, K: tl.constexpr, SIGMOID: tl.constexpr):
    """From the weights' gradient, laid out [BT, EP], to that of the logits (softmax) or scores (sigmoid)."""
    if K == 1:
        d = dw_TE
        if not SIGMOID:
            d = (dw_TE - tl.sum(dw_TE * score, 1)[:, None]) * score
    else:
        chosen = score
        if not SIGMOID:
            high = tl.max(tl.where(taken, x, -float("inf")), 1)
            chosen = tl.exp(x - high[:, None])
        chosen = tl.where(taken, chosen, 0.0)
        total = tl.sum(chosen, 1) + guard
        total = tl.where(total > 0, total, 1.0)
        mean = tl.sum(dw_TE * chosen, 1) / total
        factor = chosen / total[:, None]
        if SIGMOID:
            factor = tl.where(taken, 1.0, 0.0) / total[:, None]
        d = (dw_TE - mean[:, None]) * factor
    return d


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    valid_ptr,
    replay_ptr,
    probs_ptr,
    experts_ptr,
    counts_ptr,
    sums_ptr,
    tokens,
    scaling: tl.constexpr,
    epsilon: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    REPLAYED: tl.constexpr,
    BT: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    lane = tl.arange(0, EP)[None, :]
    k_lane = tl.arange(0, KP)[None, :]
    real = t < tokens
    live = real
    if MASKED:
        live = live & (tl.load(valid_ptr + t, mask=real, other=0) != 0)
    inside = real[:, None] & (lane < E)
    x = tl.load(logits_ptr + t[:, None] * E + lane, mask=inside, other=0.0)
    p, lse = softmax_of(x, lane < E)
    score = p
    if SIGMOID:
        score = tl.where(lane < E, 1.0 / (1.0 + tl.exp(-x)), 0.0)

    selection = score
    # softmax keeps the order of its logits, and logits do not tie by underflow
    if not SIGMOID and not BIASED and G == 0:
        selection = x
    if BIASED:
        selection = selection + tl.load(bias_ptr + lane, mask=lane < E, other=0.0).to(selection.dtype)
    open_TE = inside
    if G > 0 and not REPLAYED:
        open_TE = open_groups(selection, inside, lane, E // G, G, GP, TOP, EP)

    # weights of softmax with K > 1 use the logits: no 0/0 for tiny scores
    weighed = score
    if not SIGMOID and K > 1:
        weighed = x
    experts, chosen, taken = choose(
        weighed, selection, open_TE, live, t, replay_ptr, lane, k_lane, E, EP, K, KP, REPLAYED, BT
    )
    kept = (experts < E) & (k_lane < K)
    probs = tl.where(kept, weights_of(chosen, kept, epsilon, K, SIGMOID) * scaling, 0.0)
    out = real[:, None] & (k_lane < K)
    tl.store(probs_ptr + t[:, None] * K + k_lane, probs, mask=out)
    tl.store(experts_ptr + t[:, None] * K + k_lane, experts, mask=out)

    if SIGMOID:
        score = score / (tl.sum(score, 1) + epsilon)[:, None]
    score = tl.where(live[:, None] & (lane < E), score, 0.0)
    column = tl.arange(0, EP)
    tl.store(counts_ptr + block * E + column, tl.sum(taken, 0), mask=column < E)
    tl.store(sums_ptr + block * (E + 1) + column, tl.sum(score, 0), mask=column < E)
    tl.store(sums_ptr + block * (E + 1) + E, tl.sum(tl.where(live, lse * lse, 0.0), 0))


@triton.jit(do_not_specialize=["blocks"])
def route_sum_kernel(counts_ptr, sums_ptr, count_ptr, sum_ptr, blocks, E, BB: tl.constexpr, BE: tl.constexpr):
    column = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.arange(0, BB)[:, None].to(tl.int64)
    count = tl.zeros([BE], tl.int64)
    total = tl.zeros([BE], sum_ptr.dtype.element_ty)
    for start in range(0, blocks, BB):
        b = start + row
        part = tl.load(counts_ptr + b * E + column, mask=(b < blocks) & (column < E)[None, :], other=0)
        count += tl.sum(part.to(tl.int64), 0)
        sums = tl.load(sums_ptr + b * (E + 1) + column, mask=(b < blocks) & (column <= E)[None, :], other=0.0)
        total += tl.sum(sums, 0)
    tl.store(count_ptr + column, count, mask=column < E)
    tl.store(sum_ptr + column, total, mask=column <= E)


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    logits_ptr,
    experts_ptr,
    valid_ptr,
    dprobs_ptr,
    dsum_ptr,
    dz_ptr,
    out_ptr,
    tokens,
    scaling: tl.constexpr,
    epsilon: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    MASKED: tl.constexpr,
    PROBS: tl.constexpr,
    STATISTIC: tl.constexpr,
    SQUARE: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, EP)[None, :]
    real = t < tokens
    live = real
    if MASKED:
        live = live & (tl.load(valid_ptr + t, mask=real, other=0) != 0)
    inside = real[:, None] & (lane < E)
    x = tl.load(logits_ptr + t[:, None] * E + lane, mask=inside, other=0.0)
    p, lse = softmax_of(x, lane < E)
    score = p
    guard = 0.0
    if SIGMOID:
        score = tl.where(lane < E, 1.0 / (1.0 + tl.exp(-x)), 0.0)
        guard = epsilon
    d = tl.zeros([BT, EP], x.dtype)
    if PROBS:
        taken = inside & (lane < 0)
        dw_TE = d
        for k in tl.static_range(K):
            index = tl.load(experts_ptr + t * K + k, mask=real, other=E)
            dw = tl.load(dprobs_ptr + t * K + k, mask=real, other=0.0).to(x.dtype)
            hit = (lane == index[:, None]) & (lane < E)
            taken = taken | hit
            dw_TE += tl.where(hit, dw[:, None], 0.0)
        d += weights_backward(x, score, dw_TE, taken, guard, K, SIGMOID) * scaling
    if STATISTIC:
        dsum = tl.load(dsum_ptr + lane, mask=lane < E, other=0.0).to(x.dtype)
        total = tl.sum(score, 1) + guard
        mean = tl.sum(dsum * score, 1) / total
        factor = score
        if SIGMOID:
            factor = 1.0 / total[:, None]
        d += (dsum - mean[:, None]) * factor
    if SIGMOID:
        d = d * score * (1.0 - score)
    if SQUARE:
        d += 2.0 * tl.load(dz_ptr).to(x.dtype) * lse[:, None] * p
    d = tl.where(live[:, None], d, 0.0)
    tl.store(out_ptr + t[:, None] * E + lane, d, mask=inside)


def _tokens_per_block(padded_experts: int, scores: int = 2048) -> int:
    """So many that a tile has about ``scores`` scores: 2048 are 16 values per thread."""
    return max(1, min(32, scores // padded_experts))


def _tokens_per_backward_block(padded_experts: int) -> int:
    """Half as many: the backward pass holds two more tiles and must not spill registers."""
    return _tokens_per_block(padded_experts, 1024)


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
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    padded = triton.next_power_of_2(experts)
    bt = _tokens_per_block(padded)
    blocks = triton.cdiv(tokens, bt)
    probs_TK = logits_TE.new_empty(tokens, topk)
    experts_TK = torch.empty(tokens, topk, dtype=torch.int64, device=logits_TE.device)
    block_counts = torch.empty(blocks, experts, dtype=torch.int32, device=logits_TE.device)
    block_sums = logits_TE.new_empty(blocks, experts + 1)
    if tokens:
        route_kernel[(blocks,)](
            logits_TE,
            expert_bias_E,
            None if valid_T is None else valid_T.contiguous(),
            None if replay_TK is None else replay_TK.contiguous(),
            probs_TK,
            experts_TK,
            block_counts,
            block_sums,
            tokens,
            scaling=scaling_factor,
            epsilon=SUM_EPSILON,
            E=experts,
            EP=padded,
            K=topk,
            KP=triton.next_power_of_2(topk),
            G=num_groups,
            GP=triton.next_power_of_2(max(num_groups, 1)),
            TOP=group_topk,
            SIGMOID=sigmoid,
            BIASED=expert_bias_E is not None,
            MASKED=valid_T is not None,
            REPLAYED=replay_TK is not None,
            BT=bt,
            **OPTIONS,
        )
    counts_E = torch.empty(experts, dtype=torch.int64, device=logits_TE.device)
    sums = logits_TE.new_empty(experts + 1)
    be = min(16, padded)
    route_sum_kernel[(triton.cdiv(experts + 1, be),)](
        block_counts, block_sums, counts_E, sums, blocks, experts, BB=128, BE=be, **OPTIONS
    )
    return probs_TK, experts_TK, counts_E, sums[:experts], sums[experts]


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
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    padded = triton.next_power_of_2(experts)
    bt = _tokens_per_backward_block(padded)
    out_TE = torch.empty_like(logits_TE)
    if tokens:
        route_backward_kernel[(triton.cdiv(tokens, bt),)](
            logits_TE,
            experts_TK.contiguous(),
            None if valid_T is None else valid_T.contiguous(),
            None if dprobs_TK is None else dprobs_TK.contiguous(),
            None if dprob_sum_E is None else dprob_sum_E.contiguous(),
            dz_sum,
            out_TE,
            tokens,
            scaling=scaling_factor,
            epsilon=SUM_EPSILON,
            E=experts,
            EP=padded,
            K=experts_TK.shape[1],
            SIGMOID=sigmoid,
            MASKED=valid_T is not None,
            PROBS=dprobs_TK is not None,
            STATISTIC=dprob_sum_E is not None,
            SQUARE=dz_sum is not None,
            BT=bt,
            **OPTIONS,
        )
    return out_TE
