"""Files that a user or a stranger names, and JSON that they wrote.

Opening never waits, as a named pipe would make ``open`` wait for ever; what JSON is refused for is one line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 64
"""Lists and objects inside one another; beyond it Python's own recursion would end what reads the value."""


class TooDeepError(ValueError):
    """JSON of more than ``MAX_DEPTH`` lists and objects inside one another."""


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


def json_value(text: str | bytes, *, unique: bool = True) -> Any:
    """The value of JSON ``text``; with ``unique``, no object may have a key twice: readers differ in which they take.

    Raises:
        TooDeepError: it is nested too deeply.
        ValueError: it is no JSON; the message is one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
        deep = _openings(text) > MAX_DEPTH and _is_deep(value)
    except RecursionError:
        value, deep = None, True
    except ValueError as error:
        # of a number of 4301 digits, Python names a remedy that is a programmer's
        raise ValueError(str(error).partition("; use sys.")[0]) from None
    if deep:
        raise TooDeepError(f"nested too deeply, more than {MAX_DEPTH} deep")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


def _openings(text: str | bytes) -> int:
    if isinstance(text, str):
        return text.count("[") + text.count("{")
    # in UTF-16 and UTF-32, which JSON may be, these bytes are there as well
    return text.count(b"[") + text.count(b"{")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
