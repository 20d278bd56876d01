"""What the layout proofs share on pytest's side: one spawn per world size, and what its processes wrote."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.collect import whole_tensors
from tests.helpers.parallel.watching import PATIENCE, assert_ended_well, run_preloaded
from tests.helpers.paths import python_path

ROOT = Path(__file__).resolve().parents[3]
several_worlds = pytest.mark.timeout(3 * PATIENCE + 300)
"""For tests that wait for up to three of them, each of which names itself before."""


def spawn(world: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` on ``world`` processes; give the result to ``assert_ended_well``."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}
    return run_preloaded(["-m", module, *arguments], world, cwd=ROOT, env=env)


def world_runner(worker: str, folder: Path) -> Callable[[int], Path]:
    """Runs ``worker WORLD FOLDER`` once per world size, the single process first; returns the folder."""
    # a failed spawn fails every test of its world once, without another spawn
    spawned = cache(lambda world: spawn(world, worker, str(world), str(folder)))

    def run(world: int) -> Path:
        if world > 1:
            run(1)
        assert_ended_well(spawned(world))
        return folder

    return run


def layouts(cases: Sequence[Case], slow_from: int) -> list:
    """One pytest parameter per case; those of ``slow_from`` processes and more are marked slow."""
    return [
        pytest.param(
            case,
            id=f"world{case.world}-{case.name}",
            marks=[pytest.mark.slow] if case.world >= slow_from else [],
        )
        for case in cases
    ]


@cache
def single_process(folder: Path, model: str, kind: str) -> dict[str, torch.Tensor]:
    """The whole tensors that the single process of ``model`` wrote."""
    return whole_tensors(folder / model, kind)
