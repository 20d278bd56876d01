"""A test that hangs ends and says where; the tests after it run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANGS = """
import threading

def test_that_hangs():
    threading.Event().wait()

def test_after_it():
    pass
"""
DEAF = """
import ctypes

def test_that_hangs_outside_python():
    lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    take(lock)
    take(lock)
"""


def run(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on ``code`` with the project's settings, and shorter times."""
    (folder / "test_hanging.py").write_text(code)
    words = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *words, *options, str(folder / "test_hanging.py")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_test_that_hangs_fails_and_says_where(tmp_path: Path):
    done = run(tmp_path, HANGS, "-o", "timeout=3")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
    assert "test_hanging.py::test_that_hangs - Failed: Timeout (>3.0s)" in done.stdout
    assert ">       threading.Event().wait()" in done.stdout


def test_one_that_hangs_outside_python_ends_the_run_and_says_where(tmp_path: Path):
    done = run(tmp_path, DEAF, "-o", "timeout=1", "-o", "faulthandler_timeout=5")
    assert done.returncode == 1
    assert "Timeout (0:00:05)!" in done.stderr
    assert "in test_that_hangs_outside_python" in done.stderr
