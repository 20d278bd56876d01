"""The parts of the check on a GPU, rehearsed at small sizes on what is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import python_path
from tools.gpu.results import Results
from tools.gpu.right import Case, check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("part", "words", "least"),
    [("right-small", ["right.py", "--small"], 70), ("fast", ["fast.py", "--tiny"], 40)],
)
def test_a_part_finds_nothing_wrong_and_leaves_its_rows(
    part: str, words: list[str], least: int, tmp_path: Path
):
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    script, *more = words
    done = subprocess.run(
        [sys.executable, f"tools/gpu/{script}", str(tmp_path), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["bad"] == [] and len(found["rows"]) >= least
    assert found["where"]["torch"] == torch.__version__
    assert not [row for row in found["rows"] if "error" in row and "who" in row]


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda x: x * (1.1 if x.dtype != torch.float64 else 1.0), "c: output 0: relative error 1.0"),
        (lambda x: x + torch.rand(x.shape) * 1e-7, "c: output 0: two runs differ"),
        (lambda x: (x > (0 if x.dtype != torch.float64 else 0.5)).long(), "integers differ"),
        (lambda x: x.no_such(), "c: AttributeError"),
    ],
    ids=["wrong", "not repeatable", "other integers", "fails"],
)
def test_what_is_wrong_is_named(op, said: str, tmp_path: Path):
    results = Results(tmp_path, "right")
    check(Case(name="c", op=op, leaves=[torch.full((3,), 0.25)], tolerance=1e-6), results)
    assert len(results.bad) == 1 and said in results.bad[0]
    assert json.loads((tmp_path / "right.json").read_text())["bad"] == results.bad
