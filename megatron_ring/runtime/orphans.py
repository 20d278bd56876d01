"""No orphans: a rank ends with its torchrun, and a rank's child processes end with the rank, however that ends."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEER_IS_GONE = 75
"""Exit code of ranks that end because another process did: not a user's mistake, so a restart may help."""
_POLL_SECONDS = 0.5
_LAUNCHER = "MEGATRON_RING_LAUNCHER"
_launcher: int | None = None
_parent: int | None = None


def end_with_parent() -> None:
    """In a process of multiprocessing: end within a second of the parent's end."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    # multiprocessing's own sentinel is a pipe, which children forked later keep open
    _when(lambda: os.getppid() != parent.pid, lambda: os._exit(1), "end-with-parent")


def end_with_launcher() -> None:
    """End this rank, in one line per node, within a second of the end of the torchrun that started it.

    The ranks of a killed torchrun would continue, or wait for its store at the start, and hold the run's
    folder.
    """
    global _launcher, _parent
    if "TORCHELASTIC_RUN_ID" not in os.environ or _launcher is not None:
        return
    _launcher = os.getppid()
    named, _, namespace = os.environ.get(_LAUNCHER, "").partition("/")
    _parent = _launcher
    if named and namespace == _pid_namespace():
        # this rank's parent may be a shell or numactl, which outlives the launcher
        _launcher = int(named)
    if launcher_is_gone():
        # it ended while this process was starting
        _leave_without_launcher()
    _when(launcher_is_gone, _leave_without_launcher, "end-with-launcher")


def name_launcher() -> None:
    """Put this process's id into the environment of the ranks that it will start."""
    os.environ[_LAUNCHER] = f"{os.getpid()}/{_pid_namespace()}"


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return False
    # a zombie still has an entry
    return state.split()[0] not in "ZX"


def _pid_namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "unknown"


def launcher_is_gone() -> bool:
    """Has the torchrun that started this rank ended before it?"""
    return _launcher is not None and (
        os.getppid() != _parent or (_launcher != _parent and not _runs(str(_launcher)))
    )


def _leave_without_launcher() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"error: the launcher of this run (process {_launcher}) is gone; its ranks stop, what has been saved stays"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(PEER_IS_GONE)


def _when(condition: Callable[[], bool], then: Callable[[], object], name: str) -> None:
    """Poll ``condition`` in a thread; call ``then`` once it is true."""

    def wait() -> None:
        while not condition():
            time.sleep(_POLL_SECONDS)
        then()

    threading.Thread(target=wait, name=name, daemon=True).start()


def forked_writer(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write`` for a forked process, which sends its results to a queue in a third process."""

    @functools.wraps(write)
    def call(*args: Any, **options: Any) -> Any:
        end_with_parent()
        try:
            return write(*args, **options)
        except (ConnectionError, EOFError, FileNotFoundError):
            # the queue is gone: the rank is ending, and has printed why
            os._exit(1)

    return call
