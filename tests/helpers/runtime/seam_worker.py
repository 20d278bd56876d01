"""One process of the device-seam proof: short trainings over which every stand-in must be used.

Started by ``test_megatron_cpu.py``, on one process or under torchrun: ``seam_worker.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.runtime import megatron_cpu
from megatron_ring.runtime.ranks import rank_from_env, world_size_from_env
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.parallel.cases import MODELS
from tests.helpers.parallel.worker import batch

RUNS = {
    1: [
        {"bf16": True, "recompute_granularity": "full"},
        {"bf16": True, "use_distributed_optimizer": False},
    ],
    2: [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "bf16": True},
        {"expert_model_parallel_size": 2, "save": "checkpoints"},
    ],
}


def main() -> None:
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), world_size_from_env()
    for settings in RUNS[world]:
        if "save" in settings:
            settings = settings | {"save": str(folder / settings["save"])}
        config = config_from_mapping({**MODELS["v2_mtp"], "global_batch_size": 4, **settings})
        validate(config, world)
        with open_session(config.parallel, seed=1) as session:
            engine = Engine(config, session)
            own = batch(config.model.vocab_size)[: 4 // session.topology.dp_size]
            report = engine.step(own, NextTokenObjective(mtp_loss_scaling_factor=0.1), 1e-3)
            assert report.finite
            if config.checkpoint.save:
                Checkpointer(config, engine, session, stage="pretrain").save(1, {"step": 1})
    (folder / f"hits.{world}.{rank_from_env()}.json").write_text(json.dumps(sorted(megatron_cpu.hits())))


if __name__ == "__main__":
    main()
