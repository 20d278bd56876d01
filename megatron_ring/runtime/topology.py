"""The parallel layout as sizes, ranks and process groups.

The only file that calls ``megatron.core.parallel_state``; everything else takes a ``ProcessGroupCollection``. Rank order is
Megatron's ``tp-cp-ep-dp-pp``: tensor-parallel ranks are neighbours, pipeline stages are farthest apart.
"""

from dataclasses import dataclass
from datetime import timedelta

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ring.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One process's place in the layout.

    Example: with tp 2, pp 2, 8 processes, rank 5 has ``tp_rank=1, pp_rank=1, dp_rank=0, dp_size=2``.
    """

    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    ep_size: int
    ep_rank: int
    etp_size: int
    dp_size: int
    dp_rank: int
    vpp_size: int
    groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def owns(self, index: int) -> bool:
        """Does this data-parallel rank have item ``index`` of those that are numbered over the whole job?

        Items are dealt out one by one: prompt ``uid`` belongs to rank ``uid % dp_size``.
        """
        return index % self.dp_size == self.dp_rank


def open_topology(parallel: ParallelConfig) -> Topology:
    """Create every process group of the layout. Collective: every rank of the world calls it once."""
    vpp = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Topology(
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        pp_size=groups.pp.size(),
        pp_rank=groups.pp.rank(),
        ep_size=groups.ep.size(),
        ep_rank=groups.ep.rank(),
        etp_size=groups.expt_tp.size(),
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        vpp_size=vpp,
        groups=groups,
    )


def close_topology() -> None:
    """Destroy the process groups of :func:`open_topology`."""
    parallel_state.destroy_model_parallel()


def distributed_timeout(parallel: ParallelConfig) -> timedelta:
    """Time after which a waiting collective fails."""
    return timedelta(minutes=parallel.distributed_timeout_minutes)
