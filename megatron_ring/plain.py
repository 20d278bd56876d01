"""Opening files that a user or a stranger names: never waits, as a named pipe would make ``open`` wait for ever."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """``path`` for reading; never waits, as opening a named pipe or a terminal would.

    Raises:
        OSError: it is not there, or it is no plain file; ``strerror`` says which.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "is no plain file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(handle)
        raise


def read_plain(path: Path, max_bytes: int = 1 << 40) -> bytes:
    """All of a plain file of at most ``max_bytes``.

    Raises:
        OSError: see :func:`open_plain`; or it is longer.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {max_bytes:,}", str(path))
        return file.read(size)
