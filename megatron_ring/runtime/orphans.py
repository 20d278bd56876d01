"""Processes end with the one that started them, whatever ended it: a rank with torchrun, a rank's own ones with it.

What a rank has started says nothing once nobody is there to hear it.
"""

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
"""Exit code of the ranks that end because another process did: no mistake of the user's, and worth another try."""
_LOOK_EVERY = 0.5
"""Seconds."""
_LAUNCHER = "MEGATRON_RING_LAUNCHER"
_launcher: int | None = None
_parent: int | None = None


def end_with_parent() -> None:
    """End this process of multiprocessing's within a second of its parent's end."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    # multiprocessing's own sentinel is a pipe, which processes that were forked later hold open
    _when(lambda: os.getppid() != parent.pid, lambda: os._exit(1), "end-with-parent")


def end_with_launcher() -> None:
    """End this rank, in one line per node, within a second of the end of the torchrun that started it.

    A torchrun that is killed tells its ranks nothing: they would go on, or wait at the start for the store that was
    in it, and hold the run's folder.
    """
    global _launcher, _parent
    if "TORCHELASTIC_RUN_ID" not in os.environ or _launcher is not None:
        return
    _launcher = os.getppid()
    named, _, namespace = os.environ.get(_LAUNCHER, "").partition("/")
    _parent = _launcher
    if named and namespace == _pid_namespace():
        # a shell or numactl may stand between both, and outlive the launcher
        _launcher = int(named)
    if launcher_is_gone():
        # it ended while this process was starting
        _leave_without_launcher()
    _when(launcher_is_gone, _leave_without_launcher, "end-with-launcher")


def name_launcher() -> None:
    """Tell the ranks that this process will start who it is."""
    os.environ[_LAUNCHER] = f"{os.getpid()}/{_pid_namespace()}"


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return False
    # one that is dead and not yet buried is there, too
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


def _when(is_so: Callable[[], bool], then: Callable[[], object], name: str) -> None:
    """Call ``then`` in a thread once ``is_so``."""

    def wait() -> None:
        while not is_so():
            time.sleep(_LOOK_EVERY)
        then()

    threading.Thread(target=wait, name=name, daemon=True).start()


def forked_writer(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write`` for a process of its own, whose results go to a queue that its parent keeps in another process."""

    @functools.wraps(write)
    def call(*args: Any, **options: Any) -> Any:
        end_with_parent()
        try:
            return write(*args, **options)
        except (ConnectionError, EOFError, FileNotFoundError):
            # the queue is gone: the rank is leaving, and has said why
            os._exit(1)

    return call
