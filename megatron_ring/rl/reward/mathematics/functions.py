"""Functions of numbers by name and number of arguments; each checks its cost before it is evaluated."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Protocol

from mpmath import mp

from megatron_ring.rl.reward.mathematics.numbers import (
    MAX_EXACT_FACTORIAL,
    Budget,
    Number,
    Undefined,
    bits,
    is_real,
)


class Arithmetic(Protocol):
    """What a function needs of the evaluator that calls it (``value.Evaluator``)."""

    budget: Budget

    def gamma(self, value: Number) -> Number: ...
    def inexact(self, value: Number) -> Number: ...
    def integer(self, value: Number, rounding: Callable[[Number], Number]) -> Fraction: ...
    def plus(self, a: Number, b: Number) -> Number: ...
    def power(self, base: Number, exponent: Number) -> Number: ...
    def real_function(self, name: str, value: Number) -> Number: ...
    def times(self, a: Number, b: Number) -> Number: ...


def _binomial(at: Arithmetic, n: Number, k: Number) -> Number:
    if isinstance(k, Fraction) and k.denominator == 1 and 0 <= k <= 300:
        top = reduce(at.times, (at.plus(n, Fraction(-j)) for j in range(int(k))), Fraction(1))
        return at.times(top, 1 / Fraction(math.factorial(int(k))))
    if isinstance(n, Fraction) and n.denominator == 1 and isinstance(k, Fraction) and n >= 0:
        if k.denominator == 1 and (k < 0 or k > n):
            return Fraction(0)
        if k.denominator == 1 and n - k <= 300:
            return _binomial(at, n, n - k)
    bottom = at.times(at.gamma(k), at.gamma(at.plus(n, -k)))
    return at.times(at.gamma(n), 1 / bottom)


def _log(at: Arithmetic, value: Number, base: Number | None = None) -> Number:
    if value == 0:
        raise Undefined("a logarithm of zero")
    if base is None:
        return at.real_function("log", value)
    return at.real_function("log", value) / at.real_function("log", base)


def _integers(combine: Callable[[int, int], int]) -> Callable[..., Number]:
    def function(at: Arithmetic, *values: Number) -> Number:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise Undefined("only integers have it")
        at.budget.charge(sum((bits(value) / 500) ** 2 for value in values))
        return Fraction(reduce(combine, (value.numerator for value in values)))

    return function


def _largest(pick: Callable[..., Number]) -> Callable[..., Number]:
    def function(at: Arithmetic, *values: Number) -> Number:
        if not all(map(is_real, values)):
            raise Undefined("not real")
        return pick(values, key=at.inexact)

    return function


def _double_factorial(at: Arithmetic, value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_EXACT_FACTORIAL:
        raise Undefined("no double factorial")
    return Fraction(reduce(operator.mul, range(int(value), 1, -2), 1))


def _modulo(at: Arithmetic, value: Number, by: Number) -> Number:
    if not (isinstance(value, Fraction) and isinstance(by, Fraction)):
        raise Undefined("no remainder")
    return value % by


def _sign_of(at: Arithmetic, value: Number) -> Number:
    if not is_real(value):
        raise Undefined("not real")
    return Fraction((value > 0) - (value < 0))


TURNING = frozenset(["cis", "sin", "cos", "tan", "cot", "sec", "csc"])
MPMATH = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arccot": "acot",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}


def _elementary(name: str) -> Callable[..., Number]:
    return lambda at, value: at.real_function(name, value)


def _angle(at: Arithmetic, value: Number) -> Number:
    if value == 0:
        raise Undefined("zero has no angle")
    return mp.arg(at.inexact(value))


FUNCTIONS: dict[tuple[str, int], Callable[..., Number]] = {
    **{
        (name, 1): _elementary(name)
        for name in (*(TURNING - {"cis"}), *MPMATH, "exp", "sinh", "cosh", "tanh", "coth")
    },
    ("cis", 1): lambda at, value: at.plus(
        at.real_function("cos", value), mp.mpc(0, 1) * at.real_function("sin", value)
    ),
    ("ln", 1): _log,
    ("log", 1): _log,
    ("log", 2): _log,
    ("lg", 1): lambda at, value: _log(at, value, Fraction(10)),
    ("abs", 1): lambda at, value: abs(value),
    ("floor", 1): lambda at, value: at.integer(
        value, math.floor if isinstance(value, Fraction) else mp.floor
    ),
    ("ceil", 1): lambda at, value: at.integer(value, math.ceil if isinstance(value, Fraction) else mp.ceil),
    ("cbrt", 1): lambda at, value: at.power(value, Fraction(1, 3)),
    ("sign", 1): _sign_of,
    ("Re", 1): lambda at, value: mp.re(at.inexact(value)),
    ("Im", 1): lambda at, value: mp.im(at.inexact(value)),
    ("arg", 1): _angle,
    ("binom", 2): _binomial,
    ("mod", 2): _modulo,
    ("double factorial", 1): _double_factorial,
    ("max", 0): _largest(max),
    ("min", 0): _largest(min),
    ("gcd", 0): _integers(math.gcd),
    ("lcm", 0): _integers(math.lcm),
}
