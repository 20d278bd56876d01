"""The owner's side of the process that stands ready inside the walls: start it, ask it for runs, end it.

One zygote serves one run at a time. Its first process is the first of a process namespace, and the owner holds that
process before it asks for any run: whatever happens, killing it ends everything that was ever started below it.
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
"""Longest wait for a zygote's first word, and for its word that a run has begun: a busy machine takes its time."""
END_SECONDS = 20.0
"""Longest wait for the word that a killed run is gone."""
_MAX_MESSAGE = 1 << 16


class GoneError(Exception):
    """A zygote that was killed, or that does not answer, before it began the run it was asked for."""


@dataclass(kw_only=True, slots=True)
class Zygote:
    """A process inside the walls that starts runs; see ``zygote.py``.

    Example: ``zygote = Zygote.start("/usr/bin/python3")``.
    """

    process: subprocess.Popen
    control: socket.socket
    mark: str
    """A word that only its processes have."""
    pidfd: int | None = None
    """Its first process; None as long as it has not said who it is."""
    walls: Mapping[str, str] = field(default_factory=dict)
    """Its own namespaces, which none of its runs may share."""
    owner_pid: int = field(default_factory=os.getpid)
    group: Group | None = None
    """What bounds its memory and that of its run together."""

    @classmethod
    @above_streams()
    def start(cls, python: str, memory: MemoryCgroup | None = None) -> Zygote:
        """A zygote that is ready, in a group of its own. Raises RewardError where it cannot be had."""
        fds: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            fds.append(os.pidfd_open(os.getpid()))
            fds += [open_data(seccomp_program()), open_data(_text()), open_data(b"")]
            owner, rules, text, stdin = fds
            words, mark = (theirs.fileno(), owner, rules), secrets.token_hex(8)
            process = subprocess.Popen(
                command(python, text, [*map(str, words), mark]),
                # kinds of descriptors as runs have them: the interpreter looks at them once, at its start
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
            zygote._get_to_know()
            if memory is not None:
                zygote._enter(memory)
        except BaseException:
            zygote.close()
            raise
        return zygote

    def bound(self, limit: int) -> None:
        """Let it and its next run hold ``limit`` bytes, where it has a group. Raises GoneError if that cannot be."""
        if self.group is not None:
            try:
                self.group.begin(limit)
            except OSError as error:
                raise GoneError(f"its memory cgroup cannot be limited to {limit} bytes: {error}") from error

    def struck(self) -> bool:
        """Whether the kernel has killed something of it or of its run because they reached that limit."""
        return self.group is not None and self.group.struck()

    def ask(self, request: Mapping[str, object], fds: Sequence[int]) -> None:
        """Hand a run over. Raises GoneError if nobody takes it."""
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], list(fds))
        except (BrokenPipeError, ConnectionError) as error:
            raise GoneError(str(error)) from error

    def hear(self, seconds: float) -> tuple[dict, int | None] | None:
        """Its next words and the descriptor beside them; None if none come in time. Raises GoneError at its end."""
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

    def idle(self) -> bool:
        """Whether it lives and has nothing to say."""
        if self.control.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """End it and everything below it. In another process than its owner's, nothing."""
        if self.control.fileno() < 0 or os.getpid() != self.owner_pid:
            return
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            _readable(self.pidfd, END_SECONDS)
            os.close(self.pidfd)
        self.control.close()
        # bwrap's outer process has nothing left to wait for; stopped by somebody, it would be waited for for ever
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
        """The end of what bwrap or the zygote has written, in one line."""
        assert self.process.stdout is not None
        said = b""
        while _readable(self.process.stdout.fileno(), 0.1):
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                break
            said = (said + data)[-4096:]
        return "; ".join(said.decode(errors="replace").split("\n"))[-300:].strip("; ") or "it said nothing"

    def _get_to_know(self) -> None:
        heard, deadline = None, time.monotonic() + START_SECONDS
        with contextlib.suppress(GoneError):
            # bwrap killed before it let its child go on leaves a socket that nobody will ever write to
            while heard is None and self.process.poll() is None and time.monotonic() < deadline:
                heard = self.hear(min(0.1, START_SECONDS))
        if heard is None or heard[1] is None:
            remedy = f"{SETUP}, or allow user namespaces here"
            raise RewardError(f"bwrap did not start the sandbox: {self.last_words()}; {remedy}")
        self.walls, self.pidfd = heard[0]["ready"], heard[1]

    def _enter(self, memory: MemoryCgroup) -> None:
        assert self.pidfd is not None
        try:
            self.group = memory.make()
            self.group.take(process_of(self.pidfd))
        except OSError as error:
            raise RewardError(
                f"the memory cgroup in {memory.parent} that was tried at the start works no longer: {error}; "
                "leave it as it was, or start again"
            ) from error


@functools.cache
def _text() -> bytes:
    return Path(__file__).with_name("zygote.py").read_bytes()


def process_of(pidfd: int) -> int:
    """The process's id as it is here, which is not what it is inside."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1e3 * seconds))


def _kill_named(mark: str) -> None:
    """End every process that has ``mark`` among its words: a start that failed, whoever of it is left.

    bwrap's child waits for ever for a parent that was killed before it let the child go on.
    """
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            pidfd = os.pidfd_open(int(entry))
            try:
                # looked at while it is held, so that the number cannot have passed to another
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                if mark.encode() in words:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _readable(pidfd, END_SECONDS)
            finally:
                os.close(pidfd)
