"""What the tests of the plain optimizer's checkpoints share with their worker."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.run import RunConfig
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.model.small import batch, weights
from tests.helpers.parallel.cases import MODELS

OBJECTIVE = NextTokenObjective(mtp_loss_scaling_factor=0.3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"overlap_grad_reduce": True},
    "ep2": {"expert_model_parallel_size": 2, "async_save": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "to-distributed": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}


def configure(**settings: Any) -> RunConfig:
    """Dense layer, experts, multi-token prediction; without Megatron's distributed optimizer unless asked."""
    plain = {"use_distributed_optimizer": False, "global_batch_size": 4}
    return config_from_mapping({**MODELS["v2_mtp"], **plain, **settings})


def next_step(engine: Engine) -> dict[str, float]:
    """One step on this rank's share of a fixed batch of four microbatches."""
    dp, rank = engine.topology.dp_size, engine.topology.dp_rank
    own = batch(seed=9)[rank * 4 // dp : (rank + 1) * 4 // dp]
    report = engine.step(own, OBJECTIVE, 1e-2)
    return {"loss": report.loss, "grad_norm": report.grad_norm}


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Weights, buffers, main parameters and every optimizer state, as copies."""
    parts = [p for p in engine.optimizer.chained_optimizers if p.get_parameters()]
    mains = [main for part in parts for main in part.get_parameters()]
    moments = [
        part.optimizer.state[main][name]
        for part in parts
        for main in part.get_parameters()
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    return [*weights(engine).values(), *(value.detach().clone() for value in [*mains, *moments])]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
