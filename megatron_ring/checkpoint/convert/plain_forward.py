"""A forward pass over the tensors of a Hugging Face folder, layer by layer, in fp32: the other side of
``--check-logits``.

It reads each tensor when it needs it and keeps none, so a model of any size fits. Legend: T tokens, D model
width, H query heads, G key/value heads, C channels per head, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.checkpoint.convert.files import Source
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.config.model import ModelConfig
from megatron_ring.families import FAMILIES, TensorNames
from megatron_ring.families.shared import NORM_HEAD_EPSILON
from megatron_ring.kernels import route
from megatron_ring.kernels.qk_norm_rope.reference import rotate
from megatron_ring.model.packed import rotary_table

Read = Callable[[str], Tensor]


def plain_logits(
    source: Source, model: ModelConfig, tokens_T: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [T, V] of one sequence; weights (all but the expert bias) are rounded to ``dtype`` first."""
    names = FAMILIES[model.family].tensors

    def rounded(weight: Tensor) -> Tensor:
        return (weight if dtype is None else weight.to(dtype)).float()

    def read(name: str) -> Tensor:
        tensor = _whole(source, name)
        return tensor.float() if name.endswith(names.expert_bias) else rounded(tensor)

    x_TD = rounded(_whole(source, f"{names.embedding}.weight")[tokens_T])
    for layer in range(model.num_layers):
        prefix = names.layer.format(layer)

        def part(name: str, prefix: str = prefix) -> Tensor:
            return read(prefix + name)

        attended_TD = _norm(x_TD, part(f"{names.attention_norm}.weight"), model)
        x_TD = x_TD + _attention(part, names, model, attended_TD)
        normed_TD = _norm(x_TD, part(f"{names.mlp_norm}.weight"), model)
        if model.is_moe_layer(layer):
            x_TD = x_TD + _experts(part, names, model, normed_TD)
        else:
            x_TD = x_TD + _mlp(part, names, normed_TD, names.mlp)
    x_TD = _norm(x_TD, read(f"{names.final_norm}.weight"), model)
    untied = model.untie_embeddings_and_output_weights
    head_VD = read(f"{names.head if untied else names.embedding}.weight")
    if model.norm_head:
        x_TD = x_TD / (head_VD.norm(dim=0) + NORM_HEAD_EPSILON)
    return x_TD @ head_VD.T


def _whole(source: Source, name: str) -> Tensor:
    ((_, view),) = source.views(name, Box.whole(source.tensors[name].shape))
    return view


def _norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, model.norm_epsilon)


def _attention(part: Read, names: TensorNames, model: ModelConfig, x_TD: Tensor) -> Tensor:
    H, G, C, T = model.num_attention_heads, model.num_query_groups, model.kv_channels, len(x_TD)
    projected = [
        F.linear(x_TD, part(f"{name}.weight"), part(f"{name}.bias") if model.add_qkv_bias else None)
        for name in names.qkv
    ]
    q, k, v = torch.cat(projected, dim=-1).split([H * C, G * C, G * C], dim=-1)
    q_THC, k_TGC, v_TGC = q.view(T, H, C), k.view(T, G, C), v.view(T, G, C)
    if model.qk_layernorm:
        q_THC = _norm(q_THC, part(f"{names.q_norm}.weight"), model)
        k_TGC = _norm(k_TGC, part(f"{names.k_norm}.weight"), model)
    table = rotary_table(torch.arange(T), C, model.rotary_percent, model.rotary_base)
    q_HTC, k_GTC, v_GTC = (
        x.transpose(0, 1)[None] for x in (_rotate(q_THC, table), _rotate(k_TGC, table), v_TGC)
    )
    mixed = F.scaled_dot_product_attention(q_HTC, k_GTC, v_GTC, is_causal=True, enable_gqa=True)
    return F.linear(mixed[0].transpose(0, 1).reshape(T, H * C), part(f"{names.attention_output}.weight"))


def _rotate(x_THC: Tensor, rotary_2TH: Tensor) -> Tensor:
    return rotate(x_THC.unsqueeze(2), rotary_2TH).squeeze(2)


def _mlp(part: Read, names: TensorNames, x_TD: Tensor, prefix: str) -> Tensor:
    gate, up, down = (part(f"{prefix}{name}.weight") for name in names.gate_up_down)
    return F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)


def _experts(part: Read, names: TensorNames, model: ModelConfig, x_TD: Tensor) -> Tensor:
    routing = route(
        F.linear(x_TD, part(f"{names.router}.weight")),
        topk=model.moe_router_topk,
        score_function=model.moe_router_score_function,
        renormalise=not model.moe_router_pre_softmax,
        expert_bias_E=part(names.expert_bias) if model.moe_router_enable_expert_bias else None,
        num_groups=model.moe_router_num_groups,
        group_topk=model.moe_router_group_topk,
        scaling_factor=model.moe_router_topk_scaling_factor,
    )
    output_TD = torch.zeros_like(x_TD)
    if model.moe_shared_expert_intermediate_size:
        output_TD = _mlp(part, names, x_TD, names.shared_experts)
    for expert in routing.experts_TK.unique().tolist():
        tokens, choices = (routing.experts_TK == expert).nonzero(as_tuple=True)
        rows_ND = _mlp(part, names, x_TD[tokens], names.expert.format(expert))
        output_TD.index_add_(0, tokens, rows_ND * routing.probs_TK[tokens, choices, None].float())
    return output_TD
