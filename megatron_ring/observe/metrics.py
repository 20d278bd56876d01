"""Report a run's metrics: to metrics.jsonl, TensorBoard, Weights & Biases and the console."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ring.errors import ConfigError
from megatron_ring.observe.metrics_file import MetricsFile
from megatron_ring.observe.progress import ProgressLine

log = logging.getLogger("megatron_ring")

# keys of a record that are the logger's own
RESERVED = frozenset({"kind", "step", "tokens", "seconds", "tokens_per_second", "mfu", "wall_seconds"})


class PhaseTimer:
    """Seconds spent per named phase since they were last drained; a phase costs microseconds.

    This is the host's time: on a GPU, work that is only queued counts in the phase that waits for it.

    Example::

        with phases("data"):
            batch = next(batches)
        phases.drain()  # {"data": 0.0012}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class MetricsLogger:
    """Everything a run reports, one call a step. Only the log rank (``is_log_rank``) writes or prints.

    Call on every rank, so that stages need no rank checks; it communicates nothing. Raises ConfigError,
    before training, for a folder that cannot be written and for W&B without its package or login.

    Example::

        with MetricsLogger(run_dir, total_steps=300, log_interval=10) as metrics:
            for step in range(1, 301):
                with metrics.phase("data"):
                    batch = next(batches)
                ...
                metrics.log(step, {"loss": 3.2, "lr": 1e-3, "grad_norm": 0.8}, tokens=8192, seconds=0.4)
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        total_steps: int,
        log_interval: int,
        log_interval_seconds: float = 0.0,
        resume_step: int = 0,
        tensorboard_dir: str | Path | None = None,
        metrics_file: str | Path | None = None,
        wandb_project: str | None = None,
        is_log_rank: bool = True,
        world_size: int = 1,
        peak_tflops: float = 0.0,
        flops_per_token: float = 0.0,
        facts: Mapping[str, Any] | None = None,
        shown: tuple[str, ...] = ("loss", "lr", "grad_norm"),
    ) -> None:
        """Open the sinks.

        Args:
            run_dir: holds ``metrics.jsonl`` unless ``metrics_file`` names another file; with neither no file
                is written.
            total_steps: optimizer steps in the whole run, those before a resume included.
            log_interval: steps between progress lines; the first and the last step always have one.
            log_interval_seconds: wall-clock seconds between two progress lines, at least.
            resume_step: steps done before this start. What the file says about later steps, from a run that
                was killed, is dropped. At 0 an earlier file is moved to ``metrics.jsonl.old``.
            world_size: devices, for model FLOP utilisation.
            peak_tflops: peak of one device in TFLOP/s; 0 when unknown.
            flops_per_token: forward and backward floating-point operations per token.
            facts: JSON values added to the ``run`` record.
            shown: values of the progress line, in order: the mean over its steps of the first, the last of
                the others.
        """
        self.phase = PhaseTimer()
        self._is_log_rank = is_log_rank
        self._peak_flops = peak_tflops * 1e12 * world_size
        self._flops_per_token = flops_per_token
        self._step = resume_step
        self._file: MetricsFile | None = None
        self._tensorboard: _TensorBoard | None = None
        self._wandb: Any = None
        if not is_log_rank:
            return
        path = metrics_file or (None if run_dir is None else Path(run_dir) / "metrics.jsonl")
        started = {"world_size": world_size, **(facts or {})}
        # the metrics file comes last: a refusal before it leaves an earlier run's file alone
        if tensorboard_dir is not None:
            self._tensorboard = _open_tensorboard(tensorboard_dir, resume_step)
        if wandb_project is not None:
            self._wandb = _open_wandb(wandb_project, run_dir, resume_step, started)
        if path is not None:
            self._file = MetricsFile(Path(path), resume_step)
        wall_before = 0.0 if self._file is None else self._file.wall_seconds
        self._start = time.perf_counter() - wall_before
        self._progress = ProgressLine(total_steps, log_interval, log_interval_seconds, shown)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._write({"kind": "run", "step": resume_step, "time": now, **started})

    def log(self, step: int, values: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Report optimizer step ``step`` (from 1): its values, its tokens summed over DP, its duration.

        Raises ConfigError when the disk is full; the file then ends with the last whole line.
        """
        phases = self.phase.drain()
        if not self._is_log_rank:
            return
        assert step > self._step, f"step {step} after step {self._step}: each step is reported once"
        assert not RESERVED & values.keys(), f"{sorted(RESERVED & values.keys())} are the logger's own names"
        self._step = step
        numbers = {name: float(value) for name, value in values.items()}
        speed = {"tokens_per_second": tokens / seconds}
        if self._peak_flops > 0 and self._flops_per_token > 0:
            speed["mfu"] = speed["tokens_per_second"] * self._flops_per_token / self._peak_flops
        wall = time.perf_counter() - self._start
        record = {"kind": "train", "step": step, "tokens": tokens, "seconds": seconds, **speed, **numbers}
        record |= {f"seconds_{name}": spent for name, spent in phases.items()}
        self._write({**record, "wall_seconds": wall})
        scalars = {f"train/{name}": value for name, value in numbers.items()}
        scalars |= {f"speed/{name}": value for name, value in speed.items()}
        scalars |= {f"seconds/{name}": spent for name, spent in phases.items()}
        self._send(step, {**scalars, "seconds/step": seconds})
        self._progress.add(
            step, numbers, tokens=tokens, seconds=seconds, mfu=speed.get("mfu"), wall_seconds=wall
        )

    def log_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Report a validation after ``step`` steps. Example: ``log_eval(50, {"loss": 3.1})``."""
        if not self._is_log_rank:
            return
        numbers = {name: float(value) for name, value in values.items()}
        wall = time.perf_counter() - self._start
        self._write({"kind": "eval", "step": step, **numbers, "wall_seconds": wall})
        self._send(step, {f"eval/{name}": value for name, value in numbers.items()})
        self._progress.show_eval(step, numbers)

    def close(self) -> None:
        """Record that the run ended normally and close the sinks."""
        if self._is_log_rank:
            wall = time.perf_counter() - self._start
            phases = {f"seconds_{name}": spent for name, spent in self.phase.drain().items()}
            self._write({"kind": "end", "step": self._step, **phases, "wall_seconds": wall})
        self._close_sinks(exit_code=0)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self._close_sinks(exit_code=1)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.append(record)

    def _send(self, step: int, scalars: dict[str, float]) -> None:
        if self._tensorboard is not None:
            self._tensorboard = self._tensorboard.add(step, scalars)
        if self._wandb is not None:
            self._wandb.log({"step": step, **scalars})

    def _close_sinks(self, exit_code: int) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
        self._file = self._tensorboard = self._wandb = None


class _TensorBoard:
    """TensorBoard's events; a failure to write them does not end the training."""

    def __init__(self, writer: Any, folder: str | Path):
        self._writer, self._folder = writer, folder
        self._hook = threading.excepthook
        threading.excepthook = self._thread_ended

    def add(self, step: int, scalars: Mapping[str, float]) -> _TensorBoard | None:
        """Write the scalars; None after a failure, which is logged once."""
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)
            return None
        return self

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)
        threading.excepthook = self._hook

    def _give_up(self, error: OSError) -> None:
        log.warning(
            "no more TensorBoard events in %s: %s; the run continues without them; free space and resume to get more",
            self._folder,
            error.strerror or error,
        )
        with contextlib.suppress(OSError):
            self._writer.close()
        threading.excepthook = self._hook

    def _thread_ended(self, ended: threading.ExceptHookArgs) -> None:
        """The writer's thread raises its error again in the next call, so its own traceback is not printed."""
        if not (issubclass(ended.exc_type, OSError) and type(ended.thread).__name__ == "_AsyncWriterThread"):
            self._hook(ended)


def _open_tensorboard(folder: str | Path, resume_step: int) -> _TensorBoard | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        log.warning("no TensorBoard events: %s; pip install tensorboard", error)
        return None
    try:
        # hides what a killed run said about later steps
        writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)
    except OSError as error:
        message = f"--tensorboard-dir {folder}: {error.strerror}; name a folder that can be written"
        raise ConfigError(message) from None
    return _TensorBoard(writer, folder)


def _open_wandb(project: str, run_dir: str | Path | None, resume_step: int, facts: dict[str, Any]) -> Any:
    """A W&B run for this start; all starts in one folder have the folder's name as their group."""
    wandb: Any = importlib.import_module("wandb")
    name = "run" if run_dir is None else Path(run_dir).resolve().name
    try:
        run = wandb.init(project=project, group=name, name=f"{name} from step {resume_step}", config=facts)
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        message = f"--wandb-project {project}: {reason}; run wandb login or set WANDB_MODE=offline"
        raise ConfigError(message) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
