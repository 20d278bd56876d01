"""Translate our configuration to Megatron's: the only place that makes a ``TransformerConfig``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig


def params_dtype(parallel: ParallelConfig) -> torch.dtype:
    return torch.bfloat16 if parallel.bf16 else torch.float32


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Translate a validated configuration.

    Our router implements router losses, expert bias and replay (:mod:`megatron_ring.model.router`), so Megatron's
    balance loss, z-loss and bias update are off. Our objective has its own denominator, so
    ``calculate_per_token_loss`` is off too.
    """
    dtype = params_dtype(parallel)
    vpp = parallel.num_virtual_stages_per_pipeline_rank
    pipelined = parallel.pipeline_model_parallel_size > 1
    granularity = None if parallel.recompute_granularity == "none" else parallel.recompute_granularity
    full = granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        mtp_num_layers=model.mtp_num_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_scaling_factor,
        **_moe_fields(model),
        params_dtype=dtype,
        bf16=parallel.bf16,
        pipeline_dtype=dtype if pipelined else None,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=granularity,
        recompute_method=parallel.recompute_method if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        recompute_modules=list(parallel.recompute_modules) if granularity == "selective" else None,
        batch_p2p_sync=False,
        # batched calls mix up the two directions between the same two ranks (pp 2)
        batch_p2p_comm=vpp == 1,
        overlap_p2p_comm=vpp > 1,
        # outputs that were sent are kept: freeing them needs custom_backward, which skips autograd's checks
        deallocate_pipeline_outputs=False,
        calculate_per_token_loss=False,
        # set by the session; upstream then looks up the embedding by indexing
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        transformer_impl=model.transformer_impl,
    )


def _moe_fields(model: ModelConfig) -> dict[str, object]:
    if not model.is_moe:
        return {}
    dense = model.first_k_dense_replace
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        # Megatron's name for weights that are softmax scores over all experts, as for top-1 (kernels.route)
        "moe_router_pre_softmax": model.moe_router_pre_softmax or model.moe_router_topk == 1,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size or None,
        # a list makes Megatron name the layers one by one in checkpoints, an int stacks them
        "moe_layer_freq": [int(model.is_moe_layer(i)) for i in range(model.num_layers)] if dense else 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": True,
    }
