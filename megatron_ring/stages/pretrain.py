"""Pre-training, from a corpus on disk to a checkpoint: the page to read first.

One step: draw samples, accumulate gradients over the microbatches, check the loss, update or skip, report,
validate, save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.data.corpus.corpus import open_corpus
from megatron_ring.data.corpus.pretrain_stream import Draw, PretrainSample, PretrainStream, SampleCursor
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.stages.run import StageRun, open_stage
from megatron_ring.train.engine import StepReport
from megatron_ring.train.objective import NextTokenObjective
from megatron_ring.train.schedule import SpikeRule, global_batch_size, learning_rate

log = logging.getLogger("megatron_ring")

SAMPLE_PROMPT = "def "


def pretrain(config: RunConfig) -> None:
    """Run the whole stage on this process. Every rank of the world calls it with the same configuration.

    Raises:
        RingError: bad input (one line says what to do), or a loss that is not finite several steps running.
    """
    with open_stage(config) as session:
        PretrainRun(config, session).run()


class PretrainRun(StageRun):
    """The parts of one pre-training run and its step."""

    stage = "pretrain"

    def build(self, resources: ExitStack) -> None:
        config, train = self.config, self.config.train
        splits = open_corpus(config.data.data_path, config.data.split, tokenizer=self.tokenizer)
        self.stream = self._stream(splits.train)
        self.valid = self._stream(splits.valid) if train.eval_interval else None
        self.cursor = SampleCursor(seed=train.seed, fingerprint=self.stream.fingerprint)
        self.spikes = SpikeRule(
            factor=train.loss_spike_factor,
            window=train.loss_spike_window,
            retry_lr_factor=train.loss_spike_retry_lr_factor,
        )
        self.objective = NextTokenObjective(mtp_loss_scaling_factor=config.model.mtp_loss_scaling_factor)
        super().build(resources)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "cursor": self.cursor.state_dict(), "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.cursor.load_state_dict(state["cursor"])
        self.spikes.load_state_dict(state["spikes"])

    def train_step(self, metrics: MetricsLogger) -> None:
        begun = time.perf_counter()
        batch_size = global_batch_size(self.cursor.consumed_samples, self.config.train)
        with metrics.phase("data"):
            draw = self.cursor.take(batch_size)
            microbatches = self._microbatches(self.stream.samples(self._own_indices(draw)))
            self.stream.prefetch(self._own_indices(self.cursor.peek(batch_size)))
        with metrics.phase("forward_backward"):
            report = self.engine.accumulate(microbatches, self.objective, self._routing_warmup())
        multiplier = self._rate_multiplier(report, draw)
        lr = learning_rate(self.step, self.config.train) * (multiplier or 0.0)
        with metrics.phase("optimizer"):
            if multiplier is None:
                self.engine.discard()
            else:
                self.engine.update(report, lr)
        self.step += 1
        seconds = time.perf_counter() - begun
        tokens = batch_size * self.config.train.seq_length
        values = self.step_values(report, lr) | {
            "skipped": float(multiplier is None),
            "global_batch_size": float(batch_size),
            "consumed_samples": float(self.cursor.consumed_samples),
        }
        metrics.log(self.step, values, tokens=tokens, seconds=seconds)

    def _rate_multiplier(self, report: StepReport, draw: Draw) -> float | None:
        """Multiplier for the learning rate; None for a step that must leave the weights alone.

        Raises:
            RingError: several steps running were not finite.
        """
        if self.skip_non_finite(report):
            return None
        multiplier = self.spikes.judge(report.loss, retried=any(draw.is_retry))
        if multiplier == 0.0:
            log.warning(
                "step %d: loss %.4f spikes: update skipped, its samples come again",
                self.step + 1,
                report.loss,
            )
            self.cursor.requeue(draw.indices, within=self.config.train.loss_spike_window * len(draw.indices))
            return None
        return multiplier

    def validate(self) -> dict[str, float]:
        """Loss over the same ``eval_iters`` global batches of the validation split every time."""
        assert self.valid is not None
        size = self.config.train.global_batch_size
        indices = range(size * self.config.train.eval_iters)
        draw = Draw(indices=tuple(indices), is_retry=(False,) * len(indices))
        microbatches = self._microbatches(self.valid.samples(self._own_indices(draw)))
        loss = self.engine.evaluate(microbatches, self.objective)["lm_loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    def sample_prompt(self) -> Sequence[int]:
        return self.tokenizer.encode(SAMPLE_PROMPT) if self.tokenizer else ()

    def _own_indices(self, draw: Draw) -> tuple[int, ...]:
        """This data-parallel rank's slice of a global batch."""
        share = len(draw.indices) // self.session.topology.dp_size
        rank = self.session.topology.dp_rank
        return draw.indices[rank * share : (rank + 1) * share]

    def _microbatches(self, samples: list[PretrainSample]) -> list[Microbatch]:
        size, length = self.config.train.micro_batch_size, self.config.train.seq_length
        return [
            pack_microbatch(
                [(s.tokens, s.labels, s.loss_mask) for s in group],
                size * length,
                segment_lengths=[s.segment_lengths for s in group],
            )
            for group in (samples[i : i + size] for i in range(0, len(samples), size))
        ]

    def _routing_warmup(self) -> float:
        steps = self.config.model.moe_router_warmup_iters
        return min(self.step / steps, 1.0) if steps else 1.0

    def _stream(self, split: Any) -> PretrainStream:
        train, data = self.config.train, self.config.data
        return PretrainStream(
            split,
            seq_length=train.seq_length,
            seed=train.seed,
            reset_at_document=data.reset_at_document,
            vocab_size=self.config.model.vocab_size,
            num_workers=data.num_workers,
        )
