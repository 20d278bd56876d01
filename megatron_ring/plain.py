"""Read files whose name or contents come from outside.

Opening never blocks, whatever the path is: a named pipe would block ``open`` forever. Bad JSON gives a one-line
reason.
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
"""How deep lists and objects may be nested: below the depth at which Python's recursion limit stops a reader."""


class TooDeepError(ValueError):
    """JSON nested more than ``MAX_DEPTH`` deep."""


def open_plain(path: Path) -> BinaryIO:
    """Open ``path`` for reading, without blocking on a named pipe or a terminal.

    Raises:
        OSError: it does not exist or is no regular file; ``strerror`` says which.
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
    """The contents of a regular file of at most ``max_bytes``.

    Raises:
        OSError: see :func:`open_plain`; or it is longer.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {max_bytes:,}", str(path))
        return file.read(size)


def json_value(text: str | bytes, *, unique: bool = True) -> Any:
    """The value of JSON ``text``. ``unique`` refuses an object with a repeated key: parsers differ in which
    value they keep.

    Raises:
        TooDeepError: it is nested more than ``MAX_DEPTH`` deep.
        ValueError: it is no JSON; the message is one line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
        deep = _openings(text) > MAX_DEPTH and _is_deep(value)
    except RecursionError:
        value, deep = None, True
    except ValueError as error:
        # for a number of over 4300 digits Python adds a remedy for programmers
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
    # JSON may be UTF-16 or UTF-32; these bytes occur there as well
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
