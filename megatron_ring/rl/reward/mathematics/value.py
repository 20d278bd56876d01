"""Evaluate a tree: exactly if its value is rational, else to a given number of digits.

Nothing is simplified or expanded, and the cost of each operation is checked first: sizes of exact numbers, magnitudes of
arguments, terms of a sum, and a budget of work per answer. Beyond a limit :class:`TooExpensive` is raised; nothing hangs.
The value of a symbol follows from its name and the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce

from mpmath import mp

from megatron_ring.rl.reward.mathematics.functions import FUNCTIONS, MPMATH, TURNING
from megatron_ring.rl.reward.mathematics.numbers import (
    MAX_EXACT_BITS,
    MAX_EXACT_FACTORIAL,
    MAX_FACTORIAL,
    MAX_LOG2_BITS,
    MAX_TERMS,
    MAX_TURNS_BITS,
    Budget,
    Number,
    TooExpensive,
    Undefined,
    bits,
    exact_root,
    finite,
    is_real,
    log2,
    symbol_value,
)
from megatron_ring.rl.reward.mathematics.text import Unreadable
from megatron_ring.rl.reward.mathematics.words import Node

GROWING = frozenset(("exp", "sinh", "cosh", "tanh", "coth"))
FLAT_AND_FAST = frozenset(("tanh", "coth"))
FLAT = frozenset(("arctan", "atan", "arccot", "acot"))
_NOISE_DIGITS = 25
"""Digits that a power of an inexact number must keep."""


class Evaluator:
    """Values of trees at one point with a number of digits. ``rounded``: an exact number was too large and was rounded;
    ``absorbed``: a summand was smaller than the last digit.

    Example: ``Evaluator(Budget(), 60).value(read("1/2+1/3")) == Fraction(5, 6)``.
    """

    def __init__(self, budget: Budget, digits: int, point: int = 0, real: bool = True) -> None:
        self.budget, self.digits, self.point, self.real = budget, digits, point, real
        self.rounded = False
        self.absorbed = False
        self.bound: dict[str, Fraction] = {}
        self.cost = 4 * (1 + digits / 60) ** 1.5

    def value(self, node: Node) -> Number:
        """The value of ``node``; raises :class:`Undefined` or :class:`Unreadable`."""
        with mp.workdps(self.digits):
            try:
                value = self._of(node)
                # a summand that was absorbed on the way is missing in an exact number as well
                return self.inexact(value) if self.absorbed else value
            except (ZeroDivisionError, OverflowError) as error:
                raise Undefined(str(error)) from error
            except ValueError as error:
                if isinstance(error, Unreadable):
                    raise
                raise Undefined(str(error)) from error

    def _of(self, node: Node) -> Number:
        self.budget.charge(8)
        method = _METHODS.get(node.kind)
        if method is None:
            raise Unreadable(f"a {node.kind} is no number")
        return method(self, node)

    def _number(self, node: Node) -> Number:
        return node.number

    def _symbol(self, node: Node) -> Number:
        if node.name in self.bound:
            return self.bound[node.name]
        if self.bound and "_" in node.name:
            # a_k in a sum over k has another value for every k
            varying = [f"{name}={value}" for name, value in self.bound.items() if _names(node.name, name)]
            return symbol_value(" ".join((node.name, *varying)), self.point)
        return symbol_value(node.name, self.point)

    def _constant(self, node: Node) -> Number:
        if node.name in self.bound:  # the i of a sum over i
            return self.bound[node.name]
        if node.name == "i":
            if self.real:
                raise Undefined("not real")
            return mp.mpc(0, 1)
        return {"pi": +mp.pi, "e": +mp.e, "infty": mp.inf}[node.name]

    def _add(self, node: Node) -> Number:
        return reduce(self.plus, map(self._of, node.parts))

    def _finite(self, *values: Number) -> None:
        """Infinity may be an answer or a bound, but no operand: results of arithmetic with it would equal wrong answers."""
        if not all(map(finite, values)):
            raise Undefined("arithmetic with infinity")

    def plus(self, a: Number, b: Number) -> Number:
        self._finite(a, b)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            if bits(a) + bits(b) <= MAX_EXACT_BITS:
                self.budget.charge(((bits(a) + bits(b)) / 300) ** 2)
                return a + b
            self.rounded = True
        self.budget.charge(20)
        a, b = self.inexact(a), self.inexact(b)
        if a != 0 and b != 0 and finite(a) and finite(b) and abs(mp.mag(a) - mp.mag(b)) > mp.prec:
            self.absorbed = True
        return self._checked(a + b)

    def _multiply(self, node: Node) -> Number:
        return reduce(self.times, map(self._of, node.parts))

    def times(self, a: Number, b: Number) -> Number:
        self._finite(a, b)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            if bits(a) + bits(b) <= MAX_EXACT_BITS:
                self.budget.charge(((bits(a) + bits(b)) / 300) ** 2)
                return a * b
            self.rounded = True
        if a == 0 or b == 0:
            return Fraction(0)
        self.budget.charge(20)
        return self._checked(self.inexact(a) * self.inexact(b))

    def _inverse(self, node: Node) -> Number:
        value = self._of(node.parts[0])
        self._finite(value)
        if value == 0:
            raise Undefined("division by zero")
        return 1 / value

    def _minus(self, node: Node) -> Number:
        return -self._of(node.parts[0])

    def _power(self, node: Node) -> Number:
        base, exponent = self._of(node.parts[0]), self._of(node.parts[1])
        return self.power(base, exponent)

    def power(self, base: Number, exponent: Number) -> Number:
        self._finite(base, exponent)
        if base == 0 or (base == 1 and isinstance(base, Fraction)):
            if base == 0 and not (is_real(exponent) and exponent > 0):
                raise Undefined("zero to this power")
            return Fraction(base == 1)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            n = exponent.numerator
            if isinstance(base, Fraction):
                if abs(n) * bits(base) <= MAX_EXACT_BITS or base == -1:
                    self.budget.charge((bits(base) * abs(n) / 300) ** 2 if base != -1 else 1)
                    return base**n if base != -1 else Fraction(1 - 2 * (n % 2))
                self.rounded = True
            return self._large_power(base, Fraction(n))
        if isinstance(exponent, Fraction) and is_real(base):
            if isinstance(base, Fraction) and (root := exact_root(base, exponent.denominator)) is not None:
                return self.power(root, Fraction(exponent.numerator))
            if base < 0 and exponent.denominator % 2:
                value = self._large_power(-base, exponent)
                return -value if exponent.numerator % 2 else value
        if is_real(base) and base < 0 and self.real:
            raise Undefined("not real")
        return self._large_power(base, exponent)

    def _large_power(self, base: Number, exponent: Number) -> Number:
        is_exact = isinstance(base, Fraction) and isinstance(exponent, Fraction)
        base = self.inexact(base)
        negative = is_real(base) and base < 0
        odd = isinstance(exponent, Fraction) and exponent.denominator == 1
        sign = -1 if negative and odd and exponent.numerator % 2 else 1
        if negative and odd:
            base = -base
        if odd and abs(exponent) <= 64:
            self.budget.charge(self.cost)
            return self._checked(sign * base ** int(exponent))
        exponent_bits = log2(abs(self.inexact(exponent)))
        size = exponent_bits + math.log2(1 + abs(log2(abs(base))))
        if size > MAX_LOG2_BITS:
            raise TooExpensive("a power beyond any size")
        if not is_exact:
            self._keeps_digits(size)
        self._swallows(size < -mp.prec / 2 and base != 1)
        self.budget.charge(3 * self.cost + max(0.0, size))
        with mp.workprec(mp.prec + int(max(0.0, size)) + 10):
            value = mp.exp(self.inexact(exponent) * mp.log(base))
        return self._checked(sign * +value)

    def _keeps_digits(self, size: float) -> None:
        """Check the digits of e to the power of an inexact 2**size: it loses as many as the exponent has integer digits."""
        if size > (self.digits - _NOISE_DIGITS) * math.log2(10):
            raise TooExpensive("a power none of whose digits can be told")

    def _swallows(self, it_does: bool) -> None:
        """Note that a function is so flat here that its value does not depend on its argument: cos(10^-99) is not 1."""
        self.absorbed = self.absorbed or it_does

    def _root(self, node: Node) -> Number:
        index = self._of(node.parts[1])
        if index == 0:
            raise Undefined("a root of order zero")
        return self.power(self._of(node.parts[0]), 1 / index)

    def _factorial(self, node: Node) -> Number:
        return self.gamma(self._of(node.parts[0]))

    def gamma(self, value: Number) -> Number:
        """value!"""
        if not is_real(value) or not finite(value):
            raise Undefined("a factorial of no real number")
        if isinstance(value, Fraction) and value.denominator == 1:
            if value < 0:
                raise Undefined("a factorial of a negative number")
            if value <= MAX_EXACT_FACTORIAL:
                self.budget.charge(1 + float(value) ** 2 / 2000)
                return Fraction(math.factorial(int(value)))
            self.rounded = True
        if abs(value) > MAX_FACTORIAL:
            raise TooExpensive(f"a factorial beyond {MAX_FACTORIAL}!")
        self.budget.charge(300 * self.digits / 60)
        self._swallows(value != 0 and log2(abs(value)) < -mp.prec / 2)
        return self._checked(mp.gamma(self.inexact(value) + 1))

    def _degrees(self, node: Node) -> Number:
        return self._of(node.parts[0])

    def _percent(self, node: Node) -> Number:
        return self._of(node.parts[0]) / 100

    def _determinant(self, node: Node) -> Number:
        """By cofactors, up to 4 rows."""
        rows = [[self._of(cell) for cell in row.parts] for row in node.parts]
        if len(rows) > 4 or len(rows) != len(rows[0]):
            raise Unreadable("a determinant of this size")
        return self._cofactors(rows)

    def _cofactors(self, rows: list[list[Number]]) -> Number:
        if len(rows) == 1:
            return rows[0][0]
        total: Number = Fraction(0)
        for at, cell in enumerate(rows[0]):
            minor = self._cofactors([[*row[:at], *row[at + 1 :]] for row in rows[1:]])
            total = self.plus(total, self.times(cell if at % 2 == 0 else -cell, minor))
        return total

    def _repeated(self, node: Node) -> Number:
        variable, first, last, body = node.parts
        begin, end = self._of(first), self._of(last)
        if variable.kind not in ("symbol", "constant"):
            raise Unreadable(f"a {node.kind} over no symbol")
        if not finite(begin) or not finite(end):
            return symbol_value(repr(node), self.point)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (begin, end)):
            raise Undefined("ends of a sum that are not whole")
        if end - begin > MAX_TERMS:
            raise TooExpensive(f"more than {MAX_TERMS} terms")
        combine, total = (self.plus, Fraction(0)) if node.kind == "sum" else (self.times, Fraction(1))
        outer = dict(self.bound)
        for n in range(int(begin), int(end) + 1):
            self.bound[variable.name] = Fraction(n)
            total = combine(total, self._of(body))
        self.bound = outer
        return total

    def _call(self, node: Node) -> Number:
        arguments = [self._turned(part, node.name) for part in node.parts]
        function = FUNCTIONS.get((node.name, len(arguments))) or FUNCTIONS.get((node.name, 0))
        if function is None or not arguments:
            raise Unreadable(f"{node.name} of {len(arguments)}")
        self._finite(*arguments)
        return self._checked(function(self, *arguments))

    def _turned(self, node: Node, name: str) -> Number:
        """An argument; an angle in degrees is converted to radians."""
        value = self._of(node)
        return value * mp.pi / 180 if _has_degrees(node) and name in TURNING else value

    def real_function(self, name: str, value: Number) -> Number:
        """A function of mpmath, if its value is real and not too large."""
        self.budget.charge(2 * self.cost)
        value = self.inexact(value)
        if name in TURNING and log2(abs(value)) > MAX_TURNS_BITS:
            raise TooExpensive("an angle beyond any size")
        if name in GROWING and log2(abs(value)) > MAX_LOG2_BITS:
            raise TooExpensive("an exponential beyond any size")
        if name in GROWING:
            self._keeps_digits(log2(abs(value)))
        size = log2(abs(value))
        flat = (name in FLAT_AND_FAST and size > math.log2(mp.prec / 4)) or (
            name in FLAT and size > mp.prec / 2
        )
        self._swallows(flat or (value != 0 and size < -mp.prec / 2))
        return getattr(mp, MPMATH.get(name, name))(value)

    def integer(self, value: Number, rounding: Callable[[Number], Number]) -> Fraction:
        """Floor and the like; noise in the last digits must not shift the result by one."""
        if isinstance(value, Fraction):
            return Fraction(rounding(value))
        if not is_real(value) or not finite(value) or log2(abs(value)) > 3 * self.digits:
            raise Undefined("no integer part")
        nearest = mp.nint(value)
        exact = nearest if abs(value - nearest) < mp.mpf(10) ** (_NOISE_DIGITS - self.digits) else value
        return Fraction(int(rounding(exact)))

    def inexact(self, value: Number) -> Number:
        if not isinstance(value, Fraction):
            return value
        if bits(value) > 2 * mp.prec and value.denominator != 1:
            self.budget.charge((bits(value) / 300) ** 2)
            simple = value.limit_denominator(1 << mp.prec // 4)
            # 2+10^-700 becomes 2 here, and 3^-2000 what it is
            self._swallows(simple != 0 and 0 < abs(value - simple) * (1 << mp.prec) < abs(simple))
        return mp.mpf(value.numerator) / value.denominator

    def _checked(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            return value
        if mp.isnan(value):
            raise Undefined("no number")
        if isinstance(value, mp.mpc):
            if value.imag == 0:
                return value.real
            if self.real:
                raise Undefined("not real")
            return self._without_dust(value)
        return value

    def _without_dust(self, value: Number) -> Number:
        """A complex number without a part below its last digit: mpmath adds squares exactly, at any cost."""
        real, imaginary = value.real, value.imag
        if real == 0 or not (mp.isfinite(real) and mp.isfinite(imaginary)):
            return value
        apart = mp.mag(real) - mp.mag(imaginary)
        if abs(apart) <= 4 * mp.prec:
            return value
        self.absorbed = True
        return real if apart > 0 else mp.mpc(0, imaginary)


def _names(symbol: str, name: str) -> bool:
    return name in symbol.partition("_")[2].split()


def _has_degrees(node: Node) -> bool:
    return node.kind == "degrees" or any(map(_has_degrees, node.parts))


_METHODS: dict[str, Callable[[Evaluator, Node], Number]] = {
    "number": Evaluator._number,
    "symbol": Evaluator._symbol,
    "constant": Evaluator._constant,
    "add": Evaluator._add,
    "multiply": Evaluator._multiply,
    "inverse": Evaluator._inverse,
    "-": Evaluator._minus,
    "power": Evaluator._power,
    "root": Evaluator._root,
    "factorial": Evaluator._factorial,
    "degrees": Evaluator._degrees,
    "percent": Evaluator._percent,
    "determinant": Evaluator._determinant,
    "sum": Evaluator._repeated,
    "prod": Evaluator._repeated,
    "call": Evaluator._call,
}
