"""What a model's shape must satisfy."""

from collections.abc import Iterator

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.rules.words import multiples_near, must_divide
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import value_problems
from megatron_ring.families import FAMILIES


def model_shape(config: RunConfig, world_size: int) -> Iterator[str]:
    """Sizes that fit each other and the family."""
    yield from _shape_problems(config.model)


def model_problems(m: ModelConfig) -> Iterator[str]:
    """What is wrong with a model alone, single values and shape."""
    yield from value_problems(m)
    yield from _shape_problems(m)


def export_problems(m: ModelConfig) -> Iterator[str]:
    """What no config.json of the model's family can express: such a model trains, but is not exported to Hugging Face."""
    family = FAMILIES[m.family]
    for name, value in family.implied.items():
        found = getattr(m, name)
        if found != value:
            yield (
                f"{name}={found!r} cannot be expressed in the config of a {m.family}, which means {value!r}: "
                "engines would compute another model; train with that value, or as another family"
            )
    shared, width = m.moe_shared_expert_intermediate_size, m.moe_ffn_hidden_size
    if family.shared_experts_key and m.is_moe and shared % width:
        yield (
            f"moe_shared_expert_intermediate_size={shared} must be a multiple of moe_ffn_hidden_size={width}: "
            "the format counts shared experts; train with a multiple"
        )


def _shape_problems(m: ModelConfig) -> Iterator[str]:
    yield from must_divide(
        "num_query_groups", m.num_query_groups, "num_attention_heads", m.num_attention_heads
    )
    rotated = m.kv_channels * m.rotary_percent
    if rotated != int(rotated) or int(rotated) % 2 != 0:
        yield (
            f"kv_channels={m.kv_channels} times rotary_percent={m.rotary_percent} must be an even number of "
            f"rotated channels; try kv_channels={multiples_near(m.kv_channels, 32)}"
        )
    yield from _family_problems(m)
    if (not m.is_moe or m.first_k_dense_replace > 0) and m.ffn_hidden_size == 0:
        yield "ffn_hidden_size=0 must be positive for dense layers; set --ffn-hidden-size"
    yield from _expert_problems(m) if m.is_moe else _dense_problems(m)


def _family_problems(m: ModelConfig) -> Iterator[str]:
    family = FAMILIES[m.family]
    if m.is_moe and not family.has_experts:
        others = " or ".join(other.name for other in FAMILIES.values() if other.has_experts)
        yield (
            f"num_experts={m.num_experts} must be 0 for family={m.family}, which is dense; "
            f"choose --family {others}"
        )
    if not m.is_moe and family.has_experts:
        yield f"num_experts=0 does not fit family={m.family}, which has experts; try --num-experts 8"
    if m.mtp_num_layers > 0 and not family.has_mtp:
        others = " or ".join(other.name for other in FAMILIES.values() if other.has_mtp)
        yield (
            f"mtp_num_layers={m.mtp_num_layers} needs family={others}, not {m.family}; set --mtp-num-layers 0"
        )
    if not m.untie_embeddings_and_output_weights:
        alone = {"norm_head": m.norm_head, "mtp_num_layers": m.mtp_num_layers}
        for name, value in alone.items():
            if value:
                yield (
                    f"{name}={value} needs untie_embeddings_and_output_weights=True: it has an output weight of its "
                    "own; set --untie-embeddings-and-output-weights"
                )
    for rule in family.needs:
        (when, value), (then, wanted) = rule.when, rule.then
        if getattr(m, when) == value and getattr(m, then) != wanted:
            yield (
                f"{when}={value} needs {then}={wanted} for family={m.family}, not {getattr(m, then)}: "
                f"{rule.because}; set one of them"
            )


def _dense_problems(m: ModelConfig) -> Iterator[str]:
    for name in ("first_k_dense_replace", "moe_shared_expert_intermediate_size", "moe_router_num_groups"):
        if getattr(m, name) > 0:
            yield f"{name}={getattr(m, name)} needs num_experts > 0; set it to 0 in a dense model"


def _expert_problems(m: ModelConfig) -> Iterator[str]:
    if m.moe_router_topk > m.num_experts:
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
    if m.moe_router_pre_softmax and m.moe_router_score_function != "softmax":
        yield (
            f"moe_router_pre_softmax=True needs moe_router_score_function=softmax, not "
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
            f"best 2; try at most {m.num_experts // 2}"
        )
    if kept * size < m.moe_router_topk:
        yield (
            f"moe_router_group_topk={kept} leaves {kept * size} experts to choose from, below "
            f"moe_router_topk={m.moe_router_topk}; try moe_router_group_topk={-(-m.moe_router_topk // size)}"
        )
