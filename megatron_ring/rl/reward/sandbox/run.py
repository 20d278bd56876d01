"""One run in the sandbox, watched from outside: CPU seconds, wall clock, memory of all processes, output, exit.

Killing the run's init process ends every process of the run, also daemons, because they share its process namespace; the
kernel reports its exit after that of all others. :func:`run` returns when that has happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.cgroup import bytes_for
from megatron_ring.rl.reward.sandbox.command import CODE, Limits, Program, open_data
from megatron_ring.rl.reward.sandbox.zygote_handle import (
    END_SECONDS,
    START_SECONDS,
    GoneError,
    ZygoteHandle,
    process_of,
)

RunStatus = Literal["ok", "crashed", "timeout", "memory", "output_limit"]

_FIRST_POLL, _LAST_POLL, _CROWD_POLL = 0.01, 0.1, 0.02
"""Seconds between two polls of memory and CPU time: they grow from the first to the last value; only up to the third
while rlimits alone do not bound the run's memory (several processes, or a larger address space)."""
_SOCKET_BUFFERS = Path("/proc/sys/net/core/wmem_default")
_FD_BYTES = 2 * (int(_SOCKET_BUFFERS.read_text()) if _SOCKET_BUFFERS.exists() else 213 << 10)
"""Kernel memory that a descriptor can hold: a socket's buffer, and one datagram beyond it."""
_MEMORY_LINES = (b"RssAnon:", b"RssShmem:", b"VmSwap:", b"VmPTE:", b"HugetlbPages:")
_STDERR_KEPT = 4096
_STDERR_TIMES = 16
_TICKS = os.sysconf("SC_CLK_TCK")
_OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"java.lang.OutOfMemoryError")
_SIGNALLED = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended. ``stderr`` is its last part; ``exit_code`` is 128 + n after signal n, None if we killed the run.

    Example: ``RunResult(status="ok", stdout=b"16\\n", stderr=b"", exit_code=0, seconds=0.006, cpu_seconds=0.005)``.
    """

    status: RunStatus
    stdout: bytes
    stderr: bytes
    exit_code: int | None
    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Of all processes of the run together, with its start. Of children that no parent waits for only the time at the last
    poll before they ended."""


@dataclass(kw_only=True, slots=True)
class _Watched:
    zygote: ZygoteHandle
    limits: Limits
    stdout_fd: int
    stderr_fd: int
    asked: float
    started: float
    """When it had begun: limits count from here."""
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stderr_total: int = 0
    init_pidfd: int | None = None
    init_pid: int = 0
    error: str | None = None
    ended: dict[str, Any] | None = None
    cpu_seconds: float = 0.0
    lost_seconds: float = 0.0
    ticks: dict[int, tuple[int, int]] = field(default_factory=dict)
    cut: RunStatus | None = None


def run(zygote: ZygoteHandle, program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
    """Run ``program`` to its end.

    Raises:
        GoneError: the zygote ended, or did not answer, before the run began.
        RewardError: the run cannot be started or watched, or the zygote was killed during it.
    """
    with contextlib.ExitStack() as stack:
        watched = _start(zygote, program, limits, stdin, stack)
        _watch(watched)
        _end(watched)
        return _result(watched)


def _start(
    zygote: ZygoteHandle, program: Program, limits: Limits, stdin: bytes, stack: contextlib.ExitStack
) -> _Watched:
    """Send the run and wait until it has begun, so that its init process is known before limits count."""
    theirs: list[int] = []
    zygote.set_memory_limit(bytes_for(program, limits))
    try:
        theirs.append(open_data(stdin))
        ours = []
        for _ in range(2):
            read, write = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, read)
            os.set_blocking(read, False)
            ours.append(read)
            theirs.append(write)
        for path, content in program.files.items():
            if os.path.normpath(path) != path or not path.startswith(f"{CODE}/"):
                raise ValueError(f"file {path} of a program is not below {CODE}")
            theirs.append(open_data(content))
        request = {
            "argv": program.argv,
            "ready_python": program.ready_python,
            "paths": list(program.files),
            "tmp_bytes": limits.tmp_bytes,
            "tmp_inodes": limits.tmp_inodes,
            "rlimits": limits.rlimits(),
        }
        asked = time.monotonic()
        zygote.send(request, theirs)
    finally:
        for fd in theirs:
            os.close(fd)
    watched = _Watched(
        zygote=zygote, limits=limits, stdout_fd=ours[0], stderr_fd=ours[1], asked=asked, started=asked
    )
    deadline = asked + START_SECONDS
    while watched.init_pidfd is None:
        if not _receive(watched, deadline - time.monotonic()):
            raise GoneError(f"no message of the run for {START_SECONDS:g} s")
    stack.callback(os.close, watched.init_pidfd)
    watched.init_pid = process_of(watched.init_pidfd)
    if not os.path.exists(f"/proc/{watched.init_pid}/stat") and not _over(watched.init_pidfd):
        raise RewardError(
            "/proc hides the sandbox's processes, so they cannot be watched; mount it without hidepid"
        )
    watched.started = time.monotonic()
    return watched


