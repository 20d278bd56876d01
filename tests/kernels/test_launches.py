"""The launchers' own launches, compiled up to the start for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers.paths import python_path
from tools.gpu import launches, no_device

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("sets", "arch"),
    [
        (["step"], 90),
        pytest.param(["step"], 100, marks=slow),
        pytest.param(["mini"], 90, marks=slow),
        pytest.param(["odd", "wide"], 90, marks=slow),
    ],
    ids=str,
)
def test_every_launch_is_one_that_a_driver_takes(sets: list[str], arch: int):
    """At the paper's sizes moreover without spills, and with few binaries whatever is decoded."""
    # in its own process: the interpreter of other tests replaces what is compiled here
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tools/gpu/launches.py", "--json", "--arch", str(arch), "--sets", *sets],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == [] and done.returncode == 0
    assert len(found["kernels"]) >= 19 and found["launches"] > 150


def launch(**words: object) -> no_device.Launch:
    values = {"kernel": "k", "binary": "a", "shared_bytes": 0, "grid": (1,), "cubin": b"", "problems": ()}
    return no_device.Launch(**{**values, **words})


def test_every_comparison_of_the_check_on_a_gpu_is_compiled_before():
    """What is missing there is compiled by one process within the seconds of tools/gpu/right.py."""
    names = [name for name, _ in launches.calls("right")]
    assert len(names) == len(set(names)) > 200
    for dtype in ("bfloat16", "float32"):
        assert f"expert_mlp 1536x2048x1408, 64 experts, skewed, {dtype}" in names
        assert f"token_logprob 2048x126464 at 1.0, {dtype}" in names


def test_a_kernel_with_a_binary_too_many_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launches, "disassemble", lambda _cubin: ([], [], 7))
    made = [launch(binary=str(n)) for n in range(launches.MAX_BINARIES)] * 2
    assert launches.report(made, [], judged=True)["problems"] == []
    made.append(launch(binary="more", problems=("k: grid (0,)",)))
    assert launches.report(made, ["x"], judged=True)["problems"] == [
        "k: grid (0,)",
        "x",
        f"k: {launches.MAX_BINARIES + 1} binaries, at most {launches.MAX_BINARIES}",
    ]


def test_a_spill_is_a_problem_where_launches_are_judged(monkeypatch: pytest.MonkeyPatch):
    code = [SimpleNamespace(name="FFMA"), SimpleNamespace(name="STL"), SimpleNamespace(name="LDL")]
    monkeypatch.setattr(launches, "disassemble", lambda _cubin: (code, [], 64))
    found = launches.report([launch()], [], judged=True)
    assert found["problems"] == ["k: 2 spills at these sizes, at most 0"]
    assert found["kernels"]["k"]["spills"] == 2 and found["kernels"]["k"]["registers"] == 64
    assert launches.report([launch()], [], judged=False)["problems"] == []


@pytest.mark.parametrize("grid", [(0,), (1, 65_536), (1, 1, 65_536), (2**31,)])
def test_a_grid_that_no_driver_takes_is_a_problem(grid: tuple[int, ...]):
    assert list(no_device._grid_problems(grid)) == [f"grid {grid}"]
    assert not list(no_device._grid_problems((2**31 - 1, 65_535, 65_535)))


@pytest.mark.parametrize(
    ("descriptor", "tensor_map", "problems"),
    [
        ({}, {}, []),
        ({"strides": [65, 1]}, {}, ["a descriptor's stride of 130 bytes is no multiple of 16 below 2^40"]),
        ({"shape": [0, 64]}, {}, ["a descriptor's shape [0, 64] with a box [16, 64]"]),
        ({}, {"block_size": [512, 64]}, ["a descriptor's box [512, 64], at most 256 each"]),
        ({}, {"swizzle": 2}, ["a descriptor's inner box of 128 bytes under a swizzle of 64"]),
        ({"offset": 1}, {}, ["a descriptor's base is not aligned to 16 bytes"]),
    ],
    ids=["right", "stride", "empty", "box", "swizzle", "base"],
)
def test_a_tensor_map_that_no_driver_takes_is_a_problem(
    descriptor: dict, tensor_map: dict, problems: list[str]
):
    given = {"shape": [64, 64], "strides": [64, 1], "block_shape": [16, 64], **descriptor}
    base = torch.empty(8192, dtype=torch.bfloat16)[given.pop("offset", 0) :]
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(base=base, **given)
    meta = {"block_size": [16, 64], "elem_size": 2, "swizzle": 3, **tensor_map}
    assert list(no_device._map_problems(made, meta)) == problems
