"""The kernel tests can fail: a fault planted in a Triton kernel (mutations.toml) fails at least two of them.

    python -m tests.kernels.test_mutations [kernel]      plant all, or one kernel's; say what catches them

One process imports torch and Triton's interpreter once and forks a child per fault; the child imports the
kernel with the fault in it and runs the kernel's tests until two have failed.
"""

import importlib.abc
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS: list[dict[str, str]] = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())["fault"]
CAUGHT_BY = 2


def kernel_file(fault: dict[str, str]) -> Path:
    return ROOT / "megatron_ring" / "kernels" / fault["kernel"] / "kernel.py"


class _Planted(importlib.abc.MetaPathFinder):
    """Imports one module from another file."""

    def __init__(self, module: str, file: Path):
        self.module, self.file = module, file

    def find_spec(self, fullname, path, target=None):
        return (
            importlib.util.spec_from_file_location(fullname, self.file) if fullname == self.module else None
        )


class _Failures:
    """A pytest plugin that keeps the names of failed tests and stops at the second."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        # a test whose canaries are hurt too fails a second time, at teardown
        if report.failed and name not in self.names:
            self.names.append(name)
        if len(self.names) == CAUGHT_BY:
            self.session.shouldstop = "caught"


def failed_tests(fault: dict[str, str], folder: Path) -> list[str]:
    """In this process: plant the fault, run the kernel's Triton tests; the first two that fail."""
    original = kernel_file(fault).read_text()
    planted = folder / "kernel.py"
    planted.write_text(original.replace(fault["find"], fault["put"]))
    module = f"megatron_ring.kernels.{fault['kernel']}.kernel"
    sys.meta_path.insert(0, _Planted(module, planted))
    failures = _Failures()
    file = f"tests/kernels/test_{fault['kernel']}.py"
    options = ["-q", "-p", "no:cacheprovider", "-k", "triton and not interpreter"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = pytest.main([file, *options], plugins=[failures])
    if code not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {code} before it could run {file}")
    return failures.names


def plant_all(faults: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each fault and the tests that it fails, in a forked child per fault."""
    import numpy  # noqa: F401
    import torch
    import triton
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "failed.json")
            child = os.fork()
            if not child:
                try:
                    answer.write_text(json.dumps(failed_tests(fault, Path(folder))))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            if not answer.exists():
                raise RuntimeError(f"the tests did not run with this fault: {fault['why']}")
            yield fault, json.loads(answer.read_text())


def main(kernels: list[str]) -> int:
    missed = 0
    for fault, failed in plant_all([f for f in FAULTS if not kernels or f["kernel"] in kernels]):
        caught = len(failed) >= CAUGHT_BY
        missed += not caught
        verdict = "caught" if caught else "MISSED"
        print(f"{verdict} {fault['kernel']}: {fault['why']}: {', '.join(failed)}", flush=True)
    return bool(missed)


def test_there_are_enough_faults_for_every_kernel():
    folders = {file.parent.name for file in (ROOT / "megatron_ring" / "kernels").glob("*/kernel.py")}
    assert {fault["kernel"] for fault in FAULTS} == folders
    assert len(FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["why"])
def test_a_fault_is_planted_in_one_place(fault):
    assert kernel_file(fault).read_text().count(fault["find"]) >= 1, "the kernel changed: renew the fault"
    assert fault["find"] != fault["put"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_fault_fails_two_tests():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_mutations"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    missed = re.findall(r"^MISSED .*", done.stdout, re.MULTILINE)
    assert done.returncode == 0, "\n".join(missed) or done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