def _watch(watched: _Watched) -> None:
    """Read what the run writes until it ends or breaks a limit."""
    limits, control = watched.limits, watched.zygote.control.fileno()
    deadline = watched.started + limits.wall
    poll = select.poll()
    for fd in (watched.stdout_fd, watched.stderr_fd, control):
        poll.register(fd, select.POLLIN)
    step = _FIRST_POLL
    next_poll = watched.started + min(step, limits.seconds)
    while watched.cut is None and watched.ended is None:
        for fd, _ in poll.poll(max(0.0, 1e3 * (min(deadline, next_poll) - time.monotonic()))):
            if fd == control:
                _receive_or_fail(watched)
            elif not _read(watched, fd):
                poll.unregister(fd)
        now = time.monotonic()
        if watched.cut is not None or watched.ended is not None:
            return
        if now >= deadline:
            watched.cut = "timeout"
        elif now >= next_poll:
            processes = _poll_usage(watched)
            alone = processes <= 2 and limits.address_space
            step = min(1.5 * step, _LAST_POLL if alone else _CROWD_POLL)
            next_poll = now + min(step, max(0.002, limits.seconds - watched.cpu_seconds))


def _end(watched: _Watched) -> None:
    """Kill what is left, wait until the init process has ended, and read the last output."""
    if watched.ended is None:
        assert watched.init_pidfd is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(watched.init_pidfd, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(GoneError):
            while watched.ended is None and _receive(watched, deadline - time.monotonic()):
                pass
        if watched.ended is None:
            # this ends everything that the zygote has started
            watched.zygote.close()
    for fd in (watched.stdout_fd, watched.stderr_fd):
        while watched.cut is None and _read(watched, fd):
            pass


def _receive_or_fail(watched: _Watched) -> None:
    try:
        _receive(watched, 0.0)
    except GoneError as error:
        if watched.zygote.oom_killed():
            # the zygote shares the run's memory limit, so the kernel may choose it
            watched.cut = "memory"
            return
        said = watched.zygote.last_words()
        raise RewardError(
            f"the sandbox was killed during a run ({said}); free memory, or find out who killed it"
        ) from error


def _receive(watched: _Watched, seconds: float) -> bool:
    """Take one message of the zygote; False if none comes within ``seconds``."""
    received = watched.zygote.receive(seconds)
    if received is None:
        return False
    message, fd = received
    if fd is not None:
        watched.init_pidfd = fd
    if "error" in message:
        watched.error = message["error"]
    if "exit_code" in message:
        watched.ended = message
        watched.cpu_seconds = max(watched.cpu_seconds, message["cpu_seconds"] + watched.lost_seconds)
    return True


def _read(watched: _Watched, fd: int) -> bool:
    """Read what ``fd`` has; False at its end, or if it has nothing now."""
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    if fd == watched.stdout_fd:
        watched.stdout += data
    else:
        watched.stderr_total += len(data)
        watched.stderr = (watched.stderr + data)[-_STDERR_KEPT:]
    if max(len(watched.stdout), watched.stderr_total // _STDERR_TIMES) > watched.limits.output_bytes:
        watched.cut = watched.cut or "output_limit"
    return bool(data)


def _result(watched: _Watched) -> RunResult:
    seconds = time.monotonic() - watched.asked
    stderr = bytes(watched.stderr)
    if watched.error is not None:
        raise RewardError(f"the sandbox did not start a run: {watched.error}; run tools/setup_sandbox.sh")
    exit_code = None if watched.ended is None else watched.ended["exit_code"]
    status: RunStatus
    if watched.cut is not None:
        status, exit_code = watched.cut, None
    else:
        assert exit_code is not None
        if exit_code < 0:
            # the init process itself was killed, and not by us
            exit_code = _SIGNALLED - exit_code
        if watched.zygote.oom_killed():
            status = "memory"
        elif exit_code == _SIGNALLED + signal.SIGXCPU or watched.cpu_seconds > watched.limits.seconds:
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
        cpu_seconds=watched.cpu_seconds,
    )


def _poll_usage(watched: _Watched) -> int:
    """Cut a run that uses too much memory or CPU time; returns how many processes it has."""
    memory = 0
    # per process: its own ticks, and those of children that it has waited for
    ticks: dict[int, tuple[int, int]] = {}
    waiting = [watched.init_pid]
    while waiting:
        pid = waiting.pop()
        # a process that has just ended is skipped
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            user, system, child_user, child_system = map(int, _stat(pid)[11:15])
            memory += _held_bytes(pid)
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    waiting += map(int, file.read().split())
            ticks[pid] = user + system, child_user + child_system
    before, watched.ticks = watched.ticks, ticks
    gone = sum(sum(each) for pid, each in before.items() if pid not in ticks)
    waited_for = sum(children - before.get(pid, (0, 0))[1] for pid, (_, children) in ticks.items())
    # if a process ignores the end of its children, nobody waits for them, and the kernel drops their CPU time
    watched.lost_seconds += max(0, gone - waited_for) / _TICKS
    used = sum(map(sum, ticks.values())) / _TICKS + watched.lost_seconds
    watched.cpu_seconds = max(watched.cpu_seconds, used)
    if memory > watched.limits.memory_mb << 20 or watched.zygote.oom_killed():
        watched.cut = "memory"
    elif watched.cpu_seconds > watched.limits.seconds:
        watched.cut = "timeout"
    return len(ticks)


def _over(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _stat(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _held_bytes(pid: int) -> int:
    """Memory of one process in bytes: resident, swapped out, page tables, and what its descriptors may hold.

    Mapped pages of system files do not count; mapped pages of /tmp are shared memory and count.
    """
    kilobytes = 0
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(_MEMORY_LINES):
                kilobytes += int(line.split()[1])
    # the size of this folder is the number of its entries since Linux 6.2, and 0 before
    return (kilobytes << 10) + _FD_BYTES * os.stat(f"/proc/{pid}/fd").st_size
