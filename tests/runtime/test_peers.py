"""A rank that is gone ends the others, with one line that says which, and with no traceback but a bug's own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from megatron_ring.runtime.peers import PEER_IS_GONE, follows_from_another
from tests.helpers.parallel.preloaded import free_port
from tests.helpers.paths import python_path

ROOT = Path(__file__).resolve().parents[2]
# far below the 30 minutes of a collective, and room for a busy machine
PATIENCE = 90


class Rank(NamedTuple):
    code: int
    out: str
    err: str


def world(size: int, how: str, who: int) -> list[Rank]:
    """How each rank ended, none of which may outlive the others by long."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    common = {
        **os.environ,
        **address,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.runtime.peers_worker", how, str(who)]
    with contextlib.ExitStack() as stack:
        # files: what a killed process leaves behind would hold a pipe open
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * size)]
        outs, errs = files[:size], files[size:]
        codes = _ended(command, common, outs, errs)
        for file in files:
            file.seek(0)
        ended = [(code, out.read(), err.read()) for code, out, err in zip(codes, outs, errs, strict=True)]
    assert None not in codes, ended
    return [Rank(code or 0, out, err) for code, out, err in ended]


def _ended(command: list[str], common: dict[str, str], outs: list[Any], errs: list[Any]) -> list[int | None]:
    """The exit codes, None of a rank that had to be killed."""
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**common, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        for n, (out, err) in enumerate(zip(outs, errs, strict=True))
    ]
    seen: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + PATIENCE
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if rank.poll() is None:
                    seen.update(psutil.Process(rank.pid).children(recursive=True))
            time.sleep(0.2)
        codes = [rank.poll() for rank in ranks]
    finally:
        for process in [*ranks, *seen]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
    return codes


def said(ranks: list[Rank]) -> list[str]:
    return [line for rank in ranks for line in rank.err.splitlines()]


@pytest.mark.parametrize(
    ("size", "how", "who"),
    [
        (4, "dies", 3),
        (2, "dies", 0),
        (2, "dies-in-set-up", 1),
        (3, "dies-while-others-sleep", 1),
        (2, "forks", 1),
    ],
)
def test_a_killed_rank_ends_the_others_in_one_line(size: int, how: str, who: int):
    ranks = world(size, how, who)
    assert [rank.code for n, rank in enumerate(ranks) if n != who] == [PEER_IS_GONE] * (size - 1)
    assert ranks[who].code == -9
    (line,) = said(ranks)
    assert line.startswith(f"error: rank {who} of {size} (process ") and "is gone: its process ended" in line


def test_one_ranks_mistake_is_said_once_and_the_others_end_with_its_code():
    ranks = world(2, "user", 1)
    assert [rank.code for rank in ranks] == [2, 2]
    assert said(ranks) == ["error: the corpus of this rank is empty; fill it"]


def test_a_mistake_of_all_ranks_is_said_once():
    ranks = world(2, "all-users", 0)
    assert [rank.code for rank in ranks] == [2, 2]
    assert said(ranks) == ["error: the corpus is empty; fill it"]


def test_ctrl_c_is_one_line_whether_one_rank_gets_it_or_all():
    for how in ("interrupted", "all-interrupted"):
        ranks = world(2, how, 1)
        assert [rank.code for rank in ranks] == [130, 130]
        (line,) = said(ranks)
        assert line.startswith("error: interrupted (SIGINT, Ctrl-C)")


def test_a_bug_keeps_its_traceback_and_the_others_add_one_line():
    ranks = world(2, "bug", 1)
    assert [rank.code for rank in ranks] == [PEER_IS_GONE, 1]
    assert "KeyError: 'step'" in ranks[1].err and "Traceback" in ranks[1].err
    (line,) = ranks[0].err.splitlines()
    assert line.startswith("error: rank 1 of 2 (process ") and "has failed, for the reason it prints" in line


def test_a_rank_that_ends_well_before_the_others_is_not_missed():
    for who in (0, 1):
        ranks = world(2, "ends-early", who)
        assert [(rank.code, rank.err) for rank in ranks] == [(0, ""), (0, "")]
        assert all(rank.out == "together\nended\n" for rank in ranks)


def test_only_a_broken_connection_follows_from_another_rank():
    assert follows_from_another(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] x"))
    assert follows_from_another(ConnectionResetError())
    assert not follows_from_another(RuntimeError("size mismatch"))
    assert not follows_from_another(NotImplementedError("gloo has none"))
    assert not follows_from_another(KeyError("step"))
