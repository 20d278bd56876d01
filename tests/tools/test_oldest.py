"""``tests/oldest.sh``: what it leaves alone, what it says where it cannot test, and that a failing test fails it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_TESTED = ": the oldest versions are NOT tested\n"

PYTHON_312 = """#!/usr/bin/env bash
# stands in for Python 3.12, pip and pytest; HEARD lists what was asked of it, FAILS is a pattern of what fails
printf '%s\\n' "$*" >>"$HEARD"
if [[ -n "${FAILS:-}" && "$*" =~ $FAILS ]]; then
    echo "${WORDS:-}" >&2
    exit 1
fi
case "$*" in
    --version) echo "Python 3.12.0" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *"import torch; assert"*) exit 1 ;;
    *" -e "*) echo ours >"${@: -1}/megatron_ring/_C.cpython-312.so" ;;
    "-m pytest "*) pwd >>"$HEARD" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder with stand-ins for everything else of the project, in a path with a space."""
    folder = tmp_path / "a checkout"
    for name in ("tools", "tests", "csrc", "examples", "megatron_ring", ".github"):
        (folder / name).mkdir(parents=True)
    for name in ("README.md", "LICENSE", "MANIFEST.in", "setup.py", "pyproject.toml", "csrc/a.cpp"):
        (folder / name).touch()
    (folder / "megatron_ring/__init__.py").touch()
    for path in (*ROOT.glob("constraints*.txt"), *ROOT.glob("requirements*.lock")):
        shutil.copy(path, folder)
    for name in ("tools/setup_env.sh", "tests/oldest.sh"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tools/gpu_check.sh").write_text("exit 0\n")
    # a user's own environment of Python 3.12 has built it for a newer torch
    (folder / "megatron_ring/_C.cpython-312.so").write_text("theirs\n")
    (folder / "python").write_text(PYTHON_312)
    (folder / "python").chmod(0o755)
    return folder


def words(checkout: Path, **more: str) -> dict[str, object]:
    env = {**os.environ, "RING_PYTHON312": str(checkout / "python"), "HEARD": str(checkout / "heard"), **more}
    return {"args": ["bash", str(checkout / "tests/oldest.sh")], "cwd": "/", "env": env, "text": True}


def oldest(checkout: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The script, called from another folder."""
    return subprocess.run(**words(checkout, **more), capture_output=True, timeout=60)


def test_tests_run_on_a_copy_with_kernels_of_its_own_and_are_installed_once(checkout: Path):
    done = oldest(checkout)
    assert (done.returncode, done.stderr) == (0, "")
    copy = checkout / ".venv-oldest/src"
    assert (copy / "megatron_ring/_C.cpython-312.so").read_text() == "ours\n"
    assert (checkout / "megatron_ring/_C.cpython-312.so").read_text() == "theirs\n"
    heard = (checkout / "heard").read_text().splitlines()
    assert heard.count(str(copy)) == 5 and str(checkout) not in heard
    (checkout / "tests/new.py").touch()
    assert oldest(checkout).returncode == 0 and (copy / "tests/new.py").exists()
    assert (copy / "megatron_ring/_C.cpython-312.so").read_text() == "ours\n"
    assert (checkout / "heard").read_text().count("-m venv") == 1


def test_an_environment_whose_python_is_gone_is_made_anew(checkout: Path):
    assert oldest(checkout).returncode == 0
    (checkout / ".venv-oldest/bin/python").unlink()
    assert oldest(checkout).returncode == 0
    assert (checkout / "heard").read_text().count("-m venv") == 2


@pytest.mark.parametrize(
    "fails", ["pytest.*tests/kernels$", "pytest.*tests/model", "pytest.*tests/data", "version-check check$"]
)
def test_what_fails_there_fails_the_script(fails: str, checkout: Path):
    done = oldest(checkout, FAILS=fails, WORDS="this one failed")
    assert done.returncode == 1 and "this one failed" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fails", "said", "reason"),
    [
        (
            "-m venv",
            "Error: ensurepip is not available\n\nFailing command: python",
            "(it has no ensurepip; Debian",
        ),
        ("-m venv", "[Errno 28] No space left on device", "([Errno 28] No space left on device)"),
        ("require-hashes", "warning\nERROR: no connection", "pip could not install"),
        (
            "install.*torch",
            "warning\nERROR: [Errno 28] No space left\n[notice] a new pip",
            "[Errno 28] No space left",
        ),
        (" -e ", "error: command c++ failed", "command c++ failed"),
    ],
    ids=[
        "no ensurepip",
        "disk full at once",
        "no network",
        "disk full in torch",
        "kernels that do not build",
    ],
)
def test_what_cannot_be_installed_is_one_line_and_leaves_nothing(fails, said, reason, checkout: Path):
    done = oldest(checkout, FAILS=fails, WORDS=said)
    note = done.stdout.splitlines(keepends=True)[-1]
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert note.startswith("note: ") and reason in note and note.endswith(NOT_TESTED)
    assert not (checkout / ".venv-oldest").exists()


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_a_python_that_was_named_is_taken_or_refused(python: str, checkout: Path):
    done = oldest(checkout, RING_PYTHON312=python)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: RING_PYTHON312={python} is no Python 3.12 that runs; name one, or unset it\n"
    )


def test_a_second_run_in_the_checkout_waits_for_the_first(checkout: Path):
    with (checkout / ".venv-oldest.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen(**words(checkout), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert "another run of tests/oldest.sh is under way" in process.stdout.readline()
            assert "-m venv" not in (checkout / "heard").read_text()
            fcntl.flock(held, fcntl.LOCK_UN)
            assert process.wait(timeout=60) == 0


def test_without_python_3_12_the_oldest_versions_are_skipped_aloud(tmp_path: Path):
    for name in ("bash", "dirname", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        ["bash", "tests/oldest.sh"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "note: no Python 3.12 here (name one with RING_PYTHON312): the oldest versions are NOT tested\n"
    )
