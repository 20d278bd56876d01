"""Which rank holds what: arithmetic over the layout's sizes, no process group needed.

Rank order is Megatron's ``tp-cp-ep-dp-pp``: outside the experts tensor-parallel ranks are neighbours, then
come data-parallel ones, and pipeline stages are farthest apart. The expert layers see the same ranks as etp,
then ep, then expert data parallel, then the same pipeline stages.
"""

from dataclasses import dataclass

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One rank's coordinates.

    Example: rank 5 of 8 at tp 2, pp 2, ep 2: ``Place(rank=5, tp=1, dp=0, pp=1, etp=0, ep=1, edp=0)``.
    """

    rank: int
    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    """Place among the ranks that hold the same experts."""


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the layers outside the experts."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def expert_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the experts."""
    p = parallel
    return p.expert_tensor_parallel_size * p.expert_model_parallel_size * p.pipeline_model_parallel_size


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks with the same share of the layers outside the experts; each reads other samples."""
    return world_size // model_parallel_size(parallel)


def expert_data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks with the same share of the experts."""
    return world_size // expert_parallel_size(parallel)


def num_microbatches(config: RunConfig, world_size: int) -> int:
    """Forward passes per optimizer step on each data-parallel rank, once the batch has its full size."""
    dp = data_parallel_size(config.parallel, world_size)
    return config.train.global_batch_size // (config.train.micro_batch_size * dp)


def place(parallel: ParallelConfig, world_size: int, rank: int) -> Place:
    """Coordinates of ``rank``."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    etp, ep = parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size
    per_stage = world_size // pp
    inside = rank % per_stage
    return Place(
        rank=rank,
        tp=inside % tp,
        dp=inside // tp,
        pp=rank // per_stage,
        etp=inside % etp,
        ep=inside // etp % ep,
        edp=inside // (etp * ep),
    )


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[int, ...]:
    """Layers (from 0) of a pipeline stage; interleaved, its chunk c is the (c*pp + stage)-th run of layers.

    Example: 8 layers, pp 2, vpp 2: stage 0 holds ``(0, 1, 4, 5)``.
    """
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    run = model.num_layers // (pp * vpp)
    starts = ((chunk * pp + stage) * run for chunk in range(vpp))
    return tuple(start + i for start in starts for i in range(run))
