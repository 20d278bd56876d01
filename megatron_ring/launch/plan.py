"""The launch planner: every valid layout of a model on a cluster that fits its memory, ranked.

Ranking is by rules of thumb, not by a clock: the fewest processes per model copy first (less communication),
tensor parallelism inside a node only, little pipeline bubble, then more free memory. Measure the first few.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from megatron_ring.config.check import problems
from megatron_ring.config.layout import num_microbatches, stage_layers
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import rank_memory
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import ConfigError
from megatron_ring.launch.dry_run import gib

USABLE = 0.9
"""Share of a device's memory a plan may fill; the rest is for the allocator, buffers and uneven experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout that fits. Bytes are of the fullest rank.

    Example: ``Plan(parallel=ParallelConfig(expert_model_parallel_size=8), microbatches=32, bubble=0.0,
    ...)``.
    """

    parallel: ParallelConfig
    microbatches: int
    """Forward passes per step and rank."""
    bubble: float
    """Share of a step in which a pipeline stage waits: (pp - 1) / (microbatches * vpp + pp - 1)."""
    static_bytes: int
    """Weights, gradients, optimizer state."""
    activation_bytes: int
    """Estimate, see :func:`activation_bytes`."""

    @property
    def total_bytes(self) -> int:
        return self.static_bytes + self.activation_bytes


def feasible_layouts(config: RunConfig, world_size: int, per_node: int, memory_bytes: float) -> list[Plan]:
    """Valid layouts of ``config`` on ``world_size`` devices of ``memory_bytes`` each, best first.

    Raises:
        ConfigError: no layout is valid, however much memory there is; the problem is the first one's.
    """
    valid: list[Plan] = []
    refused: str | None = None
    for parallel in _candidates(config, world_size, per_node):
        candidate = replace(config, parallel=parallel)
        problem = next(problems(candidate, world_size), None)
        if problem is None:
            valid.append(_plan(candidate, world_size))
        refused = refused or problem
    if refused is not None and not valid:
        raise ConfigError(refused)
    return sorted((plan for plan in valid if plan.total_bytes <= USABLE * memory_bytes), key=_rank_key)


def activation_bytes(config: RunConfig, stage: int, microbatches: int) -> int:
    """Estimated activation bytes on a rank of ``stage``: kept for backward, plus the largest temporary.

    Per token and layer the local implementation keeps about 12 values of model width, the projections'
    outputs and, per routed slot, two values of model width and three of expert width; with tp they are split
    by sequence parallelism. Full recompute keeps one value of model width per layer plus one layer's working
    set; selective recompute keeps what its modules do not make again, plus one layer's share of that. Flash
    attention keeps almost nothing, so core_attn changes no estimate. 1F1B keeps up to pp - stage
    microbatches in flight. The last stage adds fp32 logits twice. Balanced experts are assumed.
    """
    model, parallel, train = config.model, config.parallel, config.train
    width = 2 if parallel.bf16 else 4
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tokens = train.micro_batch_size * train.seq_length / tp
    heads = (2 * model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    recomputed = set(parallel.recompute_modules if parallel.recompute_granularity == "selective" else ())
    if "moe" in recomputed:
        recomputed.add("shared_experts")
    layers = stage_layers(model, parallel, stage)
    modules = [_module_values(model, layer) for layer in layers]
    whole = [10 * model.hidden_size + heads + sum(values.values()) for values in modules]
    again = [sum(size for name, size in values.items() if name in recomputed) for values in modules]
    if parallel.recompute_granularity == "full":
        kept = len(layers) * tokens * model.hidden_size * width
        working = max(whole) * tokens * width * parallel.recompute_num_layers
    else:
        kept = (sum(whole) - sum(again)) * tokens * width
        working = max(again) * tokens * width
    in_flight = min(microbatches, pp - stage)
    vpp = parallel.num_virtual_stages_per_pipeline_rank
    if vpp > 1:
        # chunks of the interleaved schedule run ahead of plain 1F1B
        in_flight = min(microbatches, in_flight * (1 + (pp - 1) / (pp * vpp)))
    logits = 0.0
    if stage == pp - 1:
        logits = 2 * 4 * train.micro_batch_size * train.seq_length * model.vocab_size / tp
    return int(kept * in_flight + working + logits)


def _module_values(model: ModelConfig, layer: int) -> dict[str, int]:
    """Values per token that the modules of one layer keep, by their name in recompute_modules."""
    norms = {"layernorm": 2 * model.hidden_size}
    if not model.is_moe_layer(layer):
        return {**norms, "mlp": 3 * model.ffn_hidden_size}
    routed = model.moe_router_topk * (2 * model.hidden_size + 3 * model.moe_ffn_hidden_size)
    return {**norms, "moe": routed, "shared_experts": 3 * model.moe_shared_expert_intermediate_size}


def format_plans(
    config: RunConfig, plans: list[Plan], world_size: int, found: int, *, styled: bool = False
) -> str:
    """A table of ``plans`` out of ``found``, and the flags of the first."""
    table = Table(box=None, padding=(0, 1))
    for name in (
        "tp",
        "pp",
        "vpp",
        "ep",
        "etp",
        "dp",
        "microbatches",
        "bubble",
        "static",
        "activations",
        "sum",
    ):
        table.add_column(name, justify="right")
    for plan in plans:
        p = plan.parallel
        dp = world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
        sizes = (
            p.tensor_model_parallel_size,
            p.pipeline_model_parallel_size,
            p.num_virtual_stages_per_pipeline_rank,
            p.expert_model_parallel_size,
            p.expert_tensor_parallel_size,
            dp,
            plan.microbatches,
        )
        memory = (plan.static_bytes, plan.activation_bytes, plan.total_bytes)
        table.add_row(*(str(size) for size in sizes), f"{plan.bubble:.1%}", *(gib(size) for size in memory))
    sink = io.StringIO()
    console = Console(file=sink, width=120, force_terminal=styled, color_system="auto" if styled else None)
    console.print(f"{found} layouts fit {world_size} devices; the first {len(plans)}:", highlight=False)
    console.print(table)
    console.print("flags of the first:", highlight=False)
    flags = " ".join(layout_flags(plans[0].parallel)) or "none: it is the default"
    console.print(f"  {flags}", highlight=False, soft_wrap=True)
    console.print(
        f"activations are an estimate for balanced experts; {1 - USABLE:.0%} of the memory is left free",
        highlight=False,
    )
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def layout_flags(parallel: ParallelConfig) -> list[str]:
    """Command-line words for a layout's sizes. Example: ``["--expert-model-parallel-size", "8"]``."""
    words: list[str] = []
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        if getattr(parallel, name) > 1:
            words += [f"--{name.replace('_', '-')}", str(getattr(parallel, name))]
    return [*words, "--sequence-parallel"] if parallel.sequence_parallel else words


