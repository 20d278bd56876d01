"""Read files that may come from outside: one that is no plain file, too large or not JSON gives one error line.

Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from megatron_ring.errors import CheckpointError
from megatron_ring.plain import json_value, read_plain

MAX_JSON_BYTES = 100_000_000
"""More than the JSON of any checkpoint needs, whatever the model."""


def read_json(path: Path, remedy: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object that ``path`` holds.

    Raises:
        CheckpointError: it cannot be read or holds something else; ``remedy`` ends the line.
    """
    try:
        return parse_json_object(read_plain(path, max_bytes))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {remedy}") from None


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; a key that occurs twice is an error.

    Raises:
        ValueError: ``data`` is not a JSON object; the message is one line.
    """
    value = json_value(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"holds {_kind(value)} but must hold a JSON object")
    return value


def is_count(value: object) -> TypeGuard[int]:
    """Is it an integer from 0 to 2**63 - 1? ``True`` is not."""
    return type(value) is int and 0 <= value < 1 << 63


def is_file_name(value: object) -> TypeGuard[str]:
    """Is it a file name without a path, so that it cannot lead out of a folder?"""
    return (
        isinstance(value, str)
        and 0 < len(value) < 256
        and value not in (".", "..")
        and not set("/\\\0\n").intersection(value)
    )


def shown(value: object, limit: int = 60) -> str:
    """A value from outside, shortened for an error line; of objects and lists only the kind is shown."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**limit else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    return _kind(value)


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )
