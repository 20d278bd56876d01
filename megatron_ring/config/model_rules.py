"""What a model's shape must satisfy, and how it divides over a layout; value, rule and remedy in one line."""

from collections.abc import Iterator
from dataclasses import fields

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig

MOST_OF_A_SIZE = 1 << 24
"""Of any model: beyond it sizes multiply to what no tensor can have, which torch says with a traceback."""
MOST_LAYERS = 1 << 14
_LAYERS = ("num_layers", "mtp_num_layers", "num_experts")


def divisors_near(value: int, of: int) -> str:
    """The divisors of ``of`` around ``value``. Example: ``divisors_near(6, of=64)`` is ``"4 or 8"``."""
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    below = [d for d in divisors if d < value][-1:]
    # a remedy that is many times larger than what was asked for is none
    above = [d for d in divisors if value < d <= 4 * value][:1]
    return " or ".join(str(d) for d in below + above)


def multiples_near(value: int, of: int) -> str:
    """The multiples of ``of`` around ``value``. Example: ``multiples_near(6, of=4)`` is ``"4 or 8"``."""
    below = value // of * of
    return " or ".join(str(m) for m in (below, below + of) if m > 0)


def must_divide(name: str, value: int, of_name: str, of: int) -> Iterator[str]:
    """Problem when setting ``name`` does not divide ``of``."""
    if of % value != 0:
        yield f"{name}={value} must divide {of_name}={of}; try {divisors_near(value, of)}"


def model_problems(m: ModelConfig) -> Iterator[str]:
    """What is wrong with the model itself."""
    positive = (
        "num_layers hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
        "make_vocab_size_divisible_by max_position_embeddings norm_epsilon init_method_std rotary_base "
        "moe_router_topk_scaling_factor"
    )
    for name in positive.split():
        if getattr(m, name) <= 0:
            yield f"{name}={getattr(m, name)} must be positive; set --{name.replace('_', '-')}"
    not_negative = (
        "num_experts first_k_dense_replace moe_shared_expert_intermediate_size moe_router_num_groups "
        "moe_router_group_topk mtp_num_layers mtp_loss_scaling_factor moe_router_bias_update_rate "
        "moe_aux_loss_coeff moe_z_loss_coeff moe_router_warmup_iters"
    )
    for name in not_negative.split():
        if (getattr(m, name) or 0) < 0:
            yield f"{name}={getattr(m, name)} must not be negative; 0 turns it off"
    for field in fields(m):
        value, most = getattr(m, field.name), MOST_LAYERS if field.name in _LAYERS else MOST_OF_A_SIZE
        if type(value) is int and value > most:
            yield f"{field.name}={value} must be at most {most}; set --{field.name.replace('_', '-')}"
    yield from must_divide(
        "num_query_groups", m.num_query_groups, "num_attention_heads", m.num_attention_heads
    )
    if not 0 < m.rotary_percent <= 1:
        yield f"rotary_percent={m.rotary_percent} must be above 0 and at most 1; 1 rotates whole heads"
    rotated = m.kv_channels * m.rotary_percent
    if rotated != int(rotated) or int(rotated) % 2 != 0:
        yield (
            f"kv_channels={m.kv_channels} times rotary_percent={m.rotary_percent} must be an even number of "
            f"rotated channels; try kv_channels={multiples_near(m.kv_channels, 32)}"
        )
    yield from _family_problems(m)
    if (not m.is_moe or m.first_k_dense_replace > 0) and m.ffn_hidden_size <= 0:
        yield f"ffn_hidden_size={m.ffn_hidden_size} must be positive for dense layers; set --ffn-hidden-size"
    yield from _expert_problems(m) if m.is_moe else _dense_problems(m)


def _family_problems(m: ModelConfig) -> Iterator[str]:
    if m.family == "qwen2":
        if m.is_moe:
            yield (
                f"num_experts={m.num_experts} must be 0 for family=qwen2, which is dense; "
                "choose --family bailing_moe or bailing_moe_v2"
            )
    elif not m.is_moe:
        yield f"num_experts=0 does not fit family={m.family}, which has experts; try --num-experts 8"
    if m.family != "bailing_moe_v2" and m.mtp_num_layers > 0:
        yield (
            f"mtp_num_layers={m.mtp_num_layers} needs family=bailing_moe_v2, not {m.family}; "
            "set --mtp-num-layers 0"
        )


def _dense_problems(m: ModelConfig) -> Iterator[str]:
    for name in ("first_k_dense_replace", "moe_shared_expert_intermediate_size", "moe_router_num_groups"):
        if getattr(m, name) > 0:
            yield f"{name}={getattr(m, name)} needs num_experts > 0; set it to 0 in a dense model"


