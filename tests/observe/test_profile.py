"""``--profile`` records the steps it is told to and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_ring.config.run import LoggingConfig
from megatron_ring.observe.profile import StepProfiler


def run(settings: LoggingConfig, folder: Path, steps: int) -> list[Path]:
    """Step n multiplies matrices of width 10 + n, so that a trace tells which steps it saw."""
    with StepProfiler(settings, rank=3, run_dir=folder) as profiler:
        for step in range(1, steps + 1):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(10 + step, 10 + step) @ torch.ones(10 + step, 10 + step)
            profiler.after_step(step)
    return sorted(folder.iterdir())


def steps_in(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(3, 5, ["step 3", "step 4"]), (1, 2, ["step 1"]), (5, 99, ["step 5", "step 6"])],
)
def test_the_trace_holds_the_steps_from_start_up_to_end(tmp_path, start, end, expected):
    settings = LoggingConfig(profile=True, profile_step_start=start, profile_step_end=end)
    (trace,) = run(settings, tmp_path, 6)
    assert trace.name == "trace_rank3.json"
    assert steps_in(trace) == expected


def test_without_the_flag_nothing_is_written(tmp_path):
    assert run(LoggingConfig(profile_step_start=1, profile_step_end=3), tmp_path, 4) == []


def test_an_error_in_a_profiled_step_still_leaves_the_trace(tmp_path):
    settings = LoggingConfig(profile=True, profile_step_start=1, profile_step_end=9)
    with pytest.raises(KeyError), StepProfiler(settings, rank=0, run_dir=tmp_path):
        torch.ones(3) + 1
        raise KeyError
    assert (tmp_path / "trace_rank0.json").exists()
