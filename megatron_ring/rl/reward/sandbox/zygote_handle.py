"""The owner's side of a zygote, the process in the sandbox that starts runs: start it, send it runs, end it.

A zygote serves one run at a time. It is the first process of its process namespace, and the owner has its pidfd before it
sends any run: killing it ends everything that was ever started below it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.cgroup import Group, MemoryCgroup
from megatron_ring.rl.reward.sandbox.command import (
    SETUP,
    above_streams,
    command,
    identity,
    open_data,
    seccomp_program,
)

START_SECONDS = 60.0
"""Time limit for a zygote's first message, and for the message that a run has begun; long, for busy machines."""
END_SECONDS = 20.0
"""Time limit for the message that a killed run has ended."""
_MAX_MESSAGE = 1 << 16


class GoneError(Exception):
    """A zygote was killed, or does not answer, before it began the run that was sent."""


@dataclass(kw_only=True, slots=True)
class ZygoteHandle:
    """A process in the sandbox that starts runs; see ``zygote.py``.

    Example: ``zygote = ZygoteHandle.start("/usr/bin/python3")``.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    mark: str
    """A random argument by which its processes can be found."""
    pidfd: int | None = None
    """Its pidfd; None until its first message."""
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """Its own namespaces, by kind; a run must not share them."""
    owner_pid: int = field(default_factory=os.getpid)
    group: Group | None = None
    """The cgroup that bounds its memory and that of its run together."""

    @classmethod
    @above_streams()
    def start(cls, python: str, memory: MemoryCgroup | None = None) -> ZygoteHandle:
        """Start a zygote, in its own cgroup, and wait until it is ready. Raises RewardError if it does not
        start."""
        fds: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            fds.append(os.pidfd_open(os.getpid()))
            fds += [open_data(seccomp_program()), open_data(_text()), open_data(b"")]
            owner, rules, text, stdin = fds
            words, mark = (theirs.fileno(), owner, rules), secrets.token_hex(8)
            process = subprocess.Popen(
                command(python, text, [*map(str, words), mark]),
                # the same kinds of descriptors as a run's: the interpreter looks at them only once, at its start
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
                pass_fds=(*words, text),
                **identity(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in fds:
                os.close(fd)
        zygote = cls(process=process, control=ours, mark=mark)
        try:
            zygote._wait_until_ready()
            if memory is not None:
                zygote._enter(memory)
        except BaseException:
            zygote.close()
            raise
        return zygote

    def set_memory_limit(self, limit: int) -> None:
        """Limit it and its next run to ``limit`` bytes, if it has a cgroup. Raises GoneError if that fails."""
        if self.group is not None:
            try:
                self.group.begin(limit)
            except OSError as error:
                raise GoneError(f"its memory cgroup cannot be limited to {limit} bytes: {error}") from error

    def oom_killed(self) -> bool:
        """Has the kernel killed a process of it or of its run because that limit was reached?"""
        return self.group is not None and self.group.oom_killed()

    def send(self, request: Mapping[str, object], fds: Sequence[int]) -> None:
        """Send a run. Raises GoneError if the zygote has ended."""
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], list(fds))
        except (BrokenPipeError, ConnectionError) as error:
            raise GoneError(str(error)) from error

    def receive(self, seconds: float) -> tuple[dict[str, Any], int | None] | None:
        """Its next message and the descriptor sent with it; None after ``seconds``. Raises GoneError if it has ended."""
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        if not poll.poll(max(0, 1e3 * seconds)):
            return None
        try:
            text, fds, _, _ = socket.recv_fds(self.control, _MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as error:
            raise GoneError(str(error)) from error
        if not text:
            raise GoneError("it has closed its socket")
        return json.loads(text), (fds[0] if fds else None)

    def is_idle(self) -> bool:
        """Is it alive, and has it sent nothing?"""
        if self.control.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """End it and everything below it. Does nothing in a process other than its owner."""
        if self.control.fileno() < 0 or os.getpid() != self.owner_pid:
            return
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            _readable(self.pidfd, END_SECONDS)
            os.close(self.pidfd)
        self.control.close()
        # bwrap's outer process ends by itself now, unless somebody has stopped it
        self.process.kill()
        self.process.wait()
        if self.pidfd is None:
            _kill_named(self.mark)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.group is not None:
            self.group.remove()
            self.group = None

    def last_words(self) -> str:
        """The end of what bwrap or the zygote has printed, in one line."""
        assert self.process.stdout is not None
        said = b""
        while _readable(self.process.stdout.fileno(), 0.1):
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                break
            said = (said + data)[-4096:]
        return "; ".join(said.decode(errors="replace").split("\n"))[-300:].strip("; ") or "it said nothing"

    def _wait_until_ready(self) -> None:
        received, deadline = None, time.monotonic() + START_SECONDS
        with contextlib.suppress(GoneError):
            # if bwrap is killed before its child runs, nobody will ever write to the socket: look at bwrap, too
            while received is None and self.process.poll() is None and time.monotonic() < deadline:
                received = self.receive(min(0.1, START_SECONDS))
        if received is None or received[1] is None:
            remedy = f"{SETUP}, or allow user namespaces here"
            raise RewardError(f"bwrap did not start the sandbox: {self.last_words()}; {remedy}")
        self.namespaces, self.pidfd = received[0]["ready"], received[1]

    def _enter(self, memory: MemoryCgroup) -> None:
        assert self.pidfd is not None
        try:
            self.group = memory.make()
            self.group.take(process_of(self.pidfd))
        except OSError as error:
            raise RewardError(
                f"the memory cgroup in {memory.parent} worked at the start and no longer does: {error}; leave it as it "
                "was, or start again"
            ) from error


@functools.cache
def _text() -> bytes:
    return Path(__file__).with_name("zygote.py").read_bytes()


def process_of(pidfd: int) -> int:
    """The process id outside of the sandbox's process namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1e3 * seconds))


def _kill_named(mark: str) -> None:
    """Kill every process that has ``mark`` among its arguments: what is left of a failed start.

    If bwrap is killed before its child runs, the child waits forever.
    """
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            pidfd = os.pidfd_open(int(entry))
            try:
                # read after the pidfd is open, so that the process id cannot have been reused
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                if mark.encode() in words:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _readable(pidfd, END_SECONDS)
            finally:
                os.close(pidfd)
