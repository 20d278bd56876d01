"""Supervised fine-tuning on conversations."""

from dataclasses import dataclass
from typing import Annotated

from megatron_ring.config.ranges import Above, AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """Conversations to imitate, and for how long.

    Example: ``SftConfig(sft_data=("long_cot.jsonl",), sft_epochs=3)``.
    """

    sft_data: tuple[str, ...] = ()
    """Chat JSONL files, one conversation a line under "messages"."""
    sft_eval_data: tuple[str, ...] = ()
    """Chat JSONL files for the validation loss."""
    sft_epochs: Annotated[float, Above(0, remedy="try 3")] = 3.0
    """Passes over the data, if train_iters is 0."""
    sft_warmup_fraction: Annotated[float, AtLeast(0, below=1, remedy="try 0.01")] = 0.01
    """Share of the steps that are warm-up, if lr_warmup_iters is 0."""
    sft_save_every_epoch: bool = False
    """Save a checkpoint after each pass over the data too."""
