"""Small engines on one process, for tests of the model and of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.parallel.cases import MODELS, NUM_SLOTS
from tests.helpers.parallel.running import randomise

OBJECTIVE = NextTokenObjective(mtp_loss_scaling_factor=0.3)
LENGTHS = [(13, 7, 21), (5, 1, 17, 11), (47,), (9, 9, 9)]


def config_of(model: str, **settings: Any):
    """The parity proof's model of that name (v1, v2, v2_mtp, dense) with other settings on top."""
    config = config_from_mapping({**MODELS[model], "global_batch_size": 4, **settings})
    validate(config, 1)
    return config


@contextmanager
def small_engine(model: str, **settings: Any) -> Iterator[Engine]:
    """An engine with weights of which none is 0 or 1, in a session of its own."""
    config = config_of(model, **settings)
    train = config.train
    with open_session(config.parallel, train.seed, deterministic=train.deterministic) as session:
        engine = Engine(config, session)
        randomise(engine)
        yield engine


def batch(slots: int = NUM_SLOTS, count: int = 4, seed: int = 7) -> list[Microbatch]:
    """Odd segments, more or less padding, a loss mask with holes; ``slots`` changes the padding only."""
    generator = torch.Generator().manual_seed(seed)
    microbatches = []
    for index in range(count):
        sequences = []
        for length in LENGTHS[index % len(LENGTHS)]:
            tokens = torch.randint(0, 250, (length + 1,), generator=generator)
            mask = (torch.rand(length, generator=generator) > 0.2).float()
            sequences.append((tokens[:-1], tokens[1:], mask))
        microbatches.append(pack_microbatch(sequences, slots))
    return microbatches


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter's accumulated gradient by name (copies)."""
    return {
        name: parameter.main_grad.clone()
        for model in engine.models
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the model by name (copies)."""
    states = (model.state_dict().items() for model in engine.models)
    return {name: value.clone() for state in states for name, value in state if value is not None}


def moments_of(engine: Engine) -> list[torch.Tensor]:
    """The optimizer's states (copies)."""
    return [
        value.clone()
        for part in engine.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float) -> None:
    """Norm of the difference over the norm, tensor by tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        gap = (ours[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-9)
        assert gap < rtol, f"{name} differs by {gap:.1e}"
