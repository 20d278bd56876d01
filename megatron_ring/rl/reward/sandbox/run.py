"""One run in the sandbox, watched from outside: CPU seconds, wall clock, memory of all processes, output, its end.

Killing the run's first process ends every process of the run, daemonised ones too, because they share its process
namespace; the kernel lets it go only after all of them. A run returns when that has happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.cgroup import bytes_for
from megatron_ring.rl.reward.sandbox.command import CODE, Limits, Program, open_data
from megatron_ring.rl.reward.sandbox.process import END_SECONDS, START_SECONDS, GoneError, Zygote, process_of

RunStatus = Literal["ok", "crashed", "timeout", "memory", "output_limit"]

_FIRST_LOOK, _LAST_LOOK, _CROWD_LOOK = 0.01, 0.1, 0.02
"""Seconds between two looks: they grow from the first to the last; no further than the third while no limit of a
process bounds the run's memory: it has several, or more address space."""
_SOCKET_BUFFERS = Path("/proc/sys/net/core/wmem_default")
_FD_BYTES = 2 * (int(_SOCKET_BUFFERS.read_text()) if _SOCKET_BUFFERS.exists() else 213 << 10)
"""What a descriptor can hold of the kernel's memory: a socket's buffer, and the datagram that passes its end."""
_MEMORY_LINES = (b"RssAnon:", b"RssShmem:", b"VmSwap:", b"VmPTE:", b"HugetlbPages:")
_STDERR_KEPT = 4096
_STDERR_TIMES = 16
_TICKS = os.sysconf("SC_CLK_TCK")
_OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"java.lang.OutOfMemoryError")
_SIGNALLED = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended. ``stderr`` is the end of it; ``exit_code`` is 128 + n after signal n, None if killed by us.

    Example: ``RunResult(status="ok", stdout=b"16\\n", stderr=b"", exit_code=0, seconds=0.006, cpu_seconds=0.005)``.
    """

    status: RunStatus
    stdout: bytes
    stderr: bytes
    exit_code: int | None
    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Of all processes of the run together, its start included. Of children whose end their parent ignores only what
    was seen of them in time."""


@dataclass(kw_only=True, slots=True)
class _Watched:
    zygote: Zygote
    limits: Limits
    stdout_fd: int
    stderr_fd: int
    asked: float
    started: float
    """When it had begun: no limit counts before."""
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stderr_total: int = 0
    first_pidfd: int | None = None
    first_pid: int = 0
    error: str | None = None
    ended: dict | None = None
    cpu_seconds: float = 0.0
    lost_seconds: float = 0.0
    ticks: dict[int, tuple[int, int]] = field(default_factory=dict)
    cut: RunStatus | None = None


