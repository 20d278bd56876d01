"""What the benchmarks do on a machine with a GPU, which is not here: torch says that there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import python_path
from tools.benchmark import machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_RING_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_default_is_bf16_and_a_forced_cpu_is_believed(monkeypatch: pytest.MonkeyPatch):
    assert machine.wants_bf16(None) and not machine.wants_bf16(False)
    assert machine.described(True) == "NVIDIA H100 80GB HBM3, bf16"
    monkeypatch.setenv("MEGATRON_RING_DEVICE", "cpu")
    assert not machine.wants_bf16(None) and machine.wants_bf16(True)
    assert machine.described(False) == "cpu, fp32"


@pytest.mark.usefixtures("gpu")
def test_what_measures_a_cpu_is_refused_on_a_gpu_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        machine.require_cpu("extension.py", "the C++ kernels")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert (
        said.startswith("error: extension.py measures the C++ kernels") and "MEGATRON_RING_DEVICE=cpu" in said
    )


def test_sides_on_different_devices_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    machine.require_same_device({"ours": "cpu", "TRL": "cpu"})
    with pytest.raises(SystemExit):
        machine.require_same_device({"ours": "NVIDIA H100", "TRL": "cpu"})
    assert "error: ours on NVIDIA H100, TRL on cpu: nothing to compare" in capsys.readouterr().err


def test_tensors_that_differ_are_not_timed():
    ones = torch.ones(4)
    machine.agree("y", ones, ones * (1 + 1e-6), 1e-5)
    with pytest.raises(SystemExit, match="y differs by"):
        machine.agree("y", ones, ones * 1.1, 1e-5)
    with pytest.raises(SystemExit, match="y differs by nan"):
        machine.agree("y", ones * float("nan"), ones, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["moe_layer.py --tokens 96", "step.py --tokens 96 --sequences 2"])
def test_a_layer_and_a_step_agree_with_stock_in_bf16(words: str):
    environment = {**os.environ, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}
    script, *more = words.split()
    done = subprocess.run(
        [sys.executable, f"tools/benchmark/{script}", *more, "--bf16", "--rounds", "1", "--threads", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert " on cpu, bf16" in done.stdout
