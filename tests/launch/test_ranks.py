"""The launcher of several ranks: torchrun's, with the rank's own words last and its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.spawning import free_port
from tests.parallel.watching import run_to_the_end

ROOT = Path(__file__).parents[2]


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_ring.launch.ranks",
        "--nproc-per-node",
        "2",
        *address,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return run_to_the_end(
        [*launcher, "-m", "tests.runtime.peers_worker", *words], cwd=ROOT, env=env, timeout=120
    )


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