def run(zygote: Zygote, program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
    """Run ``program``. Raises GoneError if the zygote does not begin it, RewardError if it cannot or dies meanwhile."""
    with contextlib.ExitStack() as stack:
        watched = _start(zygote, program, limits, stdin, stack)
        _watch(watched)
        _end(watched)
        return _result(watched)


def _start(
    zygote: Zygote, program: Program, limits: Limits, stdin: bytes, stack: contextlib.ExitStack
) -> _Watched:
    """Ask for the run and wait until it has begun: its first process is known before any limit counts."""
    theirs: list[int] = []
    zygote.bound(bytes_for(program, limits))
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
        zygote.ask(request, theirs)
    finally:
        for fd in theirs:
            os.close(fd)
    watched = _Watched(
        zygote=zygote, limits=limits, stdout_fd=ours[0], stderr_fd=ours[1], asked=asked, started=asked
    )
    deadline = asked + START_SECONDS
    while watched.first_pidfd is None:
        if not _hear(watched, deadline - time.monotonic()):
            raise GoneError(f"no word of the run for {START_SECONDS:g} s")
    stack.callback(os.close, watched.first_pidfd)
    watched.first_pid = process_of(watched.first_pidfd)
    if not os.path.exists(f"/proc/{watched.first_pid}/stat") and not _over(watched.first_pidfd):
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
    step = _FIRST_LOOK
    next_look = watched.started + min(step, limits.seconds)
    while watched.cut is None and watched.ended is None:
        for fd, _ in poll.poll(max(0.0, 1e3 * (min(deadline, next_look) - time.monotonic()))):
            if fd == control:
                _hear_or_fail(watched)
            elif not _read(watched, fd):
                poll.unregister(fd)
        now = time.monotonic()
        if watched.cut is not None or watched.ended is not None:
            return
        if now >= deadline:
            watched.cut = "timeout"
        elif now >= next_look:
            processes = _look(watched)
            alone = processes <= 2 and limits.address_space
            step = min(1.5 * step, _LAST_LOOK if alone else _CROWD_LOOK)
            next_look = now + min(step, max(0.002, limits.seconds - watched.cpu_seconds))


def _end(watched: _Watched) -> None:
    """Kill what is left, wait until the first process is gone, and take the last output."""
    if watched.ended is None:
        assert watched.first_pidfd is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(watched.first_pidfd, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(GoneError):
            while watched.ended is None and _hear(watched, deadline - time.monotonic()):
                pass
        if watched.ended is None:
            # with it goes all that it has started
            watched.zygote.close()
    for fd in (watched.stdout_fd, watched.stderr_fd):
        while watched.cut is None and _read(watched, fd):
            pass


def _hear_or_fail(watched: _Watched) -> None:
    try:
        _hear(watched, 0.0)
    except GoneError as error:
        if watched.zygote.struck():
            # of all that shares the limit the kernel may choose the process that stands ready
            watched.cut = "memory"
            return
        said = watched.zygote.last_words()
        raise RewardError(
            f"the sandbox was killed during a run ({said}); free memory, or see who did"
        ) from error


def _hear(watched: _Watched, seconds: float) -> bool:
    heard = watched.zygote.hear(seconds)
    if heard is None:
        return False
    words, fd = heard
    if fd is not None:
        watched.first_pidfd = fd
    if "error" in words:
        watched.error = words["error"]
    if "exit_code" in words:
        watched.ended = words
        watched.cpu_seconds = max(watched.cpu_seconds, words["cpu_seconds"] + watched.lost_seconds)
    return True


def _read(watched: _Watched, fd: int) -> bool:
    """Take what ``fd`` has; False at its end, or if it has nothing."""
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
            # the first process itself was killed, and not by us
            exit_code = _SIGNALLED - exit_code
        if watched.zygote.struck():
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


def _look(watched: _Watched) -> int:
    """Cut a run that uses too much memory or CPU time; how many processes it has."""
    memory = 0
    # of each process: the ticks it has used, and those of its children that it has waited for
    ticks: dict[int, tuple[int, int]] = {}
    waiting = [watched.first_pid]
    while waiting:
        pid = waiting.pop()
        # one that has just ended counts nothing
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
    # nobody waits for the children of a process that ignores their end, and the kernel forgets what they used
    watched.lost_seconds += max(0, gone - waited_for) / _TICKS
    used = sum(map(sum, ticks.values())) / _TICKS + watched.lost_seconds
    watched.cpu_seconds = max(watched.cpu_seconds, used)
    if memory > watched.limits.memory_mb << 20 or watched.zygote.struck():
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
    """Memory of one process: resident, swapped out, page tables, and what its descriptors may hold.

    Pages of the system's files are not the run's; those of /tmp, once mapped, are shared memory and count.
    """
    kilobytes = 0
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(_MEMORY_LINES):
                kilobytes += int(line.split()[1])
    # the size of this folder is the number of its entries, from Linux 6.2 on; 0 before
    return (kilobytes << 10) + _FD_BYTES * os.stat(f"/proc/{pid}/fd").st_size
