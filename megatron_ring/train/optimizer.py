"""Build Megatron's data-parallel wrapper and AdamW, distributed or plain, from our settings."""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.train import TrainConfig
from megatron_ring.model.build import RingModel
from megatron_ring.model.translate import params_dtype
from megatron_ring.runtime.topology import Topology

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing by it (Megatron's ``clip_grad_by_total_norm_fp32``)."""


def wrap_data_parallel(
    chunks: list[RingModel], parallel: ParallelConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Give each chunk fp32 gradient buffers, reduced over its data-parallel ranks: scattered with
    ``use_distributed_optimizer``, whole without. Collective over the world.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            config,
            chunk,
            # only the first chunk's buckets can overlap with its own backward pass
            disable_bucketing=index > 0,
            pg_collection=topology.groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], train: TrainConfig, parallel: ParallelConfig, topology: Topology
) -> MegatronOptimizer:
    """AdamW over fp32 main parameters, sharded over data-parallel ranks with ``use_distributed_optimizer``.
    Vectors (norms, biases) are not decayed.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=parallel.bf16,
        params_dtype=params_dtype(parallel),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        config, [*chunks], use_gloo_process_groups=False, pg_collection=topology.groups
    )
    for group in optimizer.param_groups:
        # upstream applies this multiplier in its scheduler, which is not used here
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
        if "foreach" in group:
            # otherwise torch's AdamW loops over parameters on the host
            group["fused"], group["foreach"] = True, False
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


@torch.no_grad()
def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip by the given global norm and update; gathers the new parameters.

    Upstream's clipping loops over parameters if Transformer Engine and apex are not installed.
    """
    for part in cast(ChainedOptimizer, optimizer).chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        limit = part.config.clip_grad
        if gradients and 0 < limit < grad_norm + CLIP_EPSILON:
            torch._foreach_mul_(gradients, limit / (grad_norm + CLIP_EPSILON))  # pyright: ignore[reportPrivateImportUsage]
    optimizer.step_with_ready_grads()