def _candidates(config: RunConfig, world_size: int, per_node: int) -> Iterator[ParallelConfig]:
    """Sizes that divide the cluster and the model; tp and etp stay inside a node."""
    model = config.model
    for tp in _divisors(min(per_node, world_size)):
        for pp in _divisors(world_size // tp, at_most=model.num_layers):
            for vpp in _divisors(model.num_layers // pp, at_most=4) if pp > 1 else (1,):
                for ep in _divisors(world_size // pp, at_most=model.num_experts) if model.is_moe else (1,):
                    for etp in _divisors(min(tp, per_node)) if model.is_moe else (1,):
                        yield replace(
                            config.parallel,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            num_virtual_stages_per_pipeline_rank=vpp,
                            expert_model_parallel_size=ep,
                            expert_tensor_parallel_size=etp,
                            sequence_parallel=tp > 1,
                        )


def _divisors(number: int, at_most: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, at_most or number) + 1) if number % d == 0]


def _plan(config: RunConfig, world_size: int) -> Plan:
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    microbatches = num_microbatches(config, world_size)
    stages = [
        (
            rank_memory(config.model, parallel, stage, world_size).total,
            activation_bytes(config, stage, microbatches),
        )
        for stage in range(pp)
    ]
    static, activations = max(stages, key=sum)
    return Plan(
        parallel=parallel,
        microbatches=microbatches,
        bubble=(pp - 1) / (microbatches * vpp + pp - 1),
        static_bytes=static,
        activation_bytes=activations,
    )


def _rank_key(plan: Plan) -> tuple[float, ...]:
    p = plan.parallel
    copy = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    # a virtual stage costs messages: it has to buy at least a tenth of the step
    waits = round(plan.bubble, 1)
    experts = p.expert_model_parallel_size * p.expert_tensor_parallel_size
    return (
        copy * (1 + waits),
        p.tensor_model_parallel_size,
        experts * p.expert_tensor_parallel_size,
        p.num_virtual_stages_per_pipeline_rank,
        plan.total_bytes,
    )
