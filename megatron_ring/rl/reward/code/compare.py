"""Compare a program's output with the expected output: text word by word, values recursively, numbers as decimals.

The rules for numbers:

- An expected integer, however long, must be met exactly (``3.0`` for ``3`` is exact).
- An expected zero accepts absolute values below 1e-9 or, if it is written with six or more decimal places, below half a
  unit of the last (``4e-7`` for ``0.000000``). No other expected number accepts 0.
- For any other expected number there are three tolerances; one of them must hold. The difference is at most 1e-6 of the
  expected number. If the expected number has six or more decimal places, the difference is at most half a unit of the
  last. If the given number has six or more decimal places, the difference is at most half a unit of its last and at most
  1e-3 of the expected number (``0.083333`` for ``0.0833333333``).
- Two integers below 2**53 must be equal, also if they are written with a point.

In text, a word is a number only if it is written with ASCII digits, and it is compared as a number only if it or the
expected word has a point or an exponent: ``007`` is not ``7``. Everything else is compared as it is written (case, nan and
inf included). The amount of white space between words does not count, nor does white space at line ends or blank lines
at the end.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any

_RELATIVE = Decimal("1e-6")
_ROUNDED = Decimal("1e-3")
_ZERO = Decimal("1e-9")
_PLACES = 6
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_SHORT = 4000
"""Digits of an integer that Python parses whatever its limit is set to."""
_ROUGH = Context(prec=30, rounding=ROUND_HALF_EVEN, Emax=999999, Emin=-999999, traps=[])


def same_output(output: str, expected: str) -> bool:
    """Are two outputs equal, line by line and word by word?

    Example: ``same_output("0.3333333 \\n\\n", "0.33333333\\n")`` is True.
    """
    lines, wanted_lines = output.rstrip().split("\n"), expected.rstrip().split("\n")
    return len(lines) == len(wanted_lines) and all(
        _same_words(line.split(), wanted.split()) for line, wanted in zip(lines, wanted_lines, strict=True)
    )


def same_value(value: Any, expected: Any) -> bool:
    """Are two JSON values equal? True is not 1, a tuple equals a list, and keys of mappings are compared as text.

    Example: ``same_value((1, 0.30000000000000004), [1, 0.3])`` is True, ``same_value(True, 1)`` is False.
    """
    if isinstance(expected, Mapping):
        return (
            isinstance(value, Mapping)
            and {_key(key) for key in value} == {_key(key) for key in expected}
            and all(
                same_value(item, wanted)
                for item, wanted in zip(_by_key(value), _by_key(expected), strict=True)
            )
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(expected)
            and all(map(same_value, value, expected))
        )
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, int | float | Decimal) and isinstance(value, int | float | Decimal):
        return _same_number_value(value, expected)
    return value == expected


def read_json(text: str) -> Any:
    """Parse JSON whose integers may have any number of digits; long ones become Decimal, without loss."""
    return json.loads(text, parse_int=lambda word: int(word) if len(word) < _SHORT else Decimal(word))


def write_json(value: Any) -> str:
    """The JSON text of a value of :func:`read_json`, or of one with Python integers of any length."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        pass
    if isinstance(value, Mapping):
        items = (f"{json.dumps(str(key))}: {write_json(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_json, value)) + "]"
    if isinstance(value, int | Decimal):
        return format(Decimal(value), "f")
    raise ValueError(f"{type(value).__name__} is not JSON")


def same_number(value: Decimal, expected: Decimal) -> bool:
    """Are two numbers equal by the rules above? The decimal places of a Decimal are those that were written.

    Example: ``same_number(Decimal("1e-05"), Decimal("0.00001"))`` is True.
    """
    if value == expected:
        return True
    if expected == 0:
        return abs(value) < max(_half_digit(expected), _ZERO)
    if _is_whole(value) and _is_whole(expected) and abs(expected) < 1 << 53:
        return False
    difference = _ROUGH.abs(_ROUGH.subtract(value, expected))
    size = abs(expected)
    return (
        difference <= _ROUGH.multiply(_RELATIVE, size)
        or difference <= _half_digit(expected)
        or difference <= min(_half_digit(value), _ROUGH.multiply(_ROUNDED, size))
    )


def _half_digit(number: Decimal) -> Decimal:
    """Half a unit of the last decimal place; 0 if there are fewer than ``_PLACES``, which are not taken as rounded."""
    places = -int(number.as_tuple().exponent)
    return Decimal(5).scaleb(-places - 1, _ROUGH) if places >= _PLACES else Decimal(0)


def _is_whole(number: Decimal) -> bool:
    return int(number.as_tuple().exponent) >= 0 or number == number.to_integral_value(context=_EXACT)


_EXACT = Context(prec=999_999, Emax=999999, Emin=-999999, traps=[])


def _same_words(words: list[str], wanted: list[str]) -> bool:
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(wanted)):
        return False
    if _WHOLE.fullmatch(wanted):
        return not _WHOLE.fullmatch(word) and Decimal(word) == Decimal(wanted)
    return same_number(Decimal(word), Decimal(wanted))


def _same_number_value(value: Any, expected: Any) -> bool:
    if value == expected:
        return True
    if isinstance(expected, int | Decimal):
        return False
    if not (math.isfinite(expected) and _is_finite(value)):
        return math.isnan(expected) and isinstance(value, float) and math.isnan(value)
    return same_number(
        Decimal(repr(value)) if isinstance(value, float) else Decimal(value), Decimal(repr(expected))
    )


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _by_key(mapping: Mapping[Any, Any]) -> list[Any]:
    return [mapping[key] for key in sorted(mapping, key=_key)]
