"""The file metrics.jsonl: one JSON object per line, each step once; no failure leaves half a line in the middle.

``kind`` says what a record is, ``step`` how many optimizer steps are done:

- ``run``: a start or a resume; time (ISO 8601), world_size and the facts the stage adds
- ``train``: one step; tokens, seconds, tokens_per_second, mfu where a peak is known, the stage's own values,
  ``seconds_NAME`` for each phase, wall_seconds (since the first start, without what a killed run lost)
- ``eval``: a validation after that step
- ``end``: the run ended normally

A number that is not finite is null: JSON has no NaN.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ring.durable import require_replaceable, write_durably
from megatron_ring.errors import ConfigError, DataError
from megatron_ring.plain import read_plain


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, without a last line that a kill cut short.

    Raises DataError for a file that cannot be read, or a line that is no record.
    """
    path = Path(path)
    try:
        lines = read_plain(path).splitlines()
    except OSError as error:
        raise DataError(f"metrics file {path}: {error.strerror}; name a run that wrote one") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is no metrics record; repair or move the file")
        records.append(record)
    return records


def is_number(value: Any) -> bool:
    """A number that can be drawn: finite, and no larger than what a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def is_step(value: Any) -> bool:
    """A count of steps. Example: ``is_step(3) and not is_step(True)``."""
    return is_number(value) and isinstance(value, int) and value >= 0


_MOST = 1e300
FIGURES = ("tokens", "seconds", "wall_seconds")
"""Keys of every step's record."""


def _is_record(record: Any) -> bool:
    """Has it the keys that readers rely on, with the types listed at the top?"""
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("kind"), str)
        or not is_step(record.get("step"))
    ):
        return False
    figures = [name for name in record if name in FIGURES or name.startswith("seconds_")]
    return (
        all(is_number(record[name]) for name in figures)
        and isinstance(record.get("time", ""), str)
        and is_number(record.get("world_size", 1))
    )


class MetricsFile:
    """Appends whole lines. A kill can cut the last line short; a full disk cannot."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the records of steps up to ``resume_step``; ``wall_seconds`` is the time those steps took."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            require_replaceable(path)
            self.wall_seconds = self._keep(resume_step) if path.exists() else 0.0
            # unbuffered: a line reaches the operating system as soon as it is written
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refusal(error) from None

    def _keep(self, resume_step: int) -> float:
        if resume_step == 0:
            os.replace(self._path, f"{self._path}.old")
            return 0.0
        kept = [record for record in read_records(self._path) if record["step"] <= resume_step]
        write_durably(self._path, map(_line, kept))
        return max((record.get("wall_seconds", 0.0) for record in kept), default=0.0)

    def append(self, record: dict[str, Any]) -> None:
        line = _line(record)
        end = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            raise self._refusal(error) from None

    def close(self) -> None:
        self._file.close()

    def _refusal(self, error: OSError) -> ConfigError:
        return ConfigError(f"metrics file {self._path}: {error.strerror}; free space or set --metrics-file")


def _line(record: Mapping[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
