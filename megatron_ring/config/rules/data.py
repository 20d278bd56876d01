"""What pre-training and fine-tuning read."""

import json
import math
from collections.abc import Iterator

from megatron_ring.config.blend import blend_problems
from megatron_ring.config.run import RunConfig


def corpus(config: RunConfig, world_size: int) -> Iterator[str]:
    """Pre-training: a blend of corpora and its split."""
    yield from blend_problems("data_path", config.data.data_path, "prefix")
    split, every = config.data.split, config.train.eval_interval
    shares = split.split(",")
    if len(shares) != 3 or not all(_is_share(share) for share in shares) or float(shares[0]) == 0:
        yield f"split={split} must be three shares, the first above 0; try 949,50,1"
    elif every > 0 and float(shares[1]) == 0:
        yield f"split={split} leaves nothing to validate on, but eval_interval={every}; try 949,50,1"
    if config.data.chat_template_kwargs:
        yield "chat_template_kwargs is for conversations; drop --chat-template-kwargs in pre-training"


def chat_template(config: RunConfig, world_size: int) -> Iterator[str]:
    """Variables of the chat template as a JSON object."""
    words = config.data.chat_template_kwargs
    try:
        good = isinstance(json.loads(words or "{}"), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        yield f'chat_template_kwargs={words} must be a JSON object; try {{"enable_thinking": false}}, in quotes'


def fine_tuning(config: RunConfig, world_size: int) -> Iterator[str]:
    """What fine-tuning needs beside its settings, and what is for pre-training alone."""
    s, t = config.sft, config.train
    if s.sft_save_every_epoch and config.checkpoint.save is None:
        yield "sft_save_every_epoch=True needs a folder to save in; set --save FOLDER"
    if t.eval_interval > 0 and not s.sft_eval_data:
        yield (
            f"eval_interval={t.eval_interval} needs conversations to validate on; set --sft-eval-data "
            "FILE.jsonl or --eval-interval 0"
        )
    if t.loss_spike_factor:
        yield f"loss_spike_factor={t.loss_spike_factor} is for pre-training; set it to 0 in fine-tuning"
    if t.rampup_batch_size:
        yield "rampup_batch_size is for pre-training; set --rampup-batch-size none in fine-tuning"


def _is_share(word: str) -> bool:
    try:
        return 0 <= float(word) < math.inf
    except ValueError:
        return False
