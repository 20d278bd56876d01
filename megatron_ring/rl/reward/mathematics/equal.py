"""Are two scalar trees equal in value?

- Rational numbers are compared exactly, at any size.
- Rational functions are compared at rational points and modulo large primes, which is exact but for chance.
- Everything else is compared to 60 digits and, if that finds no difference, to 500. A difference counts unless it shrinks
  as digits are added, so tiny values are told apart like large ones.
- Points at which both sides are real decide; complex ones only if there is no such point.
- A decimal with at least 6 significant digits equals any value that it could be rounded or truncated from.
"""

from __future__ import annotations

import math
from fractions import Fraction

from mpmath import mp

from megatron_ring.rl.reward.mathematics.numbers import POINTS, Budget, Number, TooExpensive, Undefined
from megatron_ring.rl.reward.mathematics.residue import PRIMES, NoResidue, has_symbols, residue
from megatron_ring.rl.reward.mathematics.value import Evaluator
from megatron_ring.rl.reward.mathematics.words import Node

DIGITS, MORE_DIGITS, MOST_DIGITS = 60, 110, 500
ENOUGH_POINTS = 9
"""Enough points at which both sides have values. Identities of integers have values at the last points only."""
DECIMAL_DIGITS = 6
"""A decimal with this many significant digits may stand for a value that it was rounded from."""


def equal(a: Node, b: Node, budget: Budget) -> bool:
    """Do ``a`` and ``b`` have the same value? Raises Unreadable, or its subclass TooExpensive.

    Example: ``equal(read(r"\\sqrt{12}"), read(r"2\\sqrt{3}"), Budget())``.
    """
    if a == b:
        return True
    constant = not has_symbols(a) and not has_symbols(b)
    if constant:
        left, right = _try(a, budget, DIGITS, 0, False), _try(b, budget, DIGITS, 0, False)
        if left is None or right is None:
            return False
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left == right or _as_decimal(a, b, left, right)
        if _as_decimal(a, b, left, right):
            return True
    for real in (True, False):
        tried = 0
        for point in range(1 if constant else POINTS):
            if tried >= ENOUGH_POINTS:
                break
            same = _same_at(a, b, budget, point, real)
            if same is False:
                return False
            tried += same is True
        if tried >= (1 if constant else 3):
            return _confirmed(a, b, budget, real)
    return False


def number_of(node: Node, budget: Budget) -> Number | None:
    """The value of a tree; None if it has symbols, or no value.

    Example: ``number_of(read("1/2"), Budget()) == Fraction(1, 2)``.
    """
    return None if has_symbols(node) else _try(node, budget, DIGITS, 0, True)


def has_value(node: Node, budget: Budget) -> bool:
    """Whether a tree without symbols has a value, real or complex."""
    return _try(node, budget, DIGITS, 0, False) is not None


def has_value_somewhere(node: Node, budget: Budget) -> bool:
    """Whether a tree with symbols has a value at one of the points at least."""
    return any(
        _try(node, budget, DIGITS, point, real) is not None
        for real in (True, False)
        for point in range(POINTS)
    )


def less(a: Node, b: Node, budget: Budget) -> bool | None:
    """Is a number below another? None if that cannot be decided."""
    left, right = number_of(a, budget), number_of(b, budget)
    if left is None or right is None:
        return None
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left < right
    with mp.workdps(DIGITS):
        return bool(_inexact(left) < _inexact(right)) and not equal(a, b, budget)


def proportional(a: Node, b: Node, budget: Budget, positive: bool) -> bool:
    """Whether ``a`` is ``b`` times a constant that is not zero, and positive if asked for."""
    factor: Number | None = None
    tried = 0
    for point in range(POINTS):
        left, right = _try(a, budget, DIGITS, point, True), _try(b, budget, DIGITS, point, True)
        if left is None or right is None or (left == 0 and right == 0):
            continue
        if left == 0 or right == 0:
            return False
        with mp.workdps(DIGITS):
            ratio = left / right if _both_exact(left, right) else _inexact(left) / _inexact(right)
            if factor is None:
                factor = ratio
            elif _both_exact(factor, ratio):
                if factor != ratio:
                    return False
            elif abs(_inexact(factor) - _inexact(ratio)) > abs(_inexact(factor)) * mp.mpf(10) ** (
                15 - DIGITS
            ):
                return False
        tried += 1
    return tried >= 3 and (not positive or (factor is not None and factor > 0))


def _try(node: Node, budget: Budget, digits: int, point: int, real: bool) -> Number | None:
    try:
        return Evaluator(budget, digits, point, real).value(node)
    except Undefined:
        return None


def _same_at(a: Node, b: Node, budget: Budget, point: int, real: bool) -> bool | None:
    """Are they equal at this point? None if one of them has no value there."""
    left, right = _try(a, budget, DIGITS, point, real), _try(b, budget, DIGITS, point, real)
    if left is None or right is None:
        return None
    if _both_exact(left, right):
        return left == right
    if _distance(left, right, DIGITS) is None:
        return True
    more = _try(a, budget, MORE_DIGITS, point, real), _try(b, budget, MORE_DIGITS, point, real)
    if more[0] is None or more[1] is None:
        return False
    return _distance(*more, MORE_DIGITS) is None or _vanishes((left, right), more, MORE_DIGITS)


