"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_ring.errors import DataError

MAX_DEPTH = 64
"""Lists and objects inside one another; beyond it Python's own recursion would end what reads the value."""


def parse_json(
    text: str | bytes, origin: str, remedy: str = "write one object per line", *, unique: bool = False
) -> Any:
    """The value of ``text``; with ``unique``, no object may have a key twice.

    Raises:
        DataError: not JSON, or nested too deeply; the line begins with ``origin`` and ends with ``remedy``.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
        deep = _openings(text) > MAX_DEPTH and _is_deep(value)
    except RecursionError:
        deep = True
        value = None
    except ValueError as error:
        # of a number of 4301 digits, Python names a remedy that is a programmer's
        reason = str(error).partition("; use sys.")[0]
        raise DataError(f"{origin} is not JSON ({reason}); {remedy}") from None
    if deep:
        raise DataError(f"{origin} is nested more than {MAX_DEPTH} deep; write it flatter")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


def count_in(values: Mapping[str, Any], key: str) -> int:
    """``values[key]``, a count. Raises KeyError and ValueError where it is none: of a saved state, for a line."""
    return counts_in(values, key, [values[key]])[0]


def counts_in(values: Mapping[str, Any], key: str, counts: Any = None) -> list[int]:
    """``values[key]``, a list of counts."""
    counts = values[key] if counts is None else counts
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in counts):
        raise ValueError(f"says {key}={str(values[key])[:40]!r}, which is no count")
    return counts


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
