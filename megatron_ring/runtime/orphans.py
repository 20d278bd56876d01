"""Processes that a rank has started end with it, whatever ended it, and say nothing once nobody is there to hear it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

_LOOK_EVERY = 0.5
"""Seconds."""


def end_with_parent() -> None:
    """End this process of multiprocessing's within a second of its parent's end."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait(pid: int) -> None:
        # multiprocessing's own sentinel is a pipe, which processes that were forked later hold open
        while os.getppid() == pid:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=wait, args=(parent.pid,), name="end-with-parent", daemon=True).start()


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
