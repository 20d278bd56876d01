"""A checkpointer of a small model, and all that a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.model.small import config_of, weights

NAME = "iter_0000003"
TRAINER = {"step": 3, "cursor": {"epoch": 1}}
SMALL = Options(max_file_bytes=20_000, verify=True)
"""A conversion into many small files."""


@contextmanager
def checkpointer(
    seed: int = 1, model: str = "v2", stage: str = "pretrain", **settings
) -> Iterator[Checkpointer]:
    config = config_of(model, seed=seed, **settings)
    with open_session(config.parallel, seed=seed) as session:
        yield Checkpointer(config, Engine(config, session), session, stage=stage)


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Weights, buffers, main parameters and every optimizer state, as copies."""
    parts = engine.optimizer.chained_optimizers
    mains = [p for part in parts for group in part.param_groups for p in group["params"]]
    moments = [v for part in parts for state in part.optimizer.state.values() for v in state.values()]
    return [*weights(engine).values(), *(value.clone() for value in [*mains, *moments])]
