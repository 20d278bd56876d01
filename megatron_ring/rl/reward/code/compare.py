"""Whether what a program gave is what was expected: texts word by word, values deeply, numbers as decimals.

Numbers, wherever one is expected:

- a whole expected number, however long, must be given exactly (``3.0`` for ``3`` is);
- any other may differ by 1e-6 of its size; where six or more digits stand behind its point, by half of the last
  (``0.000000`` takes ``4e-7``); and where six or more stand behind the given number's, by half of that last one and
  1e-3 of its size (``0.083333`` for ``0.0833333333``). 0.0 takes what is below 1e-9. So 0 never equals a number that is
  not 0;
- two whole numbers below 2**53 are equal or not, also where they are written with a point.

In text a word is a number only if it is written with ASCII digits, and is compared as one only if it or the expected
word has a point or an exponent: ``007`` is not ``7``. Everything else, upper and lower case, nan and inf included,
is compared as it stands. Blanks between words and at line ends do not count, nor do blank lines at the end.
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
"""Digits of an integer that Python itself reads in any setting."""
_ROUGH = Context(prec=30, rounding=ROUND_HALF_EVEN, Emax=999999, Emin=-999999, traps=[])


def same_output(output: str, expected: str) -> bool:
    """Equal line by line and word by word. Example: ``same_output("0.3333333 \\n\\n", "0.33333333\\n")``."""
    lines, wanted_lines = output.rstrip().split("\n"), expected.rstrip().split("\n")
    return len(lines) == len(wanted_lines) and all(
        _same_words(line.split(), wanted.split()) for line, wanted in zip(lines, wanted_lines, strict=True)
    )


def same_value(value: Any, expected: Any) -> bool:
    """Equality of JSON values. True is not 1, a list and a tuple are alike, keys of mappings are text.

    Example: ``same_value((1, 0.30000000000000004), [1, 0.3]) and not same_value(True, 1)``.
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
    """JSON whose integers may have any number of digits; the long ones are read as Decimal, exactly."""
    return json.loads(text, parse_int=lambda word: int(word) if len(word) < _SHORT else Decimal(word))


def write_json(value: Any) -> str:
    """The JSON of what :func:`read_json` reads, or of Python's own integers of any length."""
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
    """By the rule above; a number's written digits are its exponent's.

    Example: ``same_number(Decimal("1e-05"), Decimal("0.00001"))``.
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
    """Half of the last digit that is written behind the point; 0 where they are too few to mean a rounding."""
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
