"""Parse a model's text as numbers, lists and grids: small bounded parsers, none of which evaluates anything.

Each returns None if the whole text does not have its form: a parser that accepts a part would reward junk around an answer.
Digits are ASCII, and sizes are bounded before anything is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import Any

MAX_NUMBER_CHARS = 200
MAX_NESTING = 8

_NUMBER = re.compile(
    r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+(?=\.?)|(?=\.\d))(?:\.\d*)?(?:[eE][+-]?\d{1,3})?", re.ASCII
)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_PREFIXED = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|\d+)", re.ASCII)
_LATEX_RATIO = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def number(text: str) -> Fraction | None:
    """A number in decimal notation, exactly. Example: ``number("+1,250.50e-2") == Fraction(2501, 200)``."""
    text = text.strip()
    if len(text) > MAX_NUMBER_CHARS or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def last_place(text: str) -> Fraction:
    """A unit of the last digit of a number. Example: ``last_place("0.250") == Fraction(1, 1000)``."""
    exponent = Decimal(text.strip().replace(",", "")).as_tuple().exponent
    assert isinstance(exponent, int), "only number()'s texts have one"
    return Fraction(10) ** exponent


def numbers(text: str) -> list[Fraction] | None:
    """Numbers between commas. Example: ``numbers("-0.5, 2") == [Fraction(-1, 2), 2]``; they hold no commas
    themselves."""
    found: list[Fraction] = []
    for word in text.split(","):
        value = number(word)
        if value is None:
            return None
        found.append(value)
    return found


def whole(text: str) -> int | None:
    """A whole number. Example: ``whole(" -7 ") == -7``."""
    text = text.strip()
    return int(text) if len(text) <= MAX_NUMBER_CHARS and _WHOLE.fullmatch(text) else None


def prefixed(text: str) -> int | None:
    """A whole number in the notation of its prefix. Example: ``prefixed("-0x1F") == prefixed("-31") == -31``."""
    match = _PREFIXED.fullmatch(text.strip())
    if match is None or len(match[2]) > MAX_NUMBER_CHARS:
        return None
    base = {"x": 16, "b": 2, "o": 8}.get(match[2][1:2].lower(), 10)
    value = int(match[2], base)
    return -value if match[1] == "-" else value


def ratio(text: str) -> tuple[str, str] | None:
    r"""The two sides of a fraction, as text. Example: ``ratio("3 / 4") == ratio(r"$\frac{3}{4}$") == ("3", "4")``."""
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    match = _LATEX_RATIO.fullmatch(text)
    sides = list(match.groups()) if match else text.split("/")
    return (sides[0].strip(), sides[1].strip()) if len(sides) == 2 else None


def rational(text: str) -> Fraction | None:
    """A number, or a fraction of two. Example: ``rational("3/4") == rational("0.75")``."""
    sides = ratio(text)
    if sides is None:
        return number(text)
    over, under = number(sides[0]), number(sides[1])
    return over / under if over is not None and under else None


def rounded(value: Fraction, digits: int) -> set[Decimal]:
    """``value`` at so many significant digits: two values where a half may go up or to even."""
    exact = Context(prec=MAX_NUMBER_CHARS * 2).divide(Decimal(value.numerator), Decimal(value.denominator))
    return {Context(prec=digits, rounding=way).plus(exact) for way in (ROUND_HALF_EVEN, ROUND_HALF_UP)}


def json_value(text: str, *, single_quotes: bool = False) -> Any:
    """The value of a JSON text, numbers exactly, not nested deeper than MAX_NESTING. Example: ``json_value("[1]") == [1]``.

    With ``single_quotes`` strings may stand between those as well. None for null too, and for NaN.
    """
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > MAX_NESTING:
            return None
    try:
        return json.loads(
            text.replace("'", '"') if single_quotes else text, parse_float=Decimal, parse_constant=_refuse
        )
    except (ValueError, RecursionError):
        return None


def list_of(text: str, kind: type, *, single_quotes: bool = False) -> list[Any] | None:
    """A JSON list of values of one type. Example: ``list_of('["a", "b"]', str) == ["a", "b"]``; a bool is no int."""
    value = json_value(text, single_quotes=single_quotes)
    return value if isinstance(value, list) and all(type(item) is kind for item in value) else None


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; true is not 1 here, and 1.0 is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def grid(text: str) -> list[list[str]]:
    """Words of each line that is not empty. Example: ``grid("1 2 \\n\\n3 4") == [["1", "2"], ["3", "4"]]``."""
    return [line.split() for line in text.splitlines() if line.strip()]


def grid_of(text: str, read: Callable[[str], Any]) -> list[list[Any]] | None:
    """A grid of values, all of them read. Example: ``grid_of("1 2", whole) == [[1, 2]]``."""
    values = [[read(word) for word in row] for row in grid(text)]
    return None if any(value is None for row in values for value in row) else values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
