"""Files and folders that must exist before a run starts; each function checks one kind.

Raises a RingError in one line. ``--dry-run`` does not check them.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_ring.config.blend import parse_blend
from megatron_ring.config.rl import GYM_PREFIX
from megatron_ring.config.run import RunConfig
from megatron_ring.durable import require_replaceable
from megatron_ring.errors import CheckpointError, ConfigError, DataError

Input = Callable[[RunConfig], None]


def corpus(config: RunConfig) -> None:
    """The .bin/.idx pairs of data_path."""
    if not config.data.data_path:
        raise DataError(
            "data_path is empty, training needs a corpus; set --data-path PREFIX of a .bin/.idx pair"
        )
    for _, prefix in parse_blend("data_path", config.data.data_path, "prefix"):
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise DataError(
                    f"data_path={prefix}: {prefix}{suffix} does not exist; write it with preprocess_data"
                )


def conversations(config: RunConfig) -> None:
    """The files of sft_data and sft_eval_data."""
    sft = config.sft
    if not sft.sft_data:
        raise DataError("sft_data is empty, fine-tuning needs conversations; set --sft-data FILE.jsonl")
    _require("sft_data", sft.sft_data, "a JSONL file of conversations")
    _require("sft_eval_data", sft.sft_eval_data, "a JSONL file of conversations")


def problems(config: RunConfig) -> None:
    """The files of prompt_data and eval_prompt_data; reasoning-gym's problems need none."""
    rollout = config.rollout
    if not rollout.prompt_data:
        raise DataError(
            f"prompt_data is empty, there is nothing to ask; set --prompt-data FILE.jsonl or {GYM_PREFIX}NAME"
        )
    for name, words in (("prompt_data", rollout.prompt_data), ("eval_prompt_data", rollout.eval_prompt_data)):
        sources = [source for _, source in parse_blend(name, words, "source")] if words else []
        files = [source for source in sources if not source.startswith(GYM_PREFIX)]
        _require(name, files, f"a JSONL file of problems, or {GYM_PREFIX}NAME")


def tokenizer(config: RunConfig) -> None:
    """The tokenizer of a stage that reads text."""
    if config.data.tokenizer_model is None:
        raise DataError("tokenizer_model is not set, and the data is text; set --tokenizer-model PATH")
    tokenizer_if_named(config)


def tokenizer_if_named(config: RunConfig) -> None:
    """The tokenizer of a stage that reads tokens; it then only decodes a sample."""
    path = config.data.tokenizer_model
    if path is not None and not Path(path).exists():
        raise DataError(f"tokenizer_model={path} does not exist; name the tokenizer's file or folder")


def checkpoints(config: RunConfig) -> None:
    """The folders of load, which may still be empty where the run itself saves there, and pretrained_checkpoint."""
    c = config.checkpoint
    if c.load is not None and c.load != c.save and not Path(c.load).is_dir():
        raise CheckpointError(
            f"load={c.load} is not a folder; name one that holds checkpoints, or drop --load"
        )
    start = c.pretrained_checkpoint
    if start is not None and not Path(start).is_dir():
        raise CheckpointError(
            f"pretrained_checkpoint={start} is not a folder; name one that holds checkpoints"
        )


def outputs(config: RunConfig) -> None:
    """What every stage writes to: an earlier run's metrics file is renamed, which a folder or a device must not be.

    Raises:
        ConfigError: a setting names what cannot be written to.
    """
    settings = config.logging
    if settings.metrics_file is not None:
        shown = f"metrics_file={settings.metrics_file}"
        try:
            require_replaceable(Path(settings.metrics_file))
        except IsADirectoryError:
            remedy = f"name a file, such as {settings.metrics_file}/metrics.jsonl"
            raise ConfigError(f"{shown} is a folder; {remedy}") from None
        except OSError as error:
            raise ConfigError(f"{shown} {error.strerror}; name a file, or drop --metrics-file") from None
    if settings.wandb_project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_project={settings.wandb_project} needs wandb; pip install wandb or drop --wandb-project"
        )


def _require(name: str, paths: Sequence[str], what: str) -> None:
    for path in paths:
        if not Path(path).exists():
            raise DataError(f"{name}={path} does not exist; name {what}")
