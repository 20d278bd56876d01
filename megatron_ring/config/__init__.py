"""What to run, without torch: a login node can load, validate and print it."""

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.config.run import CheckpointConfig, DataConfig, LoggingConfig, RunConfig
from megatron_ring.config.train import TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
]
