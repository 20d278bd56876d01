"""How many parameters, bytes and floating-point operations a model is, from its config alone.

Counting rule. *Total*: every trained tensor of the unpadded model, embedding and output head included (once where
they are tied); the expert bias is not trained by gradients and not counted. *Active per token*: the same, with
moe_router_topk experts in place of num_experts per MoE layer; embedding and head count in full. This rule gives
Ring-lite's published figures, 16,801,974,272 and 2,753,153,024.
Multi-token-prediction layers are used in training only: they are in total, not in active.
"""

from dataclasses import dataclass

from megatron_ring.config.layout import (
    data_parallel_size,
    expert_data_parallel_size,
    stage_layers,
)
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Trained parameters of the whole model.

    Example: ``ParameterCount(total=16_801_974_272, active=2_753_153_024)`` for Ring-lite.
    """

    total: int
    active: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCount:
    """Trained parameters one rank holds: ``expert`` in routed experts, ``dense`` everywhere else."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes one rank needs for what does not depend on the batch; activations are not included."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and with bf16 the fp32 main parameters."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Total and active parameters, by the rule in the module docstring."""
    vocabularies = 2 if model.untie_embeddings_and_output_weights else 1
    total = active = vocabularies * model.vocab_size * model.hidden_size + model.hidden_size
    for layer in range(model.num_layers):
        dense = _layer_dense(model, layer, tp=1)
        total += dense + _layer_experts(model, layer, num_experts=model.num_experts)
        active += dense + _layer_experts(model, layer, num_experts=model.moe_router_topk)
    mtp = _mtp_dense(model, tp=1) + _layer_experts(model, model.num_layers, num_experts=model.num_experts)
    return ParameterCount(total=total + model.mtp_num_layers * mtp, active=active)


def padded_vocab_size(model: ModelConfig, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding: vocab_size up to a multiple of make_vocab_size_divisible_by times tp."""
    multiple = model.make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def count_rank(model: ModelConfig, parallel: ParallelConfig, stage: int) -> RankCount:
    """Parameters held by any rank of pipeline stage ``stage``, padded vocabulary rows included.

    With multi-token prediction, and where the output weight is the embedding, the last stage of several holds a copy of
    the embedding.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    is_first, is_last = stage == 0, stage == pp - 1
    layers = stage_layers(model, parallel, stage)
    dense = sum(_layer_dense(model, layer, tp=tp) for layer in layers)
    expert = sum(_layer_experts(model, layer, num_experts=model.num_experts) for layer in layers)
    embedding = padded_vocab_size(model, tp) // tp * model.hidden_size
    if is_first or (is_last and model.mtp_num_layers > 0):
        dense += embedding
    if is_last and (model.untie_embeddings_and_output_weights or not is_first):
        dense += embedding
    if is_last:
        dense += model.hidden_size + model.mtp_num_layers * _mtp_dense(model, tp=tp)
        expert += model.mtp_num_layers * _layer_experts(
            model, model.num_layers, num_experts=model.num_experts
        )
    share = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return RankCount(dense=dense, expert=expert // share)


def rank_memory(model: ModelConfig, parallel: ParallelConfig, stage: int, world_size: int) -> RankMemory:
    """Bytes for weights, fp32 gradients and optimizer state on a rank of ``stage``."""
    count = count_rank(model, parallel, stage)
    state_bytes = 12 if parallel.bf16 else 8
    dp = edp = 1
    if parallel.use_distributed_optimizer:
        dp = data_parallel_size(parallel, world_size)
        edp = expert_data_parallel_size(parallel, world_size)
    return RankMemory(
        weights=count.total * (2 if parallel.bf16 else 4),
        gradients=count.total * 4,
        optimizer=state_bytes * (-(-count.dense // dp) + -(-count.expert // edp)),
    )


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Floating-point operations per trained token, forward and backward, without recomputation.

    A multiply-add is 2; the backward pass costs twice the forward. Matmuls count as they are; attention
    scores and their product with the values count as causal over ``seq_length`` tokens (half of the square).
    Lookups, norms and activations are left out, as is usual for model FLOP utilisation.
    """
    attention = 2 * seq_length * model.num_attention_heads * model.kv_channels
    head = 2 * model.hidden_size * model.vocab_size
    forward = head
    for layer in range(model.num_layers):
        forward += attention + 2 * _layer_matmul(model, layer)
    mtp = attention + head + 2 * (_layer_matmul(model, model.num_layers) + 2 * model.hidden_size**2)
    return 3.0 * (forward + model.mtp_num_layers * mtp)


def _layer_matmul(model: ModelConfig, layer: int) -> int:
    """Weights of a layer that one token is multiplied with."""
    d = model.hidden_size
    weights = _attention_matmul(model)
    if not model.is_moe_layer(layer):
        return weights + 3 * d * model.ffn_hidden_size
    shared = 3 * d * model.moe_shared_expert_intermediate_size
    experts = 3 * d * model.moe_ffn_hidden_size * model.moe_router_topk
    return weights + d * model.num_experts + shared + experts


def _attention_matmul(model: ModelConfig) -> int:
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    return model.hidden_size * heads * model.kv_channels


def _layer_dense(model: ModelConfig, layer: int, *, tp: int) -> int:
    """Parameters of a layer outside its experts on one of ``tp`` ranks; norms and router are not split."""
    d = model.hidden_size
    count = _attention_matmul(model) // tp + 2 * d
    if model.add_qkv_bias:
        count += (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels // tp
    if model.qk_layernorm:
        count += 2 * model.kv_channels
    if not model.is_moe_layer(layer):
        return count + 3 * d * model.ffn_hidden_size // tp
    return count + d * model.num_experts + 3 * d * model.moe_shared_expert_intermediate_size // tp


def _layer_experts(model: ModelConfig, layer: int, *, num_experts: int) -> int:
    """Parameters of ``num_experts`` routed experts, or 0 where the layer is dense."""
    width = 3 * model.hidden_size * model.moe_ffn_hidden_size
    return num_experts * width if model.is_moe_layer(layer) else 0


def _mtp_dense(model: ModelConfig, *, tp: int) -> int:
    """A multi-token-prediction layer outside its experts: 3 norms, the 2D -> D projection, one layer."""
    d = model.hidden_size
    return 3 * d + 2 * d * d // tp + _layer_dense(model, model.num_layers, tp=tp)
