"""Supervised fine-tuning, from chat JSONL to a checkpoint: imitate the assistant's turns.

One step: draw packed microbatches, accumulate gradients, update unless the loss is broken, report, validate,
save. A step's loss is divided by its tokens of assistants, wherever they are packed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_ring.config.rules.training import schedule_problems
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.data.conversations import SftStream, load_conversations
from megatron_ring.data.text.messages import parse_template_kwargs
from megatron_ring.errors import ConfigError
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.runtime.session import Session
from megatron_ring.stages.run import StageRun, open_stage
from megatron_ring.train.objective import NextTokenObjective
from megatron_ring.train.schedule import learning_rate

log = logging.getLogger("megatron_ring")


def train_sft(config: RunConfig) -> None:
    """Run the whole stage on this process. Every rank of the world calls it with the same configuration.

    Raises:
        RingError: bad input (one line says what to do), or a loss that is not finite several steps running.
    """
    with open_stage(config) as session:
        SftRun.of(config, session).run()


class SftRun(StageRun):
    """The parts of one fine-tuning run and its step."""

    stage = "sft"

    @classmethod
    def of(cls, config: RunConfig, session: Session) -> SftRun:
        """The run on ``config``'s conversations; if the config sets no number of steps, as many as its epochs
        have."""
        streams = open_streams(config, session)
        return cls(with_derived_steps(config, streams.steps), session, streams)

    def __init__(self, config: RunConfig, session: Session, streams: Streams):
        super().__init__(config, session)
        self.stream, self.valid, self.per_step = streams.train, streams.valid, streams.per_step
        self.objective = NextTokenObjective(mtp_loss_scaling_factor=config.model.mtp_loss_scaling_factor)
        self.epoch_ended = False

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.stream.load_state_dict(state["stream"])

    def train_step(self, metrics: MetricsLogger) -> None:
        begun = time.perf_counter()
        with metrics.phase("data"):
            epoch = self.stream.epoch
            groups = self.stream.take(self.per_step)
            self.epoch_ended = self.stream.epoch != epoch
            microbatches = self._own(self.stream, groups)
        with metrics.phase("forward_backward"):
            report = self.engine.accumulate(microbatches, self.objective)
        lr = learning_rate(self.step, self.config.train)
        skipped = self.skip_non_finite(report)
        with metrics.phase("optimizer"):
            if skipped:
                self.engine.discard()
            else:
                self.engine.update(report, lr)
        self.step += 1
        tokens = self.stream.num_tokens(groups)
        values = self.step_values(report, 0.0 if skipped else lr) | {
            "skipped": float(skipped),
            "epoch": float(epoch),
            "conversations": float(sum(map(len, groups))),
            "loss_tokens": report.denominator,
            "packing": tokens / (len(groups) * self.stream.capacity),
        }
        metrics.log(self.step, values, tokens=tokens, seconds=time.perf_counter() - begun)

    def validate(self) -> dict[str, float]:
        """Loss over the same ``eval_iters`` global batches every time, or over all there is if that is less."""
        assert self.valid is not None
        groups = self.valid.first(self.per_step * self.config.train.eval_iters)
        # the same number on every rank, and a multiple of what virtual pipeline stages need
        groups += [()] * (-len(groups) % self.per_step)
        loss = self.engine.evaluate(self._own(self.valid, groups), self.objective)["lm_loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    def save_due(self) -> bool:
        return super().save_due() or (self.config.sft.sft_save_every_epoch and self.epoch_ended)

    def sample_prompt(self) -> Sequence[int]:
        shown = self.valid or self.stream
        return shown.conversations.prompt(0)

    def _own(self, stream: SftStream, groups: Sequence[Sequence[int]]) -> list[Microbatch]:
        """This data-parallel rank's slice of a step's microbatches."""
        share = len(groups) // self.session.topology.dp_size
        rank = self.session.topology.dp_rank
        return [stream.microbatch(group) for group in groups[rank * share : (rank + 1) * share]]


class Streams(NamedTuple):
    """The conversations of a run. ``per_step`` are microbatches of one step, over all ranks; ``steps`` is how many the
    epochs make.
    """

    train: SftStream
    valid: SftStream | None
    per_step: int
    steps: int


def open_streams(config: RunConfig, session: Session) -> Streams:
    """Read the run's conversations."""
    train = config.train
    per_step = train.global_batch_size // train.micro_batch_size
    stream = _open_stream(config.sft.sft_data, config, session)
    valid = _open_stream(config.sft.sft_eval_data, config, session) if train.eval_interval else None
    steps = max(round(stream.microbatches_in(config.sft.sft_epochs) / per_step), 1)
    return Streams(stream, valid, per_step, steps)


def _open_stream(paths: Sequence[str], config: RunConfig, session: Session) -> SftStream:
    data, train = config.data, config.train
    assert data.tokenizer_model is not None
    conversations = load_conversations(
        paths,
        tokenizer_type=data.tokenizer_type,
        tokenizer_model=data.tokenizer_model,
        longest=train.seq_length,
        workers=data.num_workers,
        chat_template_kwargs=parse_template_kwargs(data.chat_template_kwargs),
    )
    if session.is_log_rank:
        log.info(
            "%s: %s conversations, %s tokens, %s of them learned; %s longer than seq_length=%d left out",
            ", ".join(paths),
            f"{len(conversations):,}",
            f"{len(conversations.tokens):,}",
            f"{int(conversations.learned.sum()):,}",
            f"{conversations.num_too_long:,}",
            train.seq_length,
        )
        if conversations.num_split:
            log.info(
                "the chat template rewrites earlier turns: %s conversations are read once per answer, each as the "
                "last turn",
                f"{conversations.num_split:,}",
            )
    return SftStream(conversations, capacity=train.micro_batch_size * train.seq_length, seed=train.seed)


def with_derived_steps(config: RunConfig, steps: int) -> RunConfig:
    """``config`` with ``train_iters`` and ``lr_warmup_iters`` computed from the data where they are 0.

    Raises:
        ConfigError: the schedule does not fit so many steps.
    """
    train = config.train
    if not train.train_iters:
        train = replace(train, train_iters=steps)
    if not train.lr_warmup_iters:
        warmup = math.ceil(config.sft.sft_warmup_fraction * train.train_iters)
        train = replace(train, lr_warmup_iters=min(warmup, train.train_iters - 1))
    for problem in schedule_problems(train):
        raise ConfigError(problem)
    return replace(config, train=train)
