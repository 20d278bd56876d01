"""Numbers for the arithmetic on answers: their bounds, their sizes, and the budget of work."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

from mpmath import mp

from megatron_ring.rl.reward.mathematics.text import Unreadable

Number = Any
"""Fraction, mpf or mpc."""

MAX_EXACT_BITS = 40_000
MAX_LOG2_BITS = 1100
"""A magnitude may be as large as 2 to the power of a number of this many bits."""
MAX_TURNS_BITS = 1000
"""Bits of the largest argument of a sine."""
MAX_FACTORIAL = 10**12
MAX_EXACT_FACTORIAL = 2000
MAX_TERMS = 1000
WORK = 400_000
"""Units of work per answer; a unit is about half a microsecond."""
GENERIC_POINTS = 6
POINTS = 22
"""Points at which identities are checked: first generic ones of all signs, then positive integers."""


class TooExpensive(Unreadable):
    """Evaluating this would cost more than the budget of one answer."""


class Undefined(ArithmeticError):
    """No value at this point: a division by zero, or a complex value where a real one is needed."""


class Budget:
    """Work that is left for one answer."""

    def __init__(self, units: int = WORK) -> None:
        self.left = units

    def charge(self, units: float) -> None:
        self.left -= int(units) + 1
        if self.left < 0:
            raise TooExpensive("it takes more work than one answer may")


def symbol_value(name: str, point: int) -> Fraction:
    """The value of a symbol at a point: of either sign and of different sizes, or a positive integer."""
    draw = random.Random(f"{name}:{point}")
    if point >= GENERIC_POINTS:
        odd = [n % 2 for n in range(POINTS - GENERIC_POINTS)]  # so that (-1)^n is no constant
        random.Random(name).shuffle(odd)
        return Fraction(2 * draw.randrange(1, 6 if point % 2 else 30) - odd[point - GENERIC_POINTS])
    value = Fraction(
        2 * draw.randrange(1, 2**14) + 1, 2**15
    )  # within (0, 1), so that roots and arcs are real
    if point == 0 or point == 3:
        value *= 8
    return value if point < 3 else value * draw.choice((-1, 1))


def finite(value: Number) -> bool:
    """Whether a number is neither infinite nor undefined."""
    return isinstance(value, Fraction) or bool(mp.isfinite(value))


def is_real(value: Number) -> bool:
    """Whether a number is no complex one."""
    return not isinstance(value, mp.mpc)


def bits(value: Fraction) -> int:
    """Binary digits of a fraction."""
    return value.numerator.bit_length() + value.denominator.bit_length()


def log2(value: Number) -> float:
    """Logarithm to base 2 of a magnitude, from its exponent alone."""
    if value == 0:
        return -1.0
    if not finite(value):
        return math.inf
    return float(min(max(mp.mag(value), -(10**300)), 10**300))


def exact_root(value: Fraction, index: int) -> Fraction | None:
    """The root of a fraction, if it is a fraction."""
    if index > 64 or (value < 0 and index % 2 == 0) or bits(value) > 4096:
        return None
    if index == 1:
        return value
    top, bottom = integer_root(abs(value.numerator), index), integer_root(value.denominator, index)
    return None if top is None or bottom is None else Fraction(top if value > 0 else -top, bottom)


def integer_root(value: int, index: int) -> int | None:
    """The root of an integer, if it is an integer."""
    if index == 2:
        root = math.isqrt(value)
    else:
        root, high = 0, 1 << (value.bit_length() // index + 1)
        while root < high:
            middle = (root + high + 1) // 2
            root, high = (middle, high) if middle**index <= value else (root, middle - 1)
    return root if root**index == value else None
