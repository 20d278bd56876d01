"""Every op again, in plain torch with autograd: the fp64 reference of tools/gpu/right.py.

Nothing of megatron_ring.kernels runs here, so that a bug in an op's own autograd function is found as well.
Slow, and wasteful of memory. The signatures and the legend are those of the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def _added_into(weight: Tensor, buffer: Tensor | None) -> Tensor:
    """The weight, or a stand-in whose gradient is added to the buffer."""
    if buffer is None:
        return weight
    other = weight.detach().requires_grad_()
    other.register_hook(buffer.add_)
    return other


def _by_expert(rows: Tensor, offsets_e: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows, then the dropped ones."""
    ends = [0, *offsets_e.tolist(), len(rows)]
    return rows.split([end - begin for begin, end in pairwise(ends)])


def grouped_gemm(
    x_ND: Tensor, w_eFD: Tensor, offsets_e: Tensor, *, main_grad_eFD: Tensor | None = None
) -> Tensor:
    *experts, nobody_nD = _by_expert(x_ND, offsets_e)
    w_eFD = _added_into(w_eFD, main_grad_eFD)
    made = [x_nD @ w_FD.t() for x_nD, w_FD in zip(experts, w_eFD.unbind(), strict=True)]
    return torch.cat([*made, nobody_nD.new_zeros(len(nobody_nD), w_eFD.shape[1])])


