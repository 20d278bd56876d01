"""The parts of the check on a GPU, rehearsed at small sizes on what is here."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ring import kernels
from tests.paths import python_path
from tools.gpu import cases as all_cases
from tools.gpu.cases import Case, Maker
from tools.gpu.results import Results
from tools.gpu.right import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("part", "words", "least"),
    [("right-small", ["right.py", "--small"], 100), ("fast", ["fast.py", "--tiny"], 75)],
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
    assert not [row for row in found["rows"] if "failed" in row]


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


def test_every_op_that_is_exported_has_a_case_and_its_gradient_one(monkeypatch: pytest.MonkeyPatch):
    ops = {name for name in kernels.__all__ if not inspect.isclass(getattr(kernels, name))}
    called: dict[str, bool] = {}

    def watched(name: str):
        def op(*args, **kwargs):
            made = getattr(kernels, name)(*args, **kwargs)
            tensors = made if isinstance(made, tuple) else (made,)
            called[name] = any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors)
            return made

        return op

    for name in ops:
        monkeypatch.setattr(all_cases, name, watched(name), raising=False)
    seen, differentiable, differentiated = set(), set(), set()
    for case in all_cases.cases(Maker("cpu", torch.float32), small=True):
        called.clear()
        case.op(*(leaf.clone().requires_grad_(leaf.is_floating_point()) for leaf in case.leaves), *case.fixed)
        seen |= called.keys()
        differentiable |= {name for name, does in called.items() if does}
        differentiated |= called.keys() if case.differentiated else set()
    assert seen == ops and differentiable <= differentiated


@pytest.mark.slow
def test_the_whole_check_runs_at_tiny_sizes_and_writes_its_page(tmp_path: Path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "RING_GPU_CHECK": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for part in ("same", "right-small", "pretrain", "fast", "rl"):
        found = json.loads((out / f"{part}.json").read_text())
        assert found["bad"] == [] and found["rows"], part
    table = (out / "table.md").read_text()
    assert "| grouped GEMM forward" in table and "| a C3PO step |" in table
    assert "What is wrong" not in (out / "page.html").read_text()


def test_the_page_names_what_is_wrong_and_escapes_it(tmp_path: Path):
    results = Results(tmp_path, "right")
    results.wrong("<op>: relative error 1")
    done = subprocess.run(
        [sys.executable, "tools/gpu/page.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert done.returncode == 1
    assert "&lt;op&gt;: relative error 1" in (tmp_path / "page.html").read_text()
    assert "| right | 0 rows, 1 wrong, 0 s | wrong |" in (tmp_path / "table.md").read_text()


def test_without_a_gpu_one_line_says_how_to_rehearse(tmp_path: Path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "RING_GPU_CHECK": ""}
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no GPU here; RING_GPU_CHECK=tiny")


@pytest.mark.parametrize(
    ("words", "tiny", "said"),
    [
        (["OUT", "rigth"], "tiny", "rigth is no part"),
        (["right", "fast"], "tiny", "OUT=right is the name of a part"),
        (["OUT"], "Tiny", "RING_GPU_CHECK=Tiny must be tiny"),
    ],
)
def test_a_check_that_would_check_nothing_is_refused(words: list[str], tiny: str, said: str, tmp_path: Path):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    done = _check(words, tiny, sys.executable)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_part_that_dies_early_shows_nothing_of_an_earlier_run(tmp_path: Path):
    (tmp_path / "fast.json").write_text('{"bad": [], "rows": [1]}')
    (tmp_path / "rl.json").write_text("kept: it was not asked for")
    (tmp_path / "parts.txt").write_text("fast 0 3\nrl 0 5\n")
    done = _check([str(tmp_path), "fast"], "tiny", "false")
    assert done.returncode == 1 and "failed: fast (exit code 1)" in done.stdout
    assert not (tmp_path / "fast.json").exists() and (tmp_path / "rl.json").exists()
    assert (tmp_path / "parts.txt").read_text().split()[:4] == ["rl", "0", "5", "fast"]
    assert (tmp_path / "parts.txt").read_text().split()[4] == "1"


def _check(words: list[str], tiny: str, python: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": python, "RING_GPU_CHECK": tiny}
    return subprocess.run(
        ["bash", "tools/gpu_check.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
