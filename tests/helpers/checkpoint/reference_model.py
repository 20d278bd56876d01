"""Log p and logits of a Hugging Face folder's tensors, in plain PyTorch, one sequence, fp32.

Written from the papers and from nothing in the package, so that a mistake in the maps or in the model shows.
Legend: T tokens, D model width, H query heads, G key/value heads, C channels per head, E experts, K experts
per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def logits_TV(tensors: Tensors, config: Mapping[str, Any], tokens_T: Tensor) -> Tensor:
    """Logits of every position."""
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    hidden_TD = weights[_embedding(config)][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        hidden_TD = _layer(_under(weights, f"model.layers.{layer}."), config, hidden_TD, layer)
    return _head(weights, config, _rms(hidden_TD, weights["model.norm.weight"], config))


def mtp_logits_TV(tensors: Tensors, config: Mapping[str, Any], tokens_T: Tensor) -> Tensor:
    """Logits of the first multi-token-prediction layer: position t sees token t + 1 (0 after the last) and
    predicts t + 2.
    """
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    hidden_TD = weights["model.word_embeddings.weight"][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        hidden_TD = _layer(_under(weights, f"model.layers.{layer}."), config, hidden_TD, layer)
    hidden_TD = _rms(hidden_TD, weights["model.norm.weight"], config)
    w = _under(weights, f"model.layers.{config['num_hidden_layers']}.")
    following_T = torch.cat([tokens_T[1:], tokens_T.new_zeros(1)])
    ahead_TD = _rms(weights["model.word_embeddings.weight"][following_T], w["enorm.weight"], config)
    both_T2D = torch.cat([ahead_TD, _rms(hidden_TD, w["hnorm.weight"], config)], dim=-1)
    hidden_TD = _layer(w, config, both_T2D @ w["eh_proj.weight"].T, config["num_hidden_layers"])
    return _head(weights, config, _rms(hidden_TD, w["final_layernorm.weight"], config))


def _embedding(config: Mapping[str, Any]) -> str:
    is_qwen = config["architectures"][0].startswith("Qwen")
    return "model.embed_tokens.weight" if is_qwen else "model.word_embeddings.weight"


def _under(weights: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _rms(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _head(weights: Tensors, config: Mapping[str, Any], hidden_TD: Tensor) -> Tensor:
    head_VD = weights[_embedding(config) if config.get("tie_word_embeddings") else "lm_head.weight"]
    if config.get("norm_head"):
        head_VD = head_VD / (head_VD.norm(dim=0, keepdim=True) + 1e-7)
    return hidden_TD @ head_VD.T


def _layer(w: Tensors, config: Mapping[str, Any], hidden_TD: Tensor, layer: int) -> Tensor:
    hidden_TD = hidden_TD + _attention(w, config, _rms(hidden_TD, w["input_layernorm.weight"], config))
    normed_TD = _rms(hidden_TD, w["post_attention_layernorm.weight"], config)
    if config.get("num_experts") and layer >= config.get("first_k_dense_replace", 0):
        return hidden_TD + _experts(_under(w, "mlp."), config, normed_TD)
    return hidden_TD + _swiglu(_under(w, "mlp."), normed_TD)


def _attention(w: Tensors, config: Mapping[str, Any], x_TD: Tensor) -> Tensor:
    H, G, C, T = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"], len(x_TD)
    if "self_attn.q_proj.weight" in w:
        parts = [
            x_TD @ w[f"self_attn.{n}_proj.weight"].T + w.get(f"self_attn.{n}_proj.bias", 0) for n in "qkv"
        ]
        out_DX = w["self_attn.o_proj.weight"]
    else:
        parts = list((x_TD @ w["attention.query_key_value.weight"].T).split([H * C, G * C, G * C], dim=-1))
        out_DX = w["attention.dense.weight"]
    q_THC, k_TGC, v_TGC = parts[0].view(T, H, C), parts[1].view(T, G, C), parts[2].view(T, G, C)
    for q_norm, k_norm in (
        ("attention.query_layernorm", "attention.key_layernorm"),
        ("self_attn.q_norm", "self_attn.k_norm"),
    ):
        if f"{q_norm}.weight" in w:
            q_THC = _rms(q_THC, w[f"{q_norm}.weight"], config)
            k_TGC = _rms(k_TGC, w[f"{k_norm}.weight"], config)
    q_THC, k_TGC = _rotary(q_THC, config), _rotary(k_TGC, config)
    mixed = []
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    for head in range(H):
        group = head // (H // G)
        scores_TT = (q_THC[:, head] @ k_TGC[:, group].T / C**0.5).masked_fill(future_TT, -torch.inf)
        mixed.append(scores_TT.softmax(-1) @ v_TGC[:, group])
    return torch.cat(mixed, dim=-1) @ out_DX.T


def _rotary(x_TNC: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Half-split rotary on the first ``partial_rotary_factor`` of the channels."""
    R = int(x_TNC.shape[-1] * config.get("partial_rotary_factor", 1.0))
    inverse = config["rope_theta"] ** (-torch.arange(0, R, 2).float() / R)
    angle_T1r = (torch.arange(len(x_TNC)).float()[:, None] * inverse)[:, None]
    a, b, rest = x_TNC[..., : R // 2], x_TNC[..., R // 2 : R], x_TNC[..., R:]
    cos, sin = angle_T1r.cos(), angle_T1r.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _swiglu(w: Tensors, x_TD: Tensor) -> Tensor:
    gate_TF, up_TF = x_TD @ w["gate_proj.weight"].T, x_TD @ w["up_proj.weight"].T
    return (gate_TF * torch.sigmoid(gate_TF) * up_TF) @ w["down_proj.weight"].T


def _experts(w: Tensors, config: Mapping[str, Any], x_TD: Tensor) -> Tensor:
    output_TD = (
        _swiglu(_under(w, "shared_experts."), x_TD)
        if config.get("num_shared_experts")
        else torch.zeros_like(x_TD)
    )
    scores_TE = x_TD @ w["gate.weight"].T
    for t, scores_E in enumerate(scores_TE):
        for expert, weight in _route(scores_E, w.get("gate.expert_bias"), config):
            output_TD[t] = output_TD[t] + weight * _swiglu(_under(w, f"experts.{expert}."), x_TD[t])
    return output_TD


def _route(scores_E: Tensor, bias_E: Tensor | None, config: Mapping[str, Any]) -> list[tuple[int, Tensor]]:
    """The chosen experts of one token and their weights."""
    K = config["num_experts_per_tok"]
    if config.get("score_function", "softmax") == "softmax":
        weights_K, chosen_K = scores_E.softmax(-1).topk(K)
        if K > 1 and config.get("norm_topk_prob", True):
            weights_K = weights_K / weights_K.sum()
    else:
        probs_E = torch.sigmoid(scores_E)
        for_choice_E = probs_E if bias_E is None else probs_E + bias_E
        groups = config.get("n_group") or 1
        by_group = for_choice_E.view(groups, -1)
        kept = by_group.topk(2, dim=-1).values.sum(-1).topk(config.get("topk_group") or 1).indices
        mask_E = torch.full_like(by_group, -torch.inf)
        mask_E[kept] = 0.0
        chosen_K = (for_choice_E + mask_E.flatten()).topk(K).indices
        weights_K = probs_E[chosen_K]
        if K > 1:
            weights_K = weights_K / (weights_K.sum() + 1e-20)
        weights_K = weights_K * config["routed_scaling_factor"]
    return list(zip(chosen_K.tolist(), weights_K, strict=True))
