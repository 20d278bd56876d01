"""Write files so that they appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ring.durable import fsync
from megatron_ring.errors import DataError


@contextmanager
def written_whole(*targets: str | Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path beside each target; rename them to the targets, in order, when the block ends without error.

    Name the target last whose presence means "complete". If older files exist, that one is removed first: a process
    killed in the middle leaves a set that readers refuse, never an old index with new data. Parent folders are made.

    Example: ``with written_whole("tok.model") as (path,): path.write_bytes(model)``.

    Raises:
        DataError: the disk is full, or the folder cannot be made or written; no temporary file is left.
    """
    finals = [Path(target) for target in targets]
    temporary = tuple(final.with_name(f".{final.name}.{os.getpid()}.tmp") for final in finals)
    try:
        for final in finals:
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.is_dir():
                raise IsADirectoryError(None, "Is a folder")
        # find out before the work, not after it, that a folder cannot be written
        for path in temporary:
            path.touch()
        yield temporary
        for path in temporary:
            fsync(path)
        for final in reversed(finals[1:]):
            final.unlink(missing_ok=True)
        for path, final in zip(temporary, finals, strict=True):
            path.replace(final)
        fsync(finals[0].parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write {finals[0]}: {reason}; the folder must be writable and have room, "
            "choose another or free some"
        ) from error
    finally:
        for path in temporary:
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
