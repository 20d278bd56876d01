"""Ends of processes: with their parent, and with everything that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENDED = "ZX"
_BETWEEN_LOOKS = 0.002
_LAST_WORDS = 4096
MAX_WORD_BYTES = 1 << 20
"""Longest word of a process that has read a model's text."""


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process ``signal_number`` when the one that started it ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:  # it ended before the kernel was told
        os._exit(1)


def adopt_orphans() -> None:
    """Whatever is started below this process stays below it though its own parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Processes below ``pid`` that have not ended; what has just ended is left out."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            waiting.append(child)
            if _state(child) not in _ENDED:
                found.append(child)
    return found


def kill_below(pid: int) -> None:
    """Kill everything below ``pid``, which must start nothing meanwhile (it is stopped, or is this process).

    A process that is asked to die may start another before it does, so this looks until nothing is left.
    """
    while alive := descendants(pid):
        for each in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(_BETWEEN_LOOKS)


def kill_tree(pid: int) -> None:
    """Kill ``pid``, a child of this process, and everything below it. It stays to be waited for."""
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
    """How a process ended and the last line of its log from ``start`` on; the log may be of any size."""
    start = max(start, os.fstat(log_fd).st_size - _LAST_WORDS)
    lines = os.pread(log_fd, _LAST_WORDS, start).decode(errors="replace").strip().splitlines()
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
    """One letter, as in ps; X for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the name, in parentheses, may hold anything
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
