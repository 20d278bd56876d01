"""The launcher of several ranks: torchrun's, with the rank's own words last and its exit code."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.parallel.preloaded import free_port
from tests.helpers.parallel.watching import run_to_the_end
from tests.helpers.paths import python_path

ROOT = Path(__file__).parents[2]


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo"}


def command(*words: str) -> list[str]:
    python = [sys.executable, "-W", "ignore", "-m"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = [*python, "megatron_ring.launch.ranks", "--nproc-per-node", "2", *address]
    return [*launcher, "-m", "tests.helpers.runtime.peers_worker", *words]


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    return run_to_the_end(command(*words), cwd=ROOT, env=ENV, timeout=120)


@pytest.mark.parametrize(
    ("words", "code", "lines"),
    [
        (("ends-early", "1"), 0, []),
        (("user", "1"), 2, ["error: the corpus of this rank is empty; fill it"]),
        (("interrupted", "1"), 130, ["error: interrupted (SIGINT, Ctrl-C)"]),
        (("dies", "1"), 137, ["error: rank 1 of 2 (process ", "error: rank 1 (process "]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_run_ends_as_its_rank_did_and_says_no_more(words: tuple[str, ...], code: int, lines: list[str]):
    done = launched(*words)
    assert done.returncode == code, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(lines) and all(a.startswith(b) for a, b in zip(said, lines, strict=True)), said


@pytest.mark.parametrize("moment", ["while the ranks start", "while they run"])
def test_ranks_end_with_a_killed_launcher_in_one_line(moment: str):
    """They would train on, or wait ten minutes for a store that is gone, and hold the run's folder."""
    words = command("dies-while-others-sleep", "-1")
    with subprocess.Popen(
        words, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        ranks: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(ranks) < 2 and time.monotonic() < deadline:
            ranks = psutil.Process(launcher.pid).children()
            time.sleep(0.02)
        if moment == "while they run":
            assert launcher.stdout is not None
            assert [launcher.stdout.readline() for _ in range(2)] == ["together\n"] * 2
        launcher.kill()
        try:
            # until both have closed it
            _, said = launcher.communicate(timeout=30)
        finally:
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
    (line,) = said.splitlines()
    assert line.startswith(
        f"error: the launcher of this run (process {launcher.pid}) is gone; its ranks stop"
    )


def test_ctrl_c_before_there_are_ranks_is_one_line():
    script = (
        "import signal, sys; from megatron_ring.launch import ranks\n"
        "class Pressed:\n"
        "    def find_spec(self, *_): signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Pressed()); ranks.main(['x.py'])"
    )
    done = run_to_the_end([sys.executable, "-c", script], cwd=ROOT, env=ENV, timeout=60)
    assert done.returncode == 130
    assert [line[:38] for line in done.stderr.splitlines()] == ["error: interrupted (SIGINT, Ctrl-C); w"]
