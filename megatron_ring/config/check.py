"""Every check of a run before any process group exists: of its config, in order, and of the files it names."""

from collections.abc import Iterator

from megatron_ring.config import inputs
from megatron_ring.config.rules import Rule, layout, model, training
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import sections, value_problems
from megatron_ring.config.stages import stage_spec
from megatron_ring.errors import ConfigError


def single_values(config: RunConfig, world_size: int) -> Iterator[str]:
    """Types, choices and ranges of every setting, also of those that the stage does not read."""
    for section in sections():
        yield from value_problems(getattr(config, section))


RULES: tuple[Rule, ...] = (
    single_values,
    model.model_shape,
    layout.parallel_features,
    layout.recomputation,
    layout.division,
    layout.processes,
    training.samples,
    training.schedule,
    training.validation,
    training.checkpoints,
    training.profiling,
)
"""The rules of every stage, in order; those of a stage (``config/stages.py``) come after them."""


def validate(config: RunConfig, world_size: int, stage: str = "pretrain") -> None:
    """Raise ConfigError with the first problem of running ``config`` on ``world_size`` processes."""
    for problem in problems(config, world_size, stage):
        raise ConfigError(problem)


def problems(config: RunConfig, world_size: int, stage: str = "pretrain") -> Iterator[str]:
    """One line per problem. Later rules assume that earlier ones hold: report only the first."""
    for rule in (*RULES, *stage_spec(stage).rules):
        yield from rule(config, world_size)


def check_inputs(config: RunConfig, stage: str = "pretrain") -> None:
    """Raise a RingError where a file or folder that a valid ``config`` names is missing or cannot be written to."""
    inputs.outputs(config)
    for check in stage_spec(stage).inputs:
        check(config)