def expert_mlp(
    x_ND: Tensor,
    w_up_e2FD: Tensor,
    w_down_eDF: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None = None,
    *,
    main_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    main_up, main_down = main_grads or (None, None)
    up_2eFD = _added_into(w_up_e2FD, main_up).unbind(1)
    gate_NF, up_NF = (grouped_gemm(x_ND, w_eFD, offsets_e) for w_eFD in up_2eFD)
    h_NF = silu(gate_NF) * up_NF
    if probs_N is not None:
        h_NF = h_NF * probs_N[:, None]
    return grouped_gemm(h_NF, _added_into(w_down_eDF, main_down), offsets_e)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight_D


def qk_norm_rope(mixed_TGMC: Tensor, rotary_2TH: Tensor, norms: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    q_TGRC, k_TGC, v_TGC = mixed_TGMC[:, :, :-2], mixed_TGMC[:, :, -2], mixed_TGMC[:, :, -1]
    if norms is not None:
        q_TGRC = rms_norm(q_TGRC, norms.q_weight_C, norms.eps)
        k_TGC = rms_norm(k_TGC, norms.k_weight_C, norms.eps)
    half = rotary_2TH.shape[-1]
    turn_TH = torch.complex(*rotary_2TH)

    def turned(x_TNC: Tensor) -> Tensor:
        pair = torch.complex(x_TNC[..., :half].contiguous(), x_TNC[..., half : 2 * half].contiguous())
        pair = pair * turn_TH[:, None]
        return torch.cat((pair.real, pair.imag, x_TNC[..., 2 * half :]), -1)

    return turned(q_TGRC.flatten(1, 2)), turned(k_TGC), v_TGC


def route(
    logits_TE: Tensor,
    *,
    topk: int,
    score_function: str = "softmax",
    expert_bias_E: Tensor | None = None,
    num_groups: int = 0,
    group_topk: int = 0,
    scaling_factor: float = 1.0,
    valid_T: Tensor | None = None,
    replay_TK: Tensor | None = None,
) -> tuple[Tensor, ...]:
    T, E = logits_TE.shape
    score_TE = logits_TE.sigmoid() if score_function == "sigmoid" else logits_TE.softmax(-1)
    experts_TK = replay_TK
    if experts_TK is None:
        chosen_by_TE = score_TE.detach() + (0 if expert_bias_E is None else expert_bias_E)
        if num_groups:
            groups_TGe = chosen_by_TE.view(T, num_groups, -1)
            best_TG = groups_TGe.topk(min(2, groups_TGe.shape[-1])).values.sum(-1)
            open_TG = torch.zeros_like(best_TG).scatter_(1, best_TG.topk(group_topk).indices, 1.0)
            chosen_by_TE = groups_TGe.where(open_TG[:, :, None] > 0, -torch.inf).view(T, E)
        experts_TK = chosen_by_TE.topk(topk).indices
    valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if valid_T is None else valid_T
    kept_TK = (experts_TK >= 0) & (experts_TK < E) & valid_T[:, None]
    probs_TK = score_TE.gather(1, experts_TK.where(kept_TK, 0)) * kept_TK
    if topk > 1:
        probs_TK = probs_TK / (probs_TK.sum(-1, keepdim=True) + 1e-20)
    experts_TK = experts_TK.where(kept_TK, E)
    counts_E = torch.stack([(experts_TK == expert).sum() for expert in range(E)])
    share_TE = score_TE / score_TE.sum(-1, keepdim=True)
    z_T = logits_TE.logsumexp(-1).pow(2)
    return probs_TK * scaling_factor, experts_TK, counts_E, share_TE[valid_T].sum(0), z_T[valid_T].sum()


def route_index(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slot_N = experts_TK.flatten()
    slot_N = slot_N.where((slot_N >= 0) & (slot_N < num_experts), num_experts)
    order_N = slot_N.argsort(stable=True)
    kept_N = slot_N[order_N] < num_experts
    rows_N = torch.arange(len(order_N), device=order_N.device).where(kept_N, -1)
    position_N = torch.empty_like(order_N).index_copy_(0, order_N, rows_N)
    ends = [(slot_N <= expert).sum() for expert in range(num_experts)]
    gather_N = (order_N // experts_TK.shape[1]).where(kept_N, 0)
    return torch.stack(ends), gather_N, position_N.view(experts_TK.shape)


def permute(x_TD: Tensor, index: Any) -> Tensor:
    filled = int(index.offsets_E[-1])
    empty_ND = x_TD.new_zeros(len(index.gather_N) - filled, x_TD.shape[1])
    return torch.cat((x_TD[index.gather_N[:filled]], empty_ND))


def combine(y_ND: Tensor, index: Any, weights_TK: Tensor | None = None) -> Tensor:
    with_zero = torch.cat((y_ND, torch.zeros_like(y_ND[:1])))
    # a dropped slot's -1 is the last row
    rows_TKD = with_zero[index.position_TK]
    return (rows_TKD if weights_TK is None else rows_TKD * weights_TK[:, :, None]).sum(1)


def token_logprob(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    with_entropy: bool = True,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    columns = logits_TV.shape[1] if vocab_size is None else vocab_size - vocab_start
    logp_TV = (logits_TV[:, :columns] / temperature).log_softmax(-1)
    here_T = (targets_T >= vocab_start) & (targets_T < vocab_start + logp_TV.shape[1])
    logp_T = logp_TV.gather(1, (targets_T - vocab_start).where(here_T, 0)[:, None])[:, 0] * here_T
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1) * here_T
    return logp_T, entropy_T if with_entropy else None


def decode_attention(
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    keys_SLGC: Tensor,
    values_SLGC: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    scale: float,
    norms: Any = None,
) -> Tensor:
    q_TNC, k_TGC, v_TGC = qk_norm_rope(mixed_TGMC, rotary_2TH, norms)
    keys_SLGC[rows_T, positions_T], values_SLGC[rows_T, positions_T] = k_TGC, v_TGC
    made = []
    for q_NC, row, position in zip(q_TNC, rows_T.tolist(), positions_T.tolist(), strict=True):
        k_GlC, v_GlC = (cache[row, : position + 1].transpose(0, 1) for cache in (keys_SLGC, values_SLGC))
        q_GRC = q_NC.view(len(k_GlC), -1, q_NC.shape[-1])
        made.append((((q_GRC @ k_GlC.mT) * scale).softmax(-1) @ v_GlC).flatten(0, 1))
    return torch.stack(made)


def sample_token(
    logits_TV: Tensor, uniform_T: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    logp_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens_T = logits_TV.argmax(-1)
        return tokens_T, logp_TV.gather(1, tokens_T[:, None])[:, 0]
    tokens = []
    for row_V, p_V, uniform in zip(logits_TV, logp_TV.exp(), uniform_T, strict=True):
        best_V, order_V = row_V.sort(descending=True)
        mass_V = p_V[order_V][: top_k or None].cumsum(0)
        number = int((mass_V < top_p * mass_V[-1]).sum()) + 1 if top_p < 1 else len(mass_V)
        # tokens that tie with the last one are allowed too
        here_V = p_V.where(row_V >= best_V[number - 1], 0).cumsum(0)
        tokens.append((here_V > uniform * here_V[-1]).long().argmax())
    tokens_T = torch.stack(tokens)
    return tokens_T, logp_TV.gather(1, tokens_T[:, None])[:, 0]


OPS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        combine, decode_attention, expert_mlp, grouped_gemm, permute, qk_norm_rope, rms_norm, route, route_index,
        sample_token, token_logprob,
    )
}  # fmt: skip
