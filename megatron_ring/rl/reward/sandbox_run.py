"""One run in the sandbox, watched from outside: wall clock, memory of all processes, output, and its end.

Killing the sandbox's first process ends every process inside, daemonised ones too, because they share its
process namespace; a run returns only when that process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox_command import (
    SETUP,
    Limits,
    Program,
    command,
    identity,
    open_data,
    seccomp_program,
)

RunStatus = Literal["ok", "crashed", "timeout", "memory", "output_limit"]

_LOOK_EVERY = 0.02
"""Seconds between two looks at the memory."""
_START_SECONDS = 5.0
"""Longest wait for bwrap's next word when a run is cut before its first process is known."""
_STDERR_KEPT = 4096
_PAGE = os.sysconf("SC_PAGE_SIZE")
_OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"java.lang.OutOfMemoryError")
_SIGNALLED = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended. ``stderr`` is the end of it; ``exit_code`` is 128 + n after signal n, None if killed by us.

    Example: ``RunResult(status="ok", stdout=b"16\\n", stderr=b"", exit_code=0, seconds=0.016)``.
    """

    status: RunStatus
    stdout: bytes
    stderr: bytes
    exit_code: int | None
    seconds: float


@dataclass(kw_only=True, slots=True)
class _Watched:
    process: subprocess.Popen
    limits: Limits
    status_fd: int
    started: float
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status_text: bytearray = field(default_factory=bytearray)
    stderr_total: int = 0
    first_pid: int | None = None
    first_pidfd: int | None = None
    cut: RunStatus | None = None


def run(program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
    """Run ``program`` in a sandbox of its own. Raises RewardError if the sandbox itself cannot start."""
    with contextlib.ExitStack() as stack:
        watched = _start(program, limits, stdin, stack)
        try:
            _watch(watched)
        finally:
            _end(watched)
        return _result(watched)


def _start(program: Program, limits: Limits, stdin: bytes, stack: contextlib.ExitStack) -> _Watched:
    def held(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    data_fds = {path: held(open_data(content)) for path, content in program.files.items()}
    stdin_fd, seccomp_fd = held(open_data(stdin)), held(open_data(seccomp_program()))
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    held(status_read)
    argv = command(program, limits, data_fds, seccomp_fd, status_write)
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            argv,
            stdin=stdin_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            # --clearenv does not reach /proc/1/environ, which is what bwrap itself was started with
            env={"PATH": "/usr/bin:/bin"},
            pass_fds=(*data_fds.values(), seccomp_fd, status_write),
            **identity(),
        )
    finally:
        os.close(status_write)
    stack.enter_context(process)
    return _Watched(process=process, limits=limits, status_fd=status_read, started=started)


def _watch(watched: _Watched) -> None:
    """Read what the run writes until it ends or breaks a limit."""
    deadline = watched.started + watched.limits.seconds
    pidfd = os.pidfd_open(watched.process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in (watched.process.stdout.fileno(), watched.process.stderr.fileno(), watched.status_fd):
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            selector.register(pidfd, selectors.EVENT_READ)
            next_look = watched.started + _LOOK_EVERY
            ended = False
            while watched.cut is None and not ended:
                for key, _ in selector.select(max(0.0, min(deadline, next_look) - time.monotonic())):
                    if key.fd == pidfd:
                        ended = True
                    elif not _read(watched, key.fd):
                        selector.unregister(key.fd)
                now = time.monotonic()
                if not ended and watched.cut is None and now >= next_look:
                    next_look = now + _LOOK_EVERY
                    if _resident_bytes(watched.first_pid) > watched.limits.memory_mb << 20:
                        watched.cut = "memory"
                if not ended and watched.cut is None and now >= deadline:
                    watched.cut = "timeout"
    finally:
        os.close(pidfd)


def _end(watched: _Watched) -> None:
    """Kill what is left, wait until the first process is gone, and take the last output."""
    if watched.process.poll() is None:
        # killed before it has said whom it started, bwrap would leave that process waiting for it for ever
        while watched.first_pid is None and _read(watched, watched.status_fd, wait=_START_SECONDS):
            pass
        if watched.first_pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched.first_pidfd, signal.SIGKILL)
        try:
            watched.process.wait(1.0 if watched.first_pidfd is not None else 0.0)
        except subprocess.TimeoutExpired:
            watched.process.kill()
            watched.process.wait()
    for fd in (watched.status_fd, watched.process.stdout.fileno(), watched.process.stderr.fileno()):
        while _read(watched, fd, wait=1.0) and watched.cut is None:
            pass
    if watched.first_pidfd is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(watched.first_pidfd, selectors.EVENT_READ)
            selector.select(5.0)
        os.close(watched.first_pidfd)


def _read(watched: _Watched, fd: int, wait: float | None = None) -> bool:
    """Take what ``fd`` has; False at its end, or if nothing comes within ``wait`` seconds."""
    if wait is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            if not selector.select(wait):
                return False
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return wait is None
    if fd == watched.status_fd:
        watched.status_text += data
        _learn_first_process(watched)
    elif fd == watched.process.stdout.fileno():
        watched.stdout += data
    else:
        watched.stderr_total += len(data)
        watched.stderr = (watched.stderr + data)[-_STDERR_KEPT:]
    if max(len(watched.stdout), watched.stderr_total) > watched.limits.output_bytes:
        watched.cut = watched.cut or "output_limit"
    return bool(data)


def _learn_first_process(watched: _Watched) -> None:
    if watched.first_pid is None:
        for report in _reports(watched):
            if "child-pid" in report:
                watched.first_pid = report["child-pid"]
                with contextlib.suppress(ProcessLookupError):
                    watched.first_pidfd = os.pidfd_open(watched.first_pid)


def _reports(watched: _Watched) -> Iterator[dict]:
    """What bwrap wrote so far: complete lines of JSON."""
    for line in bytes(watched.status_text).split(b"\n")[:-1]:
        if line.strip():
            yield json.loads(line)


def _result(watched: _Watched) -> RunResult:
    seconds = time.monotonic() - watched.started
    exit_code = next((r["exit-code"] for r in _reports(watched) if "exit-code" in r), None)
    stderr = bytes(watched.stderr)
    status: RunStatus
    if watched.cut is not None:
        status, exit_code = watched.cut, None
    elif exit_code is None:
        why = stderr.decode(errors="replace").strip().replace("\n", "; ")[-300:] or "it said nothing"
        raise RewardError(f"bwrap did not start the sandbox: {why}; {SETUP}, or allow user namespaces here")
    elif exit_code == _SIGNALLED + signal.SIGXCPU:
        status = "timeout"
    elif exit_code == _SIGNALLED + signal.SIGXFSZ:
        status = "output_limit"
    elif exit_code != 0:
        status = "memory" if any(word in stderr for word in _OUT_OF_MEMORY) else "crashed"
    else:
        status = "ok"
    return RunResult(
        status=status,
        stdout=bytes(watched.stdout[: watched.limits.output_bytes]),
        stderr=stderr,
        exit_code=exit_code,
        seconds=seconds,
    )


def _resident_bytes(first_pid: int | None) -> int:
    """Resident memory of a process and all below it; a process that has just ended counts nothing."""
    total = 0
    waiting = [] if first_pid is None else [first_pid]
    while waiting:
        pid = waiting.pop()
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                total += int(file.read().split()[1]) * _PAGE
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    waiting += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total
