"""Run a kernel test on every backend, each where it can run.

A test that takes the fixture ``backend`` runs on plain torch and on the C++ extension in the ordinary
process, and on Triton in a process of its own under the interpreter, which reads TRITON_INTERPRET at import.
There outputs start as NaN between margins (tools/gpu/guard.py), because the interpreter checks no bounds.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ring.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("RING_TEST_DEVICE", "cpu")
"""``cuda``: the tests that take a ``backend`` run on Triton on a GPU, and no others (tools/gpu_check.sh)."""
INTERPRETER_SECONDS = 1500
"""For all files, on a busy machine; two minutes on a quiet one."""
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


interpreted_files: set[str] = set()
"""The files of this session that ask for the interpreter; conftest.py says which."""


@cache
def _interpreted(files: tuple[str, ...], selection: tuple[str, ...]) -> tuple[dict[str, list[str]], str]:
    """(what each file's tests said, empty for one that passed; all the output): one process for all files."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *selection]
        # shorter than this test's own time: the one inside names itself first
        command += ["--timeout", "300", "--junitxml", str(report)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS
        )
        output = done.stdout[-8000:] + done.stderr[-4000:]
        said: dict[str, list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            wrong = [one for kind in ("failure", "error") for one in case.iter(kind)]
            words = [f"{case.get('name')}: {one.text}" for one in wrong]
            said.setdefault(case.get("classname", "").split(".")[-1], []).append("\n".join(words))
        return said, output


def run_in_the_interpreter(file: str, *selection: str) -> None:
    """Run the file's ``backend`` tests on Triton in a process of their own; fail with what they said.

    The first that asks has the tests of all files of its session run: Triton is imported once.
    """
    if reason := why_not_interpreted():
        pytest.skip(reason)
    said, output = _interpreted(tuple(sorted(interpreted_files | {file})), selection)
    own = said.get(Path(file).stem)
    assert own, f"nothing was run: {output}"
    assert not any(own), "\n".join(filter(None, own))[-4000:]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN anywhere is infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs()
    scale = expected.detach().abs().max().double().clamp(min=1e-30)
    return float((difference.nan_to_num(torch.inf).max() / scale).item())