def _expert_problems(m: ModelConfig) -> Iterator[str]:
    if m.moe_ffn_hidden_size <= 0:
        yield f"moe_ffn_hidden_size={m.moe_ffn_hidden_size} must be positive; set --moe-ffn-hidden-size"
    if not 1 <= m.moe_router_topk <= m.num_experts:
        yield (
            f"moe_router_topk={m.moe_router_topk} must be from 1 to num_experts={m.num_experts}; try "
            f"{min(2, m.num_experts)}"
        )
    if m.first_k_dense_replace >= m.num_layers:
        yield (
            f"first_k_dense_replace={m.first_k_dense_replace} must be below num_layers={m.num_layers}; "
            "for a dense model set --num-experts 0"
        )
    if m.moe_router_enable_expert_bias and m.moe_router_score_function != "sigmoid":
        yield (
            f"moe_router_enable_expert_bias=True needs moe_router_score_function=sigmoid, not "
            f"{m.moe_router_score_function}; choose one"
        )
    yield from _group_problems(m)


def _group_problems(m: ModelConfig) -> Iterator[str]:
    groups, kept = m.moe_router_num_groups, m.moe_router_group_topk
    if groups == 0:
        if kept > 0:
            yield f"moe_router_group_topk={kept} needs moe_router_num_groups; set it or drop the limit"
        return
    if m.moe_router_score_function != "sigmoid":
        yield (
            f"moe_router_num_groups={groups} needs moe_router_score_function=sigmoid, not "
            f"{m.moe_router_score_function}; set --moe-router-num-groups 0"
        )
    yield from must_divide("moe_router_num_groups", groups, "num_experts", m.num_experts)
    if not 1 <= kept <= groups:
        yield (
            f"moe_router_group_topk={kept} must be from 1 to moe_router_num_groups={groups}; try "
            f"{groups // 2 or 1}"
        )
    size = m.num_experts // groups
    if size < 2:
        yield (
            f"moe_router_num_groups={groups} leaves {size} expert per group, but a group is scored by its "
            "best 2; "
            f"try at most {m.num_experts // 2}"
        )
    if kept * size < m.moe_router_topk:
        yield (
            f"moe_router_group_topk={kept} leaves {kept * size} experts to choose from, below "
            f"moe_router_topk={m.moe_router_topk}; try moe_router_group_topk={-(-m.moe_router_topk // size)}"
        )


def division_problems(m: ModelConfig, p: ParallelConfig) -> Iterator[str]:
    """What does not divide over tp, ep, etp, pp and vpp."""
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    names = ["num_attention_heads", "num_query_groups"]
    if not m.is_moe or m.first_k_dense_replace > 0:
        names.append("ffn_hidden_size")
    if m.is_moe and m.moe_shared_expert_intermediate_size > 0:
        names.append("moe_shared_expert_intermediate_size")
    if m.mtp_num_layers > 0:
        names.append("hidden_size")
    for name in names:
        yield from must_divide("tensor_model_parallel_size", tp, name, getattr(m, name))
    yield from _expert_division_problems(m, p)
    vpp = p.num_virtual_stages_per_pipeline_rank
    if vpp > 1 and pp == 1:
        yield (
            f"num_virtual_stages_per_pipeline_rank={vpp} needs pipeline_model_parallel_size > 1; "
            "set it to 1 without a pipeline"
        )
    if m.num_layers % (pp * vpp) != 0:
        stages = f"{pp}*{vpp}={pp * vpp}" if vpp > 1 else f"{pp}"
        product = "pipeline_model_parallel_size" + (
            "*num_virtual_stages_per_pipeline_rank" if vpp > 1 else ""
        )
        yield (
            f"num_layers={m.num_layers} must be a multiple of {product}={stages}; "
            f"try {divisors_near(pp * vpp, m.num_layers)} stages"
        )


def _expert_division_problems(m: ModelConfig, p: ParallelConfig) -> Iterator[str]:
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size
    if not m.is_moe:
        for name, size in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if size > 1:
                yield f"{name}={size} needs num_experts > 0; set it to 1 in a dense model"
        return
    yield from must_divide("expert_model_parallel_size", ep, "num_experts", m.num_experts)
    yield from must_divide("expert_tensor_parallel_size", etp, "moe_ffn_hidden_size", m.moe_ffn_hidden_size)
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield (
            f"sequence_parallel=False with tensor_model_parallel_size={p.tensor_model_parallel_size} and "
            f"num_experts={m.num_experts}: experts need it; add --sequence-parallel"
        )
