"""What the training stages share: the order of construction, and the loop.

A run is built, restored and looped, in that order (:meth:`StageRun.run`). A stage is a subclass that fills in the parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.run_lock import hold_run_folder
from megatron_ring.config.dump import dump_toml, format_changed
from megatron_ring.config.model_stats import count_parameters, flops_per_token
from megatron_ring.config.rules.model import export_problems
from megatron_ring.config.run import RunConfig
from megatron_ring.config.stages import stage_spec
from megatron_ring.data.text.messages import parse_template_kwargs
from megatron_ring.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_ring.durable import write_durably
from megatron_ring.errors import CheckpointError, ConfigError, RingError
from megatron_ring.model.spec import require_backend
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.observe.profile import StepProfiler
from megatron_ring.rl.rollout.inprocess import continue_tokens
from megatron_ring.runtime.ranks import rank_from_env, world_size_from_env
from megatron_ring.runtime.session import Session, is_log_rank, open_session
from megatron_ring.train.engine import Engine, StepReport

log = logging.getLogger("megatron_ring")

MAX_NON_FINITE_STEPS = 3
SAMPLE_TOKENS = 120


@contextmanager
def open_stage(config: RunConfig) -> Iterator[Session]:
    """This process's session, with our messages shown from ``log_level`` on, Megatron-Core's from warnings on.

    Messages below WARNING are logged on the log rank only. Holds the lock of the run's folder: no other run
    writes there.
    """
    logging.basicConfig(level=config.logging.log_level.upper(), format="%(message)s")
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    if not is_log_rank(rank_from_env(), world_size_from_env()):
        log.setLevel(max(logging.root.level, logging.WARNING))
    require_backend(config.model)
    train = config.train
    folder = config.checkpoint.save if rank_from_env() == 0 else None
    with (
        hold_run_folder(folder),
        open_session(config.parallel, train.seed, deterministic=train.deterministic) as session,
    ):
        yield session


class StageRun:
    """One run of a stage on one process. Every rank of the world makes the same calls."""

    stage: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = ("loss", "lr", "grad_norm")
    """Values of the progress line."""
    validates_at_start: ClassVar[bool] = False
    """Is step 0, before any update, worth a validation?"""

    engine: Engine
    checkpointer: Checkpointer

    def __init__(self, config: RunConfig, session: Session):
        self.config, self.session = config, session
        self.tokenizer = _tokenizer(config)
        self.step = self.first_step = self.saved_step = 0
        self.non_finite = 0
        self.started = time.monotonic()

    def run(self) -> None:
        """The whole run: build, restore, loop."""
        with self.opened():
            self.loop()

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """The run, ready for its next step. What it has opened is closed after the block."""
        with ExitStack() as resources:
            self.build(resources)
            self.restore()
            yield self

    def build(self, resources: ExitStack) -> None:
        """Make every part of the run, the model with random weights. Whatever needs closing goes into ``resources``."""
        self.engine = Engine(self.config, self.session)
        self.checkpointer = Checkpointer(self.config, self.engine, self.session, stage=self.stage)

    def restore(self) -> None:
        """Load the run's initial weights; then resume from its own checkpoint, if there is one."""
        settings = self.config.checkpoint
        if settings.finetune and settings.load:
            self.checkpointer.load(settings.load)
        elif settings.pretrained_checkpoint:
            self.checkpointer.load_weights(settings.pretrained_checkpoint)
        self.on_initial_weights()
        saved = self.checkpointer.load(settings.load) if settings.load and not settings.finetune else None
        if saved is not None:
            with self._foreign_state():
                self.load_state_dict(saved)
                if type(self.step) is not int or self.step < 0:
                    raise ValueError(f"says step {str(self.step)[:40]!r}")

    @contextmanager
    def _foreign_state(self) -> Iterator[None]:
        """The state that is read here may be another stage's, or edited: a missing or wrong value is one error
        line."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{self.checkpointer.loaded_folder}: trainer state {reason}; load a checkpoint that this stage saved, or "
                "its weights alone with --finetune or --pretrained-checkpoint"
            ) from None

    def on_initial_weights(self) -> None:
        """Called while the model holds the run's initial weights; in a resumed run too, before it loads its own
        checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and random states (JSON-able)."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.step = state["step"]

    def train_step(self, metrics: MetricsLogger) -> None:
        """One step: raises ``step`` by one and logs it."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; called every ``eval_interval`` steps."""
        raise NotImplementedError

    def sample_prompt(self) -> Sequence[int]:
        """Token ids to continue for ``sample.txt`` at the end of the run; empty writes none."""
        return ()

    def loop(self) -> None:
        """Steps until ``train_iters``, a signal, or an exit setting; then the last checkpoint."""
        train = self.config.train
        self.first_step = self.saved_step = self.step
        self._announce()
        with (
            self._metrics() as metrics,
            StepProfiler(self.config.logging, self.session.rank, self.run_dir()) as profiler,
        ):
            if self.step == 0 and self.validates_at_start and train.eval_interval:
                self._validate(metrics)
            while self.step < train.train_iters and not self._leave():
                self.train_step(metrics)
                profiler.after_step(self.step)
                if train.eval_interval and (
                    self.step % train.eval_interval == 0 or self.step == train.train_iters
                ):
                    self._validate(metrics)
                self._save_if_due(metrics)
            with metrics.phase("save"):
                self._save_last()
            self._write_sample()

    def _validate(self, metrics: MetricsLogger) -> None:
        with metrics.phase("eval"):
            validation = self.validate()
        metrics.log_eval(self.step, validation)

    def skip_non_finite(self, report: StepReport) -> bool:
        """Is this step's loss or gradient not finite, so that its update must not be made?

        Raises:
            RingError: several steps running were not finite.
        """
        if report.finite:
            self.non_finite = 0
            return False
        self.non_finite += 1
        log.warning(
            "step %d: loss %s, grad norm %s: update skipped", self.step + 1, report.loss, report.grad_norm
        )
        if self.non_finite >= MAX_NON_FINITE_STEPS:
            raise RingError(
                f"loss={report.loss} for {self.non_finite} steps running (last: step {self.step + 1}), must be finite; "
                "lower --lr, check the data, or load an earlier checkpoint"
            )
        return True

    def step_values(self, report: StepReport, lr: float) -> dict[str, float]:
        """What every supervised stage logs of a step."""
        values = {"loss": report.means["lm_loss"], "lr": lr, "grad_norm": report.grad_norm}
        if self.config.model.mtp_num_layers:
            values["mtp_loss"] = report.means["mtp_loss"]
        if self.config.model.is_moe:
            values |= {
                "balance_loss": report.balance_loss,
                "router_z_loss": report.z_loss,
                "max_violation": report.max_violation,
            }
        return values

    def save_due(self) -> bool:
        """Is a checkpoint due after the step just made?"""
        interval = self.config.checkpoint.save_interval
        return bool(interval) and self.step % interval == 0

    def run_dir(self) -> Path | None:
        """Where config.toml and sample.txt go: beside the metrics file, else with the checkpoints."""
        if self.config.logging.metrics_file:
            return Path(self.config.logging.metrics_file).parent
        return Path(self.config.checkpoint.save) if self.config.checkpoint.save else None

    def _leave(self) -> bool:
        """Collective: a signal on any rank, or one of the exit settings (the first step after a start
        always runs).
        """
        train = self.config.train
        minutes = (time.monotonic() - self.started) / 60
        limit = train.exit_duration_in_mins
        asked = self.session.exit_wanted(limit > 0 and minutes >= limit)
        if asked and self.session.is_log_rank:
            log.info("stopping after step %d, at a signal or the time limit", self.step)
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
            if self.config.checkpoint.save and self.save_due():
                self.save_checkpoint()

    def _save_last(self) -> None:
        if self.config.checkpoint.save and self.saved_step != self.step:
            self.save_checkpoint()
        self.checkpointer.finish()

    def attachments(self) -> dict[str, bytes]:
        """Files of this rank's own that a checkpoint carries (name -> contents; names differ between ranks)."""
        return {}

    def save_checkpoint(self) -> None:
        """Save the whole state under the current step. Collective over the world."""
        self.checkpointer.save(self.step, self.state_dict(), self.attachments())
        self.saved_step = self.step

    def _metrics(self) -> MetricsLogger:
        settings = self.config.logging
        return MetricsLogger(
            self.run_dir(),
            total_steps=self.config.train.train_iters,
            log_interval=settings.log_interval,
            log_interval_seconds=settings.log_interval_seconds,
            resume_step=self.step,
            tensorboard_dir=settings.tensorboard_dir,
            metrics_file=settings.metrics_file,
            wandb_project=settings.wandb_project,
            is_log_rank=self.session.is_log_rank,
            world_size=self.session.world_size,
            peak_tflops=settings.peak_tflops,
            flops_per_token=flops_per_token(self.config.model, self.config.train.seq_length),
            facts={"stage": self.stage, "parameters": count_parameters(self.config.model).total},
            shown=self.shown,
        )

    def _announce(self) -> None:
        run_dir = self.run_dir()
        if not self.session.is_log_rank:
            return
        if run_dir is not None:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                write_durably(run_dir / "config.toml", dump_toml(self.config))
            except OSError as error:
                flag = "--metrics-file in" if self.config.logging.metrics_file else "--save"
                raise ConfigError(
                    f"{flag} {run_dir}: {error.strerror}; name a folder that can be written"
                ) from None
        changed = format_changed(self.config, stage_spec(self.stage).sections)
        where = "--dry-run" if run_dir is None else run_dir / "config.toml"
        log.info("settings that differ from the defaults (all of them: %s):\n%s", where, changed)
        for problem in export_problems(self.config.model):
            log.warning("this model cannot be exported to Hugging Face: %s", problem)
        self._warn_of_overwriting()
        if self.step >= self.config.train.train_iters:
            log.info(
                "nothing is left to train: the checkpoint is of step %d and train_iters=%d; raise --train-iters to go on",
                self.step,
                self.config.train.train_iters,
            )

    def _warn_of_overwriting(self) -> None:
        """Say that the run saves among checkpoints of an earlier one that it does not go on from."""
        save, loaded = self.config.checkpoint.save, self.checkpointer.loaded_folder
        if not save or not Path(save).is_dir():
            return
        steps = folders.iterations(Path(save))
        if steps and (loaded is None or loaded.resolve().parent != Path(save).resolve()):
            log.warning(
                "--save %s holds checkpoints of an earlier run (last: step %d), which this run does not resume: it "
                "replaces those of its own steps; to resume add --load %s, else name another folder",
                save,
                steps[-1],
                save,
            )

    def _write_sample(self) -> None:
        """Sample from the model, for the report."""
        run_dir = self.run_dir()
        if self.tokenizer is None or run_dir is None:
            return
        prompt = list(self.sample_prompt())
        if not prompt:
            return
        limit = min(SAMPLE_TOKENS, self.config.train.seq_length - len(prompt))
        new = continue_tokens(self.engine, prompt, limit, self.config.train.seed, self.tokenizer.stop_ids)
        if self.session.is_log_rank:
            sample = run_dir / "sample.txt"
            try:
                write_durably(sample, self.tokenizer.decode([*prompt, *new]) + "\n")
            except OSError as error:
                raise ConfigError(
                    f"{sample}: {error.strerror}; check that the disk has space; the checkpoint is saved"
                ) from None


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """The run's tokenizer, if one is named: it checks the data and reads the sample."""
    data = config.data
    if not data.tokenizer_model:
        return None
    return load_tokenizer(
        data.tokenizer_type,
        data.tokenizer_model,
        vocab_size=config.model.vocab_size,
        chat_template_kwargs=parse_template_kwargs(data.chat_template_kwargs),
        stop_token_ids=config.rollout.stop_token_ids,
    )
