"""How the model is spread over processes, and in what precision it computes."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ring.config.ranges import AtLeast, AtMost, Count

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout over the world's processes; the sizes' product divides them, and the quotient is data parallel.

    Example: ``ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)`` on 8 processes is
    tp 2, dp 4.
    """

    tensor_model_parallel_size: Count = 1
    """Processes that share each matrix outside the experts (tp)."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages (pp)."""
    num_virtual_stages_per_pipeline_rank: Count = 1
    """Model chunks per pipeline stage for the interleaved schedule (vpp); 1 is plain 1F1B."""
    expert_model_parallel_size: Count = 1
    """Processes the routed experts are spread over (ep)."""
    expert_tensor_parallel_size: Count = 1
    """Processes that share each expert's matrices (etp); not tied to tp."""
    context_parallel_size: int = 1
    """Processes that share a sequence; not supported, must be 1."""
    sequence_parallel: bool = False
    """Split activations outside the matrices along the sequence over tp; needed for experts with tp > 1."""
    use_distributed_optimizer: bool = True
    """Split optimizer state and main parameters over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """What is recomputed in the backward pass: nothing, whole layers, or the modules of recompute_modules."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """full only: units of recompute_num_layers layers (uniform), or only the stage's first layers (block)."""
    recompute_num_layers: Count = 1
    """full only: layers per checkpointed unit (uniform), or layers recomputed per stage (block)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """selective only: the modules that are recomputed; layernorm means the two norms of each layer."""
    bf16: bool = True
    """Compute in bfloat16 with fp32 main parameters and gradients; otherwise all in fp32."""
    fp8: str | None = None
    """8-bit floating point; not supported, must be none."""
    distributed_timeout_minutes: Annotated[int, AtLeast(1), AtMost(525_600, remedy="that is a year")] = 10
    """Minutes a collective may wait for the other processes."""
