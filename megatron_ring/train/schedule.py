"""Schedules: learning rate and global batch size are pure functions of the step or of the samples consumed.

:class:`SpikeRule` is the exception: it has state, which checkpoints contain.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megatron_ring.config.train import TrainConfig
from megatron_ring.data.json_text import numbers_in


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step ``step`` (from 0), as in Megatron.

    Linear warm-up to ``lr`` over ``lr_warmup_iters`` steps, then ``lr_decay_style`` until ``lr_decay_iters``, then
    ``min_lr``.
    """
    warmup, end = config.lr_warmup_iters, config.lr_decay_iters or config.train_iters
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if config.lr_decay_style == "inverse-square-root":
        anchor = max(warmup, 1)
        return max(config.min_lr, config.lr * math.sqrt(anchor / max(step + 1, anchor)))
    if step >= end:
        return config.min_lr
    if config.lr_decay_style == "cosine":
        share = (step - warmup) / max(end - warmup, 1)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    return _warmup_stable_decay(step, end, config)


def _warmup_stable_decay(step: int, end: int, config: TrainConfig) -> float:
    """``lr`` until the last ``lr_wsd_decay_iters`` steps, then a decay of ``lr_wsd_decay_style`` to ``min_lr``."""
    anneal = config.lr_wsd_decay_iters or 0
    start = end - anneal
    if step < start or anneal == 0:
        return config.lr
    share = (step - start + 1) / anneal
    match config.lr_wsd_decay_style:
        case "linear":
            coefficient = 1 - share
        case "cosine":
            coefficient = 0.5 * (1 + math.cos(math.pi * share))
        case "exponential":
            coefficient = 2 * 0.5**share - 1
        case _:  # minus_sqrt
            coefficient = 1 - math.sqrt(share)
    return config.min_lr + (config.lr - config.min_lr) * coefficient


def global_batch_size(consumed_samples: int, config: TrainConfig) -> int:
    """Samples in the step that starts after ``consumed_samples``; warm-up as Megatron's ``--rampup-batch-size``.

    ``(start, increment, samples)``: the batch grows from ``start`` to ``global_batch_size`` in steps of ``increment``,
    which are spaced equally over the first ``samples`` samples.
    """
    if config.rampup_batch_size is None:
        return config.global_batch_size
    start, increment, ramp_samples = config.rampup_batch_size
    stages = (config.global_batch_size - start) // increment
    if stages == 0 or consumed_samples >= ramp_samples:
        return config.global_batch_size
    return start + increment * int(consumed_samples // (ramp_samples / stages))


@dataclass
class SpikeRule:
    """Loss spikes (Ling report): skip the update and retry the data later; if it spikes again, lower the learning rate.

    A step spikes if its loss exceeds ``factor`` times the mean of the last ``window`` accepted losses. ``judge`` returns
    the multiplier of the learning rate: 1 normally, 0 to skip the update, ``retry_lr_factor`` if retried data spikes.

    Example: factor 2, window 4, losses 3, 3, 3, 3, then 7: multipliers 1, 1, 1, 1, 0.
    """

    factor: float
    window: int
    retry_lr_factor: float
    losses: deque[float] = field(default_factory=deque[float])

    def judge(self, loss: float, retried: bool) -> float:
        full = len(self.losses) >= self.window
        spike = self.factor > 0 and full and loss > self.factor * sum(self.losses) / len(self.losses)
        if spike and not retried:
            return 0.0
        self.losses.append(loss)
        while len(self.losses) > self.window:
            self.losses.popleft()
        return self.retry_lr_factor if spike else 1.0

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(numbers_in(state, "losses"))
