"""Wait for processes that may hang, and say where each of them is if they do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from tests.helpers.parallel.preloaded import Preloaded

PATIENCE = 900
"""Seconds that one run may take on a busy machine; one that hangs is ended long before, by what follows."""
STANDSTILL = 120
"""Seconds without work after which a run hangs: ranks that wait for one another use no CPU time, those that a busy
machine keeps waiting use some.
"""
_NO_WORK = 0.25
"""CPU seconds of the main threads. Threads that watch peers and launcher go on for ever: a hundredth of a core each."""
HUNG = 124


def run_to_the_end(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str],
    timeout: int = PATIENCE,
    standstill: int = STANDSTILL,
) -> subprocess.CompletedProcess[str]:
    """``command``'s output once it has ended; nothing that it started is left, whatever happens.

    If it stands still or is not done after ``timeout`` seconds, its return code is HUNG and stderr ends with the
    stacks of every process.
    """

    def start(stdout: IO[str], stderr: IO[str]) -> subprocess.Popen:
        own = {**env, "PYTHONFAULTHANDLER": "1"}
        return subprocess.Popen(
            command, cwd=cwd, env=own, stdout=stdout, stderr=stderr, start_new_session=True
        )

    has_launcher = "torch.distributed.run" in command
    return _to_the_end(start, command, has_launcher=has_launcher, timeout=timeout, standstill=standstill)


def run_preloaded(
    words: Sequence[str],
    world: int,
    *,
    cwd: Path,
    env: Mapping[str, str],
    timeout: int = PATIENCE,
    standstill: int = STANDSTILL,
) -> subprocess.CompletedProcess[str]:
    """``python WORDS`` on ``world`` processes that have imported what they need (``preloaded.py``), watched alike."""

    def start(stdout: IO[str], stderr: IO[str]) -> Preloaded:
        return Preloaded(words, world, env, cwd, stdout.name, stderr.name)

    return _to_the_end(start, words, has_launcher=True, timeout=timeout, standstill=standstill)


def _to_the_end(
    start: Callable[[IO[str], IO[str]], subprocess.Popen | Preloaded],
    command: Sequence[str],
    *,
    has_launcher: bool,
    timeout: int,
    standstill: int,
) -> subprocess.CompletedProcess[str]:
    # files: what a killed process leaves behind would hold a pipe open; to append: each of us writes at the end
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder, "stdout"), "a+") as stdout,
        open(Path(folder, "stderr"), "a+") as stderr,
    ):
        process = start(stdout, stderr)
        seen: set[psutil.Process] = set()
        try:
            code = _wait(process, has_launcher, seen, timeout, standstill)
            if code is None:
                write_stacks(process, stderr.fileno())
        finally:
            kill_all(process, seen)
        stdout.seek(0)
        stderr.seek(0)
        code = HUNG if code is None else code
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


def assert_ended_well(result: subprocess.CompletedProcess[str]) -> None:
    """Fails with its last words; a run that hung gives the stacks of all its processes."""
    kept = len(result.stderr) if result.returncode == HUNG else 6000
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-kept:]


def _wait(
    process: subprocess.Popen | Preloaded,
    has_launcher: bool,
    seen: set[psutil.Process],
    timeout: int,
    standstill: int,
) -> int | None:
    """The exit code, or None if it hangs; ``seen`` collects what it starts."""
    mark, still = 0.0, 0
    for _ in range(timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)
        tree = _tree(process)
        seen.update(tree)
        # a launcher looks after its processes for ever
        used = _cpu_seconds(tree[1:] if has_launcher and len(tree) > 1 else tree)
        # less of it: a process has ended
        mark, still = (mark, still + 1) if abs(used - mark) < _NO_WORK else (used, 0)
        if still >= standstill:
            return None
    return None


def _tree(process: subprocess.Popen | Preloaded) -> list[psutil.Process]:
    """The process and all below it."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Of their main threads."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(t.user_time + t.system_time for t in process.threads() if t.id == process.pid)
    return total


def write_stacks(process: subprocess.Popen | Preloaded, fd: int) -> None:
    """Have every process below, then ``process``, write its stacks to its stderr, ``fd``, and end.

    They have to be started with PYTHONFAULTHANDLER=1.
    """
    root, *others = _tree(process) or [None]
    if root is None:
        return
    if others:
        # it would end the others when the first of them ends
        root.suspend()
    for one in [*others, root]:
        with contextlib.suppress(psutil.Error):
            # one that was forked has its rank for a name, and its parent's environment
            rank = (
                one.name() if one.name().startswith("rank ") else f"rank {one.environ().get('RANK', 'none')}"
            )
            words = " ".join(one.cmdline())
            os.write(fd, f"\n{rank}, process {one.pid} was here: {words[:300]}\n".encode())
            one.rlimit(psutil.RLIMIT_CORE, (0, 0))
            one.send_signal(signal.SIGABRT)
            one.resume()
            _wait_for_end(one)


def _wait_for_end(process: psutil.Process, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)


def kill_all(process: subprocess.Popen | Preloaded, seen: set[psutil.Process]) -> None:
    """End the process, its group, and whatever else was seen below it."""
    for one in {*_tree(process), *seen}:
        with contextlib.suppress(psutil.Error):
            one.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
