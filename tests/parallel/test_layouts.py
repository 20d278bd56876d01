"""Every layout computes what one process computes: loss, every gradient, weights after three optimizer steps.

All start from one checkpoint of the single process, so this also proves that checkpoints load at every
layout. One spawn per world size runs all its layouts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.parallel.cases import CASES, Case
from tests.parallel.collect import largest_gap, whole_tensors

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
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(world),
            "--master-addr",
            "127.0.0.1",
        ]
        command = [sys.executable, *launcher, "--master-port", str(free_port()), "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout)


@pytest.fixture(scope="module")
def run_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")

    @cache
    def run(world: int) -> Path:
        if world > 1:
            run(1)
        result = spawn(world, "tests.parallel.worker", str(world), str(folder))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        return folder

    return run


@cache
def reference(folder: Path, model: str, kind: str):
    return whole_tensors(folder / model, kind)


def cases() -> list:
    marks = {8: [pytest.mark.slow]}
    return [
        pytest.param(case, id=f"world{case.world}-{case.name}", marks=marks.get(case.world, []))
        for case in CASES
    ]


@pytest.mark.parametrize("case", cases())
def test_layout_computes_what_one_process_computes(case: Case, run_world):
    folder = run_world(case.world)
    own = json.loads((folder / case.name / "summary.json").read_text())
    ref = json.loads((folder / case.model / "summary.json").read_text())
    assert own["losses"][0] == pytest.approx(ref["losses"][0], rel=1e-5)
    assert own["norms"][0] == pytest.approx(ref["norms"][0], rel=1e-5)
    for name in ("balance", "z", "violation"):
        assert own[name] == pytest.approx(ref[name], rel=1e-5, abs=1e-9), name
    if case.has_whole_gradients:
        gap, key = largest_gap(
            whole_tensors(folder / case.name, "grads"), reference(folder, case.model, "grads")
        )
        assert gap < 1e-5, f"gradient of {key} differs by {gap:.1e}"
    gap, key = largest_gap(
        whole_tensors(folder / case.name, "weights"), reference(folder, case.model, "weights")
    )
    assert gap < 1e-4, f"{key} differs by {gap:.1e} after three steps"
    assert own["evaluation"] == pytest.approx(ref["evaluation"], rel=1e-4)
