"""Parse JSON from files that users and checkpoints bring, with one error line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ring.errors import DataError
from megatron_ring.plain import TooDeepError, json_value


def parse_json(
    text: str | bytes, origin: str, remedy: str = "write one object per line", *, unique: bool = False
) -> Any:
    """The value of ``text``. With ``unique``, a duplicate key in an object is an error.

    Raises:
        DataError: not JSON, or nested too deeply; the message begins with ``origin`` and ends with ``remedy``.
    """
    try:
        return json_value(text, unique=unique)
    except TooDeepError as error:
        raise DataError(f"{origin} is {error}; write it flatter") from None
    except ValueError as error:
        raise DataError(f"{origin} is not JSON ({error}); {remedy}") from None


def count_in(values: Mapping[str, Any], key: str) -> int:
    """``values[key]`` of a saved state, which must be an integer from 0. Raises KeyError or ValueError otherwise."""
    return counts_in(values, key, [values[key]])[0]


def counts_in(values: Mapping[str, Any], key: str, counts: Any = None) -> list[int]:
    """``values[key]`` (or ``counts``, a part of it), which must be a list of integers from 0."""
    counts = values[key] if counts is None else counts
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in counts):
        raise ValueError(f"has {key}={str(values[key])[:40]!r}, which is not a count")
    return counts


def numbers_in(values: Mapping[str, Any], key: str) -> list[float]:
    """``values[key]`` of a saved state, which must be a list of numbers. Raises KeyError or ValueError otherwise."""
    numbers = values[key]
    if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"has {key}={str(numbers)[:40]!r}, which is not a list of numbers")
    return numbers
