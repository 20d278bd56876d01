"""What the Triton kernels compile to: gates and golden for sm_90a; no spills for sm_80, sm_100."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "benchmark" / "static.py"
GOLDEN = json.loads((TOOL.parent / "static_golden.json").read_text())["kernels"]

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def static():
    """The tool as a module; it compiles nothing at import."""
    spec = importlib.util.spec_from_file_location("static_profile", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["static_profile"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_every_kernel_compiles_within_its_gates(arch):
    # in its own process: the interpreter of other tests replaces what is compiled here
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", "--arch", str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert set(found["profiles"]) == set(GOLDEN)
    assert found["problems"] == []
    assert done.returncode == bool(found["problems"])


WORSE = {
    "registers": 177,
    "spills": 2,
    "loop.legacy_products": 1,
    "loop.wgmma_n": 64,
    "loop.sync_loads": 1,
    "loop.cp_async_narrow": 1,
    "loop.tma_loads": 1,
    "loop.issue_ratio": 0.5,
}


@pytest.mark.parametrize("field", WORSE)
def test_a_worse_field_breaks_a_gate_and_the_golden(static, field):
    for name in static.ISSUE_GATES:
        found = copy.deepcopy(GOLDEN[name])
        assert not static.broken_gates(name, found, 90) and not static.worse_fields(name, found, GOLDEN[name])
        *group, key = field.split(".")
        (found[group[0]] if group else found)[key] = WORSE[field]
        assert len(static.broken_gates(name, found, 90)) == 1
        assert len(static.worse_fields(name, found, GOLDEN[name])) == 1


def test_a_lost_loop_breaks_both(static):
    found = {key: value for key, value in GOLDEN["up"].items() if key != "loop"}
    assert static.broken_gates("up", found, 90) and static.worse_fields("up", found, GOLDEN["up"])


def test_the_product_loop_is_the_innermost_with_most_products(static):
    code = [
        static.Instruction(op, "") for op in ("MOV", "HGMMA.64x256x16", "BRA", "IADD", "HGMMA.64x8x16", "BRA")
    ]
    assert static.product_loop(code, [(0, 5), (1, 2)]) == code[1:3]
    assert static.loop_profile(code[1:3], warps=8)["issue_ratio"] == round(2 * 8 / 4 / (128 * 2), 3)
