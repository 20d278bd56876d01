"""The comparisons of tools/gpu/right.py see what is wrong, name it and go on."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ring import kernels
from tests.helpers.paths import python_path
from tools.gpu import cases as all_cases
from tools.gpu.cases import Case, Maker
from tools.gpu.results import Results
from tools.gpu.right import check

_TURNS = itertools.cycle((0, 1, 0))
FAULTS = """
import sys

import torch

from tools.gpu import cases as of_cases
from tools.gpu import right
from tools.gpu.cases import Case
from tools.gpu.pretend import pretending


def lost(x):
    torch.cuda.synchronize = lambda: lost(x)
    raise RuntimeError("CUDA error: an illegal memory access")


def norm(x, w):
    return of_cases.rms_norm(x, w)


def cases(make, small):
    kind, x = str(make.dtype).removeprefix("torch."), [make.normal(2, 8), make.normal(8)]
    for name, op in (
        ("first", norm), ("lost", lambda x, w: lost(x)), ("none", lambda x, w: x * 1), ("last", norm)
    ):
        # once: each time takes a start of Python
        if name != "lost" or make.dtype == torch.bfloat16:
            yield Case(name=f"{name}, {kind}", op=op, leaves=x)


with pretending():
    right.cases = cases
    sys.exit(right.main())
"""
"""right.py on a pretended GPU with four comparisons of each dtype."""


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda x: x * (1.1 if x.dtype != torch.float64 else 1.0), "c: output 0: relative error 1.0"),
        (lambda x: x + next(_TURNS) * 1e-7, "c: output 0: two runs differ"),
        (lambda x: (x > (0 if x.dtype != torch.float64 else 0.5)).long(), "integers differ"),
        (lambda x: x.no_such(), "c: AttributeError"),
        (lambda x: x if x.dtype == torch.float64 else torch.empty_like(x), "c: output 0: relative error nan"),
        (lambda x: x if x.dtype == torch.float64 else _beside(x), "wrote outside its output"),
        (lambda x: x if x.dtype == torch.float64 else (x, x), "c: 2 outputs, and the reference has 1"),
        (
            lambda x: x if x.dtype == torch.float64 else x[None],
            "c: output 0: shape (1, 3), and the reference has (3,)",
        ),
    ],
    ids=[
        "wrong",
        "not repeatable",
        "other integers",
        "fails",
        "unwritten",
        "beside",
        "one more",
        "other shape",
    ],
)
def test_what_is_wrong_is_named(op, said: str, tmp_path: Path):
    results = Results(tmp_path, "right")
    check(Case(name="c", op=op, leaves=[torch.full((3,), 0.25)], tolerance=1e-6), results)
    assert len(results.bad) == 1 and said in results.bad[0]
    assert json.loads((tmp_path / "right.json").read_text())["bad"] == results.bad


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            SystemExit, match=r"error: OUT=.* cannot be written \(.*\); name a folder that can"
        ):
            Results(folder, "right")


def _beside(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x).copy_(x)
    y.as_strided((4,), (1,), y.storage_offset())[3] = 1.0
    return y


def test_an_op_without_a_kernel_and_a_lost_gpu_are_named_and_the_rest_is_compared(tmp_path: Path):
    """What a GPU could show only: a broken process is followed by another, which goes on behind the fault."""
    script = tmp_path / "right.py"
    script.write_text(FAULTS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "right.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        f"{name}, {kind}" for kind in ("bfloat16", "float32") for name in ("first", "none", "last")
    ]
    assert found["bad"] == [
        "lost, bfloat16: RuntimeError: CUDA error: an illegal memory access",
        "none, bfloat16: no Triton kernel ran",
        "none, float32: no Triton kernel ran",
    ]


@pytest.mark.parametrize(
    ("folder", "function", "of"),
    [
        ("expert_mlp", "_ExpertMlp", "expert_mlp"),
        ("grouped_gemm", "_GroupedGemm", "grouped_gemm"),
        ("permute", "_Combine", "combine"),
        ("permute", "_Permute", "permute"),
        ("qk_norm_rope", "_QkNormRope", "qk_norm_rope"),
        ("rms_norm", "_RmsNorm", "rms_norm"),
        ("routing", "_Route", "route "),
        ("token_logprob", "_TokenLogprob", "token_logprob"),
    ],
)
def test_a_fault_of_an_autograd_function_is_named(
    folder: str, function: str, of: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """All backends share these functions: only a reference without them sees what is wrong in them."""
    kind = getattr(importlib.import_module(f"megatron_ring.kernels.{folder}.op"), function)
    backward = kind.backward

    def halved(ctx, *given):
        found = backward(ctx, *given)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(None if each is None else each / 2 for each in found)

    monkeypatch.setattr(kind, "backward", staticmethod(halved))
    results, asked = Results(tmp_path, "right"), set()
    for case in all_cases.cases(Maker("cpu", torch.float32), small=True):
        # 300 rows have nothing that 133 have not
        if case.name.startswith(of) and " 300x" not in case.name:
            check(case, results)
            asked.add(case.name)
    assert asked and {line.split(":")[0] for line in results.bad} == asked


def test_a_reference_that_calls_an_op_is_no_reference(tmp_path: Path):
    results = Results(tmp_path, "right")
    check(Case(name="c", op=kernels.rms_norm, leaves=[torch.ones(2, 8), torch.ones(8)]), results)
    assert results.bad == [
        "c: AssertionError: the reference is no reference: it calls an op of megatron_ring"
    ]


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
