"""Durable writes: after a crash a file is complete, the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


def write_durably(path: Path, contents: str | Iterable[bytes]) -> None:
    """Replace ``path`` by ``contents`` so that a crash leaves the old file or the new one. A link stays, and the file
    that it names is replaced.

    Raises:
        OSError: it cannot be written, or is no regular file; the old file is as it was, and no temporary file is left.
    """
    require_replaceable(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_synced(temporary, contents)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync(path.parent)


def require_replaceable(path: Path) -> None:
    """Raise OSError where ``path`` is a pipe, a device or a folder: a file in its place would take it from everybody,
    /dev/null too."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no plain file", str(path))


def write_synced(path: Path, contents: str | Iterable[bytes]) -> None:
    """Write ``path`` in place; it is on the disk when this returns."""
    with path.open("wb") as file:
        file.writelines([contents.encode()] if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Flush a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
