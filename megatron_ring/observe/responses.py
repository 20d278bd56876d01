"""``samples.jsonl``: some responses of a step, for people to read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ring.durable import require_replaceable, write_durably
from megatron_ring.errors import ConfigError, DataError
from megatron_ring.observe.metrics_file import is_number, is_step
from megatron_ring.plain import read_plain

FILE = "samples.jsonl"


class ResponseLog:
    """Appends rows to ``samples.jsonl``, every ``every`` steps; on a resume, rows of later steps are removed.

    Example line: ``{"step": 20, "prompt": "12 + 7 - 3 = ?", "response": "...", "score": 1.0, "status":
    "correct", "tokens": 14, "stop": "eos"}``.
    """

    def __init__(self, folder: Path | None, *, every: int):
        """``folder`` None keeps no log."""
        self._path = None if folder is None else folder / FILE
        self._every = every

    def resume(self, step: int) -> None:
        """Go on from ``step``: rows of later steps are removed; from step 0 an existing file is renamed."""
        if self._path is None or not self._path.exists():
            return
        kept = [row for row in read_samples(self._path) if row["step"] <= step]
        with _writing(self._path):
            require_replaceable(self._path)
            if step == 0:
                # another run's log: renamed, as its metrics file is
                self._path.replace(f"{self._path}.old")
            else:
                write_durably(self._path, "".join(map(_line, kept)))

    def is_due(self, step: int) -> bool:
        """Should this process write rows of that step?"""
        return self._path is not None and step % self._every == 0

    def write(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Append ``rows``, each under its ``step``.

        Raises:
            ConfigError: the file cannot be written.
        """
        assert self._path is not None
        with _writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.writelines(_line({"step": step} | row) for row in rows)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; check that the disk has space") from None


def _line(row: dict) -> str:
    """JSON with non-ASCII text as it is; an unpaired surrogate, which UTF-8 cannot encode, is escaped."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def read_samples(path: Path) -> list[dict]:
    """The rows of a ``samples.jsonl``; a last line that was cut short is left out.

    Raises:
        DataError: it cannot be read, or another line is no row.
    """
    try:
        # not splitlines: responses hold line separators that JSON leaves as they are
        lines = [line for line in read_plain(path).split(b"\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; repair or move the file") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            rows.append(row)
        elif number < len(lines):
            raise DataError(f"{path} line {number} is no sample; repair or move the file")
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and is_step(row.get("step"))
        and all(isinstance(row.get(name), str) for name in ("prompt", "response", "status"))
        and is_number(row.get("score"))
    )
