"""Pre-training, from a corpus on disk to a checkpoint: the page to read first.

One step: draw samples, accumulate gradients over the microbatches, judge the loss, update or skip, report,
validate, save.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.folder import write_durably
from megatron_ring.config.count import count_parameters, flops_per_token
from megatron_ring.config.run import RunConfig
from megatron_ring.config.show import dump_toml, format_config
from megatron_ring.data.corpus import open_corpus
from megatron_ring.data.microbatch import Microbatch, pack_microbatch
from megatron_ring.data.pretrain_stream import Draw, PretrainSample, PretrainStream, SampleCursor
from megatron_ring.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ring.errors import ConfigError, RingError
from megatron_ring.runtime.metrics import MetricsLogger
from megatron_ring.runtime.profile import StepProfiler
from megatron_ring.runtime.session import Session, open_session
from megatron_ring.train.engine import Engine, StepReport
from megatron_ring.train.objective import NextTokenObjective
from megatron_ring.train.sampling import sample_tokens
from megatron_ring.train.schedule import SpikeRule, global_batch_size, learning_rate

log = logging.getLogger("megatron_ring")

MAX_NON_FINITE_STEPS = 3
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 120


def pretrain(config: RunConfig) -> None:
    """Run the whole stage on this process. Every rank of the world calls it with the same configuration.

    Raises:
        RingError: bad input (one line says what to do), or a loss that is not finite several steps running.
    """
    logging.basicConfig(level=config.logging.log_level.upper(), format="%(message)s")
    with open_session(config.parallel, config.train.seed) as session:
        run = PretrainRun(config, session)
        run.train()


class PretrainRun:
    """The parts of one pre-training run and the loop over its steps."""

    def __init__(self, config: RunConfig, session: Session):
        self.config, self.session = config, session
        train = config.train
        self.tokenizer = _tokenizer(config)
        splits = open_corpus(config.data.data_path, config.data.split, tokenizer=self.tokenizer)
        self.stream = self._stream(splits.train)
        self.valid = self._stream(splits.valid) if train.eval_interval else None
        self.cursor = SampleCursor(seed=train.seed, fingerprint=self.stream.fingerprint)
        self.spikes = SpikeRule(
            factor=train.loss_spike_factor,
            window=train.loss_spike_window,
            retry_lr_factor=train.loss_spike_retry_lr_factor,
        )
        self.engine = Engine(config, session)
        self.checkpointer = Checkpointer(config, self.engine, session)
        self.objective = NextTokenObjective(mtp_loss_scaling_factor=config.model.mtp_loss_scaling_factor)
        self.step = 0
        self.non_finite = 0
        self.started = time.monotonic()
        if config.checkpoint.load:
            self._resume(self.checkpointer.load(config.checkpoint.load))

    def train(self) -> None:
        """Steps until ``train_iters``, a signal, or an exit setting; then the last checkpoint."""
        train = self.config.train
        self._announce()
        with (
            self._metrics() as metrics,
            StepProfiler(self.config.logging, self.session.rank, self._run_dir()) as profiler,
        ):
            while self.step < train.train_iters and not self._leave():
                self._train_step(metrics)
                profiler.after_step(self.step)
                if train.eval_interval and (
                    self.step % train.eval_interval == 0 or self.step == train.train_iters
                ):
                    with metrics.phase("eval"):
                        validation = self._validate()
                    metrics.log_eval(self.step, validation)
                self._save_if_due(metrics)
            with metrics.phase("save"):
                self._save_last()
            self._write_sample()

    def _train_step(self, metrics: MetricsLogger) -> None:
        begun = time.perf_counter()
        batch_size = global_batch_size(self.cursor.consumed_samples, self.config.train)
        with metrics.phase("data"):
            draw = self.cursor.take(batch_size)
            microbatches = self._microbatches(self.stream.samples(self._own_indices(draw)))
            self.stream.prefetch(self._own_indices(self.cursor.peek(batch_size)))
        with metrics.phase("forward_backward"):
            report = self.engine.accumulate(microbatches, self.objective, self._routing_warmup())
        lr = learning_rate(self.step, self.config.train) * self._judge(report, draw)
        with metrics.phase("optimizer"):
            if lr > 0 or (report.finite and not self._was_skipped):
                self.engine.update(report, lr)
            else:
                self.engine.discard()
        self.step += 1
        seconds = time.perf_counter() - begun
        tokens = batch_size * self.config.train.seq_length
        metrics.log(self.step, self._values(report, lr, batch_size), tokens=tokens, seconds=seconds)

    def _judge(self, report: StepReport, draw: Draw) -> float:
        """Multiplier for the learning rate; 0 with ``_was_skipped`` set leaves the weights alone.

        Raises:
            RingError: several steps running were not finite.
        """
        self._was_skipped = True
        if not report.finite:
            self.non_finite += 1
            log.warning(
                "step %d: loss %s, grad norm %s: update refused", self.step + 1, report.loss, report.grad_norm
            )
            if self.non_finite >= MAX_NON_FINITE_STEPS:
                raise RingError(
                    f"loss={report.loss} for {self.non_finite} steps running (last: step {self.step + 1}), must be finite; "
                    "lower --lr, check the data, or load an earlier checkpoint"
                )
            return 0.0
        self.non_finite = 0
        multiplier = self.spikes.judge(report.loss, retried=any(draw.is_retry))
        if multiplier == 0.0:
            log.warning(
                "step %d: loss %.4f spikes: update skipped, its samples come again",
                self.step + 1,
                report.loss,
            )
            self.cursor.requeue(draw.indices, within=self.config.train.loss_spike_window * len(draw.indices))
            return 0.0
        self._was_skipped = False
        return multiplier

    def _values(self, report: StepReport, lr: float, batch_size: int) -> dict[str, float]:
        values = {"loss": report.means["lm_loss"], "lr": lr, "grad_norm": report.grad_norm}
        if self.config.model.mtp_num_layers:
            values["mtp_loss"] = report.means["mtp_loss"]
        if self.config.model.is_moe:
            values |= {
                "balance_loss": report.balance_loss,
                "router_z_loss": report.z_loss,
                "max_violation": report.max_violation,
            }
        return values | {
            "skipped": float(self._was_skipped),
            "global_batch_size": float(batch_size),
            "consumed_samples": float(self.cursor.consumed_samples),
        }

    def _validate(self) -> dict[str, float]:
        """Loss over the same ``eval_iters`` global batches of the validation split every time."""
        assert self.valid is not None
        size = self.config.train.global_batch_size
        indices = range(size * self.config.train.eval_iters)
        draw = Draw(indices=tuple(indices), is_retry=(False,) * len(indices))
        microbatches = self._microbatches(self.valid.samples(self._own_indices(draw)))
        loss = self.engine.evaluate(microbatches, self.objective)["lm_loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

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

    def _leave(self) -> bool:
        """Collective: a signal on any rank, or one of the exit settings (the first step after a start
        always runs).
        """
        train = self.config.train
        minutes = (time.monotonic() - self.started) / 60
        limit = train.exit_duration_in_mins
        asked = self.session.exit_wanted(limit > 0 and minutes >= limit)
        if asked and self.session.is_writer:
            log.info("leaving after step %d: a signal or the time limit asked for it", self.step)
        due = (
            train.exit_interval
            and self.step
            and self.step % train.exit_interval == 0
            and self.step != self.first_step
        )
        return bool(asked or due)

    def _save_if_due(self, metrics: MetricsLogger) -> None:
        with metrics.phase("save"):
            self.checkpointer.poll()
            interval = self.config.checkpoint.save_interval
            if self.config.checkpoint.save and interval and self.step % interval == 0:
                self._save()

    def _save_last(self) -> None:
        if self.config.checkpoint.save and self.saved_step != self.step:
            self._save()
        self.checkpointer.finish()

    def _save(self) -> None:
        self.checkpointer.save(
            self.step,
            {"step": self.step, "cursor": self.cursor.state_dict(), "spikes": self.spikes.state_dict()},
        )
        self.saved_step = self.step

    def _resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.step = state["step"]
        self.cursor.load_state_dict(state["cursor"])
        self.spikes.load_state_dict(state["spikes"])

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

    def _metrics(self) -> MetricsLogger:
        settings = self.config.logging
        return MetricsLogger(
            self._run_dir(),
            total_steps=self.config.train.train_iters,
            log_interval=settings.log_interval,
            resume_step=self.step,
            tensorboard_dir=settings.tensorboard_dir,
            metrics_file=settings.metrics_file,
            wandb_project=settings.wandb_project,
            is_writer=self.session.is_writer,
            world_size=self.session.world_size,
            peak_tflops=settings.peak_tflops,
            flops_per_token=flops_per_token(self.config.model, self.config.train.seq_length),
            facts={"stage": "pretrain", "parameters": count_parameters(self.config.model).total},
        )

    def _run_dir(self) -> Path | None:
        """Where config.toml and sample.txt go: beside the metrics file, else with the checkpoints."""
        if self.config.logging.metrics_file:
            return Path(self.config.logging.metrics_file).parent
        return Path(self.config.checkpoint.save) if self.config.checkpoint.save else None

    def _announce(self) -> None:
        self.first_step = self.saved_step = self.step
        run_dir = self._run_dir()
        if not self.session.is_writer:
            return
        log.info("%s", format_config(self.config))
        if run_dir is not None:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                write_durably(run_dir / "config.toml", dump_toml(self.config))
            except OSError as error:
                raise ConfigError(
                    f"save={run_dir}: {error.strerror}; name a folder that can be written"
                ) from None

    def _write_sample(self) -> None:
        """What the model says now, for the report."""
        run_dir = self._run_dir()
        if self.tokenizer is None or run_dir is None:
            return
        prompt = self.tokenizer.encode(SAMPLE_PROMPT)
        new = sample_tokens(
            self.engine,
            prompt,
            max_new_tokens=SAMPLE_TOKENS,
            num_slots=self.config.train.seq_length,
            seed=self.config.train.seed,
            stop_id=self.tokenizer.eos_id,
        )
        if self.session.is_writer:
            write_durably(run_dir / "sample.txt", self.tokenizer.decode([*prompt, *new]) + "\n")


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """The run's tokenizer, if one is named: it checks the corpus and reads the sample."""
    data = config.data
    if not data.tokenizer_model:
        return None
    return load_tokenizer(data.tokenizer_type, data.tokenizer_model, vocab_size=config.model.vocab_size)
