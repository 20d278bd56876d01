"""End a process with its parent, and with everything that it has started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENDED_STATES = "ZX"
_POLL_SECONDS = 0.002
_LOG_TAIL_BYTES = 4096
MAX_MESSAGE_BYTES = 1 << 20
"""Longest message that is read from a process that has read a model's text."""


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process ``signal_number`` when its parent ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:  # the parent ended before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose own parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Processes below ``pid`` that have not ended."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            waiting.append(child)
            if _state(child) not in _ENDED_STATES:
                found.append(child)
    return found


def kill_below(pid: int) -> None:
    """Kill everything below ``pid``, which must start nothing meanwhile (it is stopped, or is this process).

    A process may start another one before it dies, so this repeats until none is left.
    """
    while alive := descendants(pid):
        for each in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def kill_tree(pid: int) -> None:
    """Kill ``pid``, a child of this process, and everything below it. The caller still has to wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        kill_below(pid)
        os.kill(pid, signal.SIGKILL)


def exit_words(code: int) -> str:
    """Example: ``exit_words(-9) == "signal SIGKILL"``."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def end_words(code: int, log_fd: int, start: int = 0) -> str:
    """How a process ended and the last line of its log from byte ``start`` on; only the log's tail is read."""
    start = max(start, os.fstat(log_fd).st_size - _LOG_TAIL_BYTES)
    lines = os.pread(log_fd, _LOG_TAIL_BYTES, start).decode(errors="replace").strip().splitlines()
    end = exit_words(code)
    return f"{end}: {lines[-1][:200]}" if lines else end


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children += _started_by(f"/proc/{pid}/task/{task}/children")
    return children


def _started_by(task: str) -> list[int]:
    try:
        with open(task, "rb") as file:
            return [int(word) for word in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _state(pid: int) -> str:
    """The state's letter, as in ps; X for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # after the name, which is in parentheses and may contain any character
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
