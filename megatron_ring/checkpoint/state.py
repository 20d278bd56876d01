"""What of the engine goes into a checkpoint, as Megatron's sharded tensors.

Layers are stored one by one (``decoder.layers.3...``), experts along their own axis, and optimizer state
beside each parameter in the parameter's own shape, so that any layout can read what any other wrote.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_ring.model.build import RingModel
from megatron_ring.model.sharding import sharding_metadata
from megatron_ring.runtime.session import Session
from megatron_ring.runtime.topology import Topology

STEP_KEY = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpointable(Protocol):
    """What can be saved: model chunks and their optimizer, such as those of ``megatron_ring.train.engine.Engine``."""

    models: list[RingModel]
    optimizer: Any
    topology: Topology
    session: Session

    def gather_parameters(self) -> None:
        """Gather whole weights on every data-parallel rank."""
        ...

    def on_weights_changed(self) -> None:
        """Take note that the models' weights were written."""
        ...


def model_state(engine: Checkpointable) -> dict[str, Any]:
    """Sharded weights and persistent buffers of every chunk of this rank. Collective over data-parallel
    ranks.
    """
    engine.gather_parameters()
    metadata = sharding_metadata(engine.topology)
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(engine.models)
    }


def tensors_only(state: dict[str, Any]) -> dict[str, Any]:
    """A chunk's sharded state without Megatron's ``_extra_state`` objects.

    They are empty without FP8, and reading one would unpickle what the file holds.
    """
    return {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}


def load_tensors(chunk: RingModel, state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Load the tensors of ``tensors_only(state)`` into ``chunk``."""
    objects = {key: None for key, value in state.items() if isinstance(value, ShardedObject)}
    chunk.load_state_dict(objects | loaded)


def optimizer_state(engine: Checkpointable, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded main parameters and moments. Collective over data-parallel ranks when saving (they are
    gathered).

    Only tensors: hyperparameters come from the configuration, and the step count is in the trainer's state. Megatron's own
    state dict has one entry per optimizer, and their number differs between pipeline stages with and without experts. The
    distributed and the plain optimizer write the same tensors under the same names, so that either reads the other's.
    """
    _allocate(engine)
    return {
        f"optimizer{index}": _distributed_state(engine, part, model, is_loading=is_loading)
        if isinstance(part, DistributedOptimizer)
        else _plain_state(part, model)
        for index, part in enumerate(_parts(engine))
    }


def optimizer_step_count(engine: Checkpointable) -> int:
    """Updates made so far; 0 before the first."""
    for part in _parts(engine):
        for state in part.optimizer.state.values():
            if STEP_KEY in state:
                return int(state[STEP_KEY])
    return 0


@torch.no_grad()
def load_optimizer(engine: Checkpointable, loaded: dict[str, Any], step_count: int) -> None:
    """Copy loaded main parameters and moments into the optimizers, and set the step count."""
    for index, part in enumerate(_parts(engine)):
        tensors = loaded[f"optimizer{index}"]
        if isinstance(part, DistributedOptimizer):
            part.load_parameter_state_from_fully_reshardable(tensors)
        else:
            _load_plain(part, tensors)
        for state in part.optimizer.state.values():
            state[STEP_KEY] = torch.tensor(float(step_count), device=engine.session.device)


def _distributed_state(
    engine: Checkpointable, part: DistributedOptimizer, model: dict[str, Any], *, is_loading: bool
) -> dict[int, Any]:
    state: Any = part.sharded_param_state_fully_reshardable(
        model, is_loading=is_loading, metadata=sharding_metadata(engine.topology)
    )
    return state


def _plain_state(part: MegatronOptimizer, model: dict[str, Any]) -> dict[int, Any]:
    """The state that :class:`DistributedOptimizer` would write, of an optimizer that is whole on every data-parallel rank.

    Upstream's own form names each optimizer's groups, has the step count among the tensors, and omits the main parameters
    in fp32.
    """
    sharded = {
        id(getattr(tensor.data, "main_param", tensor.data)): tensor
        for tensor in nested_values(model)
        if not isinstance(tensor, ShardedObject)
    }
    return {
        index: {
            name: make_sharded_optimizer_tensor(sharded[id(main)], value, f"optimizer.state.{name}")
            for name, value in _tensors_of(part, main).items()
        }
        for index, main in enumerate(part.get_parameters())
    }


def _load_plain(part: MegatronOptimizer, loaded: dict[int, Any]) -> None:
    for index, main in enumerate(part.get_parameters()):
        for name, value in _tensors_of(part, main).items():
            value.copy_(loaded[index][name])


def _tensors_of(part: MegatronOptimizer, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """A main parameter and its moments, by their names in a checkpoint."""
    state = part.optimizer.state[main]
    return {"param": main.detach(), **{name: state[name] for name in MOMENTS}}


def _parts(engine: Checkpointable) -> list[MegatronOptimizer]:
    return [
        part
        for part in engine.optimizer.chained_optimizers
        if not getattr(part, "is_stub_optimizer", False) and part.get_parameters()
    ]


@torch.no_grad()
def _allocate(engine: Checkpointable) -> None:
    """Allocate the state that torch's AdamW makes at its first step, so that it can be saved or loaded into."""
    for part in _parts(engine):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if STEP_KEY not in state:
                    state[STEP_KEY] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state.update({name: torch.zeros_like(parameter) for name in MOMENTS})
