"""How a model divides over tp, pp, vpp, ep, etp and the processes, and what of a layout is supported."""

from collections.abc import Iterator

from megatron_ring.config.layout import expert_parallel_size, model_parallel_size
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.rules.words import divisors_near, multiples_near, must_divide
from megatron_ring.config.run import RunConfig


def parallel_features(config: RunConfig, world_size: int) -> Iterator[str]:
    """Features that are not supported, or that need another."""
    p = config.parallel
    if p.context_parallel_size != 1:
        yield (
            f"context_parallel_size={p.context_parallel_size} is not supported; set it to 1 and shard by tp "
            "or pp"
        )
    if p.fp8 is not None:
        yield f"fp8={p.fp8} is not supported; drop --fp8 and use --bf16"
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel=True needs tensor_model_parallel_size > 1; "
            "add --no-sequence-parallel or raise tensor_model_parallel_size"
        )
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        yield "overlap_param_gather=True needs use_distributed_optimizer; add --use-distributed-optimizer"
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield "overlap_param_gather=True needs overlap_grad_reduce; add --overlap-grad-reduce"


def recomputation(config: RunConfig, world_size: int) -> Iterator[str]:
    """Selective recomputation of modules that the model has."""
    m, p = config.model, config.parallel
    if p.recompute_granularity != "selective":
        return
    if not p.recompute_modules:
        yield (
            "recompute_modules is empty with recompute_granularity=selective; "
            "name modules, such as core_attn, or set --recompute-granularity none"
        )
    needs = (
        ("mlp", not m.is_moe or m.first_k_dense_replace > 0, "a layer without experts"),
        ("moe", m.is_moe, "num_experts > 0"),
        (
            "shared_experts",
            m.moe_shared_expert_intermediate_size > 0,
            "moe_shared_expert_intermediate_size > 0",
        ),
    )
    for name, has, what in needs:
        if name in p.recompute_modules and not has:
            yield (
                f"recompute_modules={' '.join(p.recompute_modules)}: {name} needs {what}, which the model does "
                f"not have; drop {name}"
            )


def division(config: RunConfig, world_size: int) -> Iterator[str]:
    """What does not divide over tp, ep, etp, pp and vpp."""
    m, p = config.model, config.parallel
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
    yield from _expert_division(m, p)
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


def _expert_division(m: ModelConfig, p: ParallelConfig) -> Iterator[str]:
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


def processes(config: RunConfig, world_size: int) -> Iterator[str]:
    """A number of processes that the layout divides."""
    p = config.parallel
    pp = p.pipeline_model_parallel_size
    tp, etp, ep = p.tensor_model_parallel_size, p.expert_tensor_parallel_size, p.expert_model_parallel_size
    rules = (
        ("tensor_model_parallel_size*pipeline_model_parallel_size", f"{tp}*{pp}", model_parallel_size(p)),
        (
            "expert_tensor_parallel_size*expert_model_parallel_size*pipeline_model_parallel_size",
            f"{etp}*{ep}*{pp}",
            expert_parallel_size(p),
        ),
    )
    for names, values, size in rules:
        if world_size % size != 0 or world_size < 1:
            yield (
                f"world_size={world_size} must be a multiple of {names}={values}={size}; "
                f"start {multiples_near(world_size, size)} processes"
            )
