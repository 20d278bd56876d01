"""Models, batches and layouts of the layout-parity proof. No torch at import: the parent process reads it
too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NUM_SLOTS = 48
NUM_MICROBATCHES = 8
LR = 1e-3
STEPS = 3

_COMMON: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=250,
    make_vocab_size_divisible_by=8,
    init_method_std=0.08,
    max_position_embeddings=64,
    bf16=False,
    micro_batch_size=1,
    seq_length=NUM_SLOTS,
    lr=LR,
    min_lr=LR,
)
_EXPERTS: dict[str, Any] = dict(
    num_experts=8,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=64,
    moe_aux_loss_coeff=0.02,
    moe_z_loss_coeff=0.003,
)

MODELS: dict[str, dict[str, Any]] = {
    "v1": {**_COMMON, **_EXPERTS, "family": "bailing_moe", "norm_head": True, "moe_router_topk": 3},
    "v2": {
        **_COMMON,
        **_EXPERTS,
        "family": "bailing_moe_v2",
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "qk_layernorm": True,
        "rotary_percent": 0.5,
        "first_k_dense_replace": 1,
    },
    "dense": {**_COMMON, "family": "qwen2", "add_qkv_bias": True},
}
MODELS["qwen3"] = {
    **_COMMON,
    "family": "qwen3",
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": False,
}
MODELS["qwen3_moe"] = {
    **MODELS["qwen3"],
    **_EXPERTS,
    "family": "qwen3_moe",
    "moe_shared_expert_intermediate_size": 0,
    "moe_router_topk": 3,
    "moe_router_pre_softmax": True,
}
MODELS["v2_mtp"] = {**MODELS["v2"], "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}


@dataclass(frozen=True)
class Case:
    """One model at one layout. Example: ``Case("v1", 2, dict(tp=2))``."""

    model: str
    world: int
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.model, *([f"w{self.world}"] if self.world > 1 else [])]
        return "-".join([*words, *(f"{k}{v}" for k, v in self.layout.items())])

    @property
    def has_whole_gradients(self) -> bool:
        """Interleaved chunks that overlap their reductions keep only this rank's share of each gradient."""
        return not (self.layout.get("overlap") and self.layout.get("vpp"))

    def settings(self) -> dict[str, Any]:
        """Flat configuration values."""
        words = dict(self.layout)
        tp = words.pop("tp", 1)
        values = {
            **MODELS[self.model],
            "tensor_model_parallel_size": tp,
            "sequence_parallel": words.pop("sp", tp > 1),
            "pipeline_model_parallel_size": words.pop("pp", 1),
            "num_virtual_stages_per_pipeline_rank": words.pop("vpp", 1),
            "expert_model_parallel_size": words.pop("ep", 1),
            "expert_tensor_parallel_size": words.pop("etp", 1),
            "recompute_granularity": words.pop("recompute", "none"),
            "recompute_modules": tuple(words.pop("modules", "core_attn").split("+")),
            "use_distributed_optimizer": not words.pop("plain", False),
            "global_batch_size": NUM_MICROBATCHES,
            "overlap_grad_reduce": words.get("overlap", False),
            "overlap_param_gather": words.pop("overlap", False),
        }
        assert not words, f"unknown layout words {words}"
        return values


def _cases(world: int, models: str, *layouts: dict[str, Any]) -> list[Case]:
    return [Case(model, world, layout) for model in models.split() for layout in layouts]


REFERENCES = [Case(model, 1) for model in MODELS]
CASES: list[Case] = [
    *_cases(1, "v1 v2_mtp", dict(recompute="full")),
    *_cases(1, "v1", dict(recompute="selective", modules="core_attn+moe")),
    *_cases(1, "v2", dict(recompute="selective", modules="core_attn+mlp")),
    *_cases(2, "v1 v2 v2_mtp dense", dict(tp=2), dict(pp=2), dict(pp=2, vpp=2)),
    *_cases(2, "v1 v2 v2_mtp", dict(ep=2), dict(tp=2, etp=2)),
    *_cases(2, "v1 dense", dict()),
    *_cases(2, "dense", dict(tp=2, sp=False)),
    *_cases(2, "v1 v2_mtp", dict(overlap=True)),
    *_cases(2, "v1 v2_mtp", dict(plain=True), dict(ep=2, plain=True)),
    *_cases(2, "v2_mtp", dict(tp=2, plain=True)),
    *_cases(4, "v1", dict(pp=2, vpp=2, overlap=True)),
    *_cases(2, "v1 v2_mtp", dict(tp=2, recompute="full"), dict(pp=2, recompute="full")),
    *_cases(4, "v1 v2_mtp", dict(tp=2, pp=2), dict(tp=2, ep=2), dict(pp=2, ep=2), dict(tp=2, etp=2, ep=2)),
    *_cases(4, "v1 v2", dict(ep=4), dict(tp=2, etp=1, ep=4)),
    *_cases(4, "v1 dense", dict(tp=4, pp=1)),
    *_cases(4, "v2_mtp dense", dict(pp=2, vpp=2)),
    *_cases(2, "v2_mtp", dict(tp=2, recompute="selective", modules="layernorm+mlp+shared_experts")),
    *_cases(4, "v1", dict(tp=2, ep=2, recompute="selective", modules="core_attn+moe")),
    *_cases(4, "v2_mtp", dict(pp=2, ep=2, recompute="selective", modules="layernorm+moe")),
    *_cases(8, "v1 v2_mtp", dict(tp=2, pp=2, ep=2), dict(tp=2, pp=2, vpp=2, etp=2, ep=2)),
    *_cases(8, "v1 v2", dict(tp=2, ep=4), dict(pp=4, ep=2)),
    *_cases(8, "v1 dense", dict()),
    *_cases(8, "v2_mtp", dict(tp=2, pp=2, ep=2, recompute="full")),
    # tied embeddings: the weight on one rank, cut by tp, or with a copy on the last stage
    *_cases(2, "qwen3", dict(), dict(tp=2), dict(tp=2, sp=False), dict(pp=2), dict(pp=2, vpp=2)),
    *_cases(2, "qwen3", dict(plain=True), dict(pp=2, plain=True), dict(overlap=True)),
    *_cases(2, "qwen3_moe", dict(tp=2), dict(pp=2), dict(ep=2), dict(tp=2, etp=2)),
    *_cases(4, "qwen3", dict(tp=2, pp=2), dict(pp=2), dict(pp=4), dict(pp=2, vpp=2, overlap=True)),
    *_cases(4, "qwen3_moe", dict(pp=2, ep=2), dict(tp=2, ep=2)),
    *_cases(8, "qwen3", dict(tp=2, pp=2, vpp=2), dict(tp=2, pp=2, plain=True)),
    *_cases(8, "qwen3_moe", dict(tp=2, pp=2, ep=2), dict(tp=2, pp=2, vpp=2, etp=2, ep=2)),
]
