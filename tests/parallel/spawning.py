"""What the layout proofs share on pytest's side: one spawn per world size, and what its processes wrote."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parallel.cases import Case
from tests.parallel.collect import whole_tensors

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(world: int, *arguments: str, timeout: int = 1500) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ARGUMENTS`` on ``world`` processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *arguments]
    if world > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        command = [sys.executable, *launcher, *address, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout)


def world_runner(worker: str, folder: Path, timeout: int = 1500) -> Callable[[int], Path]:
    """Runs ``worker WORLD FOLDER`` once per world size, the single process first; returns the folder."""

    @cache
    def run(world: int) -> Path:
        if world > 1:
            run(1)
        result = spawn(world, worker, str(world), str(folder), timeout=timeout)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
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
