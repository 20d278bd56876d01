"""Counted parameters agree with the published figures and with an enumeration of every tensor."""

from dataclasses import replace
from math import prod

import pytest

from megatron_ring.config import ModelConfig, ParallelConfig
from megatron_ring.config.load import preset_config
from megatron_ring.config.model_stats import (
    count_parameters,
    count_rank,
    flops_per_token,
    padded_vocab_size,
    rank_memory,
)
from megatron_ring.config.presets import PRESETS


def hugging_face_tensors(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a published checkpoint's tensors, written from its layout rather than from our count."""
    d, head = m.hidden_size, m.kv_channels
    q, kv = m.num_attention_heads * head, m.num_query_groups * head
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (m.vocab_size, d),
        "norm": (d,),
    }
    if m.untie_embeddings_and_output_weights:
        shapes["lm_head"] = (m.vocab_size, d)
    for n in range(m.num_layers + m.mtp_num_layers):
        layer = {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "qkv": (q + 2 * kv, d),
            "dense": (d, q),
        }
        if m.add_qkv_bias:
            layer["qkv_bias"] = (q + 2 * kv,)
        if m.qk_layernorm:
            layer |= {"q_norm": (head,), "k_norm": (head,)}
        widths = {"mlp": m.ffn_hidden_size}
        if m.is_moe and n >= m.first_k_dense_replace:
            widths = {f"experts.{e}": m.moe_ffn_hidden_size for e in range(m.num_experts)}
            widths["shared_experts"] = m.moe_shared_expert_intermediate_size
            layer["gate"] = (m.num_experts, d)
        for name, width in widths.items():
            layer |= {f"{name}.gate": (width, d), f"{name}.up": (width, d), f"{name}.down": (d, width)}
        if n >= m.num_layers:
            layer |= {"enorm": (d,), "hnorm": (d,), "eh_proj": (d, 2 * d), "final_layernorm": (d,)}
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_total_is_the_sum_of_the_published_tensors(preset: str, mtp: int):
    model = replace(preset_config(preset).model, mtp_num_layers=mtp)
    assert count_parameters(model).total == sum(prod(s) for s in hugging_face_tensors(model).values())


def test_published_models_have_their_published_sizes():
    ring_lite = count_parameters(preset_config("ring_lite").model)
    assert (ring_lite.total, ring_lite.active) == (16_801_974_272, 2_753_153_024)
    assert count_parameters(preset_config("qwen2_7b").model).total == 7_615_616_512
    assert count_parameters(preset_config("qwen3_0_6b").model).total == 596_049_920
    assert count_parameters(preset_config("qwen3_8b").model).total == 8_190_735_360
    qwen3_moe = count_parameters(preset_config("qwen3_30b_a3b").model)
    assert qwen3_moe.total == 30_532_122_624 and qwen3_moe.active == 3_353_032_704
    ring_mini = count_parameters(preset_config("ring_mini_v2").model)
    assert round(ring_mini.total / 1e9, 1) == 16.3
    assert round(ring_mini.active / 1e9, 1) == 1.4


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("_tiny")])
def test_tiny_models_are_tiny(preset: str):
    model = preset_config(preset).model
    assert 300_000 < count_parameters(model).total < 2_000_000
    assert model.kv_channels in (32, 64)
    widths = [model.hidden_size, model.moe_ffn_hidden_size, model.ffn_hidden_size]
    assert all(width % 32 == 0 for width in widths)


def test_mtp_layers_are_trained_but_not_active():
    model = preset_config("ring_mini_v2").model
    with_mtp = replace(model, mtp_num_layers=1)
    assert count_parameters(with_mtp).active == count_parameters(model).active
    assert count_parameters(with_mtp).total > count_parameters(model).total


def test_vocabulary_is_padded_as_in_megatron():
    model = preset_config("ring_lite").model
    assert padded_vocab_size(model, 1) == 126464
    assert padded_vocab_size(model, 4) == 126464
    assert padded_vocab_size(model, 16) == 126976
    assert padded_vocab_size(replace(model, vocab_size=1), 2) == 256


@pytest.mark.parametrize("preset", PRESETS)
def test_one_rank_holds_everything_and_stages_add_up(preset: str):
    model = preset_config(preset).model
    tied = not model.untie_embeddings_and_output_weights
    padding = (1 if tied else 2) * (padded_vocab_size(model, 1) - model.vocab_size) * model.hidden_size
    total = count_parameters(model).total + padding
    assert count_rank(model, ParallelConfig(), 0).total == total
    chunks = 2 if model.num_layers % 4 == 0 else 1
    two = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=chunks)
    # tied, the last stage has a copy of the embedding
    copy = padded_vocab_size(model, 1) * model.hidden_size if tied else 0
    assert sum(count_rank(model, two, stage).total for stage in range(2)) == total + copy


def test_tensor_and_expert_shards_hold_their_share():
    model = preset_config("ring_lite").model
    whole = count_rank(model, ParallelConfig(), 0)
    tp = ParallelConfig(
        tensor_model_parallel_size=4, expert_model_parallel_size=8, expert_tensor_parallel_size=2
    )
    shard = count_rank(model, tp, 0)
    assert shard.expert * 16 == whole.expert
    # norms and routers are on every rank
    replicated = 28 * (2 * 2048 + 64 * 2048) + 2048
    assert (shard.dense - replicated) * 4 == whole.dense - replicated


def test_the_last_stage_repeats_the_embedding_for_mtp():
    model = replace(preset_config("ring_mini_v2").model, mtp_num_layers=1)
    two = ParallelConfig(pipeline_model_parallel_size=2)
    held = sum(count_rank(model, two, stage).total for stage in range(2))
    assert held - count_parameters(model).total == model.vocab_size * model.hidden_size


def test_optimizer_state_is_split_over_the_ranks_that_repeat_it():
    model = preset_config("ring_lite").model
    parallel = ParallelConfig(expert_model_parallel_size=8)
    count = count_rank(model, parallel, 0)
    memory = rank_memory(model, parallel, 0, 8)
    assert memory.weights == 2 * count.total
    assert memory.gradients == 4 * count.total
    assert memory.optimizer == 12 * (-(-count.dense // 8) + count.expert)
    whole = rank_memory(model, replace(parallel, use_distributed_optimizer=False, bf16=False), 0, 8)
    assert (whole.weights, whole.optimizer) == (4 * count.total, 8 * count.total)


def test_flops_are_three_forward_passes_of_the_active_matmuls():
    model = preset_config("ring_lite").model
    lookups_and_norms = model.vocab_size * model.hidden_size + (2 * 28 + 1) * model.hidden_size
    weights = count_parameters(model).active - lookups_and_norms
    attention = 28 * 2 * 4096 * 16 * 128
    assert flops_per_token(model, 4096) == 3 * (2 * weights + attention)
    assert flops_per_token(replace(model, mtp_num_layers=1), 4096) > flops_per_token(model, 4096)
