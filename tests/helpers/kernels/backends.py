"""Run a kernel test on every backend, each where it can run.

A test that takes the fixture ``backend`` runs on plain torch and on the C++ extension in the ordinary
process, and on Triton in a process of its own under the interpreter, which reads TRITON_INTERPRET at import.
There outputs start as NaN between margins (tools/gpu/guard.py), because the interpreter checks no bounds.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ring.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("RING_TEST_DEVICE", "cpu")
"""``cuda``: the tests that take a ``backend`` run on Triton on a GPU, and no others (tools/gpu_check.sh)."""
ROOT = Path(__file__).resolve().parents[3]


def backends() -> list[str]:
    if INTERPRETED or DEVICE == "cuda":
        return ["triton"]
    return ["torch", "native"] if dispatch.native_is_available() else ["torch"]


def why_not_interpreted() -> str | None:
    """Why Triton's interpreter cannot run here; None where it can."""
    import triton

    versions = triton.__version__, np.__version__
    old, new = (tuple(map(int, version.split(".")[:2])) for version in versions)
    if old < (3, 7) and new >= (2, 4):
        return f"the interpreter of Triton {versions[0]} needs numpy below 2.4, and this is {versions[1]}"
    return None


def run_in_the_interpreter(file: str, *selection: str) -> None:
    """Run the file's ``backend`` tests on Triton in their own process; fail with its output."""
    if reason := why_not_interpreted():
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *selection]
    # shorter than this test's own time: the one inside names itself first
    command += ["--timeout", "300"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN anywhere is infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs()
    scale = expected.detach().abs().max().double().clamp(min=1e-30)
    return float((difference.nan_to_num(torch.inf).max() / scale).item())