def _distance(left: Number, right: Number, digits: int) -> Number | None:
    """The difference of two numbers; None if it is within the precision of ``digits``."""
    with mp.workdps(digits):
        left, right = _inexact(left), _inexact(right)
        if left == right:
            return None
        if not (mp.isfinite(left) and mp.isfinite(right)):
            return mp.inf
        distance = abs(left - right)
        return None if distance <= max(abs(left), abs(right)) * mp.mpf(10) ** (15 - digits) else distance


def _vanishes(few: tuple[Number, Number], more: tuple[Number, Number], digits: int) -> bool:
    """Is the difference of two numbers noise, which shrinks as ``digits`` are added?

    Then it is negligible beside each of the two numbers, or both are noise themselves. A difference that falls from a
    million to 3 is no noise.
    """
    with mp.workdps(digits):
        shrunk = mp.mpf(10) ** (DIGITS + 20 - digits)
        first, last = (abs(_inexact(pair[0]) - _inexact(pair[1])) for pair in (few, more))
        if not mp.isfinite(first) or not last < first * shrunk:
            return False
        sizes = [abs(_inexact(value)) for value in more]
        return last <= min(sizes) * mp.mpf(10) ** -15 or all(
            size == 0 or size < abs(_inexact(before)) * shrunk
            for size, before in zip(sizes, few, strict=True)
        )


def _confirmed(a: Node, b: Node, budget: Budget, real: bool) -> bool:
    """Confirm equality after no difference was found: by residues for rational functions, else with many more digits."""
    try:
        return all(residue(a, prime, budget) == residue(b, prime, budget) for prime in PRIMES)
    except NoResidue:
        pass
    # with a gamma function the first value to 500 digits takes seconds
    few = _has_gamma(a) or _has_gamma(b)
    for digits in (MORE_DIGITS,) if few else (MOST_DIGITS, 6 * MOST_DIGITS):
        same = _same_to(a, b, budget, real, digits)
        if same is not None:
            return same
    raise TooExpensive("a difference that is too small beside what it stands in")


def _same_to(a: Node, b: Node, budget: Budget, real: bool, digits: int) -> bool | None:
    """Do two trees agree to ``digits`` digits? None if a summand was smaller than the last digit."""
    for point in range(POINTS):
        evaluators = [Evaluator(budget, digits, point, real) for _ in range(2)]
        try:
            left, right = (e.value(node) for e, node in zip(evaluators, (a, b), strict=True))
        except Undefined:
            continue
        if any(evaluator.rounded for evaluator in evaluators):
            raise TooExpensive("numbers too large to be told apart")
        distance = _distance(left, right, digits)
        if distance is None:
            return None if any(evaluator.absorbed for evaluator in evaluators) else True
        first = _try(a, budget, DIGITS, point, real), _try(b, budget, DIGITS, point, real)
        return first[0] is not None and first[1] is not None and _vanishes(first, (left, right), digits)
    return False


def _has_gamma(node: Node) -> bool:
    return node.kind == "factorial" or node.name == "binom" or any(map(_has_gamma, node.parts))


def _as_decimal(a: Node, b: Node, left: Number, right: Number) -> bool:
    """Is one side a decimal with enough digits, and equal to the other side rounded or truncated to them?"""
    for node, decimal, other, value in ((a, left, b, right), (b, right, a, left)):
        digits = written_digits(node)
        if digits is None or digits < DECIMAL_DIGITS or not isinstance(decimal, Fraction) or decimal == 0:
            continue
        if (written_digits(other) or digits) < digits or isinstance(value, mp.mpc):
            continue  # of two decimals the shorter one is the rounded one
        with mp.workdps(DIGITS):
            unit = _inexact(_unit_of_last(decimal, digits))
            distance = _inexact(abs(value) - abs(decimal) if _both_exact(value, decimal) else abs(value)) - (
                0 if _both_exact(value, decimal) else _inexact(abs(decimal))
            )
            if (value > 0) == (decimal > 0) and -unit / 2 <= distance < unit:
                return True
    return False


def written_digits(node: Node) -> int | None:
    """Significant digits of a decimal, which may be negative or times a power of ten; None if the tree is no decimal."""
    if node.kind == "number":
        return node.digits
    if node.kind == "-":
        return written_digits(node.parts[0])
    if node.kind == "multiply" and len(node.parts) == 2 and node.parts[1].kind == "power":
        base = node.parts[1].parts[0]
        if base.kind == "number" and base.number == 10:
            return written_digits(node.parts[0])
    return None


def _unit_of_last(decimal: Fraction, digits: int) -> Fraction:
    """The value of one unit in the last of ``digits`` significant digits of ``decimal``."""
    size = abs(decimal)
    exponent = int((size.numerator.bit_length() - size.denominator.bit_length()) * math.log10(2))
    while Fraction(10) ** exponent > size:
        exponent -= 1
    while Fraction(10) ** (exponent + 1) <= size:
        exponent += 1
    return Fraction(10) ** (exponent - digits + 1)


def _both_exact(left: Number, right: Number) -> bool:
    return isinstance(left, Fraction) and isinstance(right, Fraction)


def _inexact(value: Number) -> Number:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value
