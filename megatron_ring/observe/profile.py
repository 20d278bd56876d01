"""``--profile``: a torch trace of some steps, one Chrome JSON per rank."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_ring.config.run import LoggingConfig
from megatron_ring.runtime import device

log = logging.getLogger("megatron_ring")


class StepProfiler:
    """Records from step ``profile_step_start`` up to ``profile_step_end``; does nothing without
    ``--profile``.
    """

    def __init__(self, settings: LoggingConfig, rank: int, run_dir: Path | None):
        self._settings = settings
        self._path = (run_dir or Path(".")) / f"trace_rank{rank}.json"
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> StepProfiler:
        if self._settings.profile and self._settings.profile_step_start <= 1:
            self._start()
        return self

    def after_step(self, step: int) -> None:
        """Call when step ``step`` (from 1) has ended."""
        if self._profiler is not None and step + 1 >= self._settings.profile_step_end:
            self._stop()
        elif (
            self._settings.profile
            and self._profiler is None
            and step + 1 == self._settings.profile_step_start
        ):
            self._start()

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._stop()

    def _start(self) -> None:
        self._profiler = torch.profiler.profile(activities=device.profiler_activities())
        self._profiler.start()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        log.info("wrote the profile to %s", self._path)
