"""Processes that find torch, Megatron and this package imported: forked from one server, which imports them once.

An import takes 5 seconds of CPU time, and the tests start hundreds of processes. Of a run by torchrun they differ in
that alone, and in the launcher: the first rank that fails gives the others time for their last words.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.helpers.paths import python_path

PRELOAD = [
    "megatron_ring.stages.pretrain",
    "megatron_ring.stages.rl",
    "megatron_ring.stages.sft",
    "tests.helpers.parallel.running",
]
LAST_WORDS = 30.0
"""Seconds that the others have once a rank has failed; torchrun's."""
_PR_SET_NAME = 15


@cache
def _context() -> ForkServerContext:
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # what a library reads as it is loaded, it reads in the server
    early = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}
    before = dict(os.environ)
    os.environ |= early
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Preloaded:
    """``python WORDS`` on ``world`` processes below one that looks after them; used like a ``subprocess.Popen``."""

    def __init__(
        self, words: Sequence[str], world: int, env: Mapping[str, str], cwd: Path, stdout: str, stderr: str
    ) -> None:
        self._process = _context().Process(
            target=_look_after, args=(list(words), world, dict(env), str(cwd), stdout, stderr)
        )
        self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("preloaded", timeout or 0.0)
        return self._process.exitcode


def _look_after(
    words: list[str], world: int, env: dict[str, str], cwd: str, stdout: str, stderr: str
) -> None:
    os.setsid()
    for path, fd in ((stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    faulthandler.enable()
    port = free_port()
    ranks = {}
    for rank in range(world):
        if (pid := os.fork()) == 0:
            _be(words, rank, world, port)
        ranks[pid] = rank
    raise SystemExit(_wait_for(ranks))


def _wait_for(ranks: dict[int, int]) -> int:
    """The exit code of the first that failed; the others end soon after it, or are ended."""
    failed, left, deadline = 0, set(ranks), 0.0
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed, deadline = code, time.monotonic() + LAST_WORDS
                    if len(ranks) > 1:
                        print(
                            f"rank {ranks[pid]} of {len(ranks)} ended with {code}",
                            file=sys.stderr,
                            flush=True,
                        )
        if failed and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return failed if failed >= 0 else 128 - failed  # as a shell says which signal it was


def _be(words: list[str], rank: int, world: int, port: int) -> None:
    """Be one rank, to the end of the process."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank {rank}".encode())
        random.seed()
        if world > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        # as Python sets its path: the folder of a script, or the working directory
        is_module = words[0] == "-m"
        sys.path[0:0] = [os.getcwd() if is_module else str(Path(words[0]).parent)]
        sys.argv = words[1:] if is_module else words
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # what an interpreter does at its end
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
