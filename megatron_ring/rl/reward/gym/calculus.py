"""Verify an antiderivative: compare its derivative with the integrand at several points, to forty digits.

The derivative is computed together with the value (dual numbers), so nothing is simplified, and the cost is that of
evaluating the expression a few times. Every intermediate value is bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megatron_ring.rl.reward.gym.expressions import (
    Call,
    Name,
    Node,
    Number,
    Power,
    Product,
    Sum,
    Unreadable,
    parse,
)

_DIGITS = 40
_LARGEST = 1e60
_LARGEST_EXPONENT = 120.0
_CONSTANTS = ("E", "pi", "C", "c", "K", "k")
"""Euler's number and pi, as sympy names them, and the constant of integration."""
FUNCTIONS = (
    *("sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "Abs", "abs"),
)

_POINTS = (
    *("0.0131", "0.0517", "0.1931", "0.2897", "0.6113", "1.3719", "2.2189", "-0.1173", "-0.8311"),
    *("5.3317", "11.717", "23.911", "61.337", "151.73", "-5.331", "-23.911", "-61.337"),
)
_WANTED_POINTS = 8
_FEWEST_POINTS = 3


def is_antiderivative(answer: str, integrand: str, variable: str) -> bool:
    """Whether the derivative of ``answer`` is ``integrand``, both functions of ``variable``; C is constant.

    Example: ``is_antiderivative("x**2/2 + C", "x", "x")``. An answer that is no expression of the grammar is wrong, and
    so is an integral left standing. Raises ValueError if that is so of the integrand.
    """
    places = samples(integrand, variable)
    try:
        tree = _parse(answer, variable)
        return all(_close(_dual(tree, variable, place)[1], wanted) for place, wanted in places)
    except (Unreadable, ArithmeticError, ValueError):
        return False


@functools.lru_cache(maxsize=512)
def samples(integrand: str, variable: str) -> list[tuple[Any, Any]]:
    """Points and values of the integrand there. Raises ValueError if it cannot be read, or has no real values."""
    if variable in ("E", "pi", *FUNCTIONS) or not variable.isidentifier():
        raise ValueError(f"variable={variable[:20]!r} is a constant or no name")
    try:
        tree = _parse(integrand, variable)
    except Unreadable as error:
        raise ValueError(f"integrand={integrand[:60]!r} is no expression: {error}") from None
    places: list[tuple[Any, Any]] = []
    for point in map(_context().mpf, _POINTS):
        try:
            wanted = _dual(tree, variable, point)[0]
        except (Unreadable, ArithmeticError, ValueError):
            continue
        if wanted.imag == 0:
            places.append((point, wanted))
        if len(places) == _WANTED_POINTS:
            break
    if len(places) < _FEWEST_POINTS:
        raise ValueError(f"integrand={integrand[:60]!r} has no real values at enough points")
    return places


def _parse(text: str, variable: str) -> Node:
    return parse(text, names=(variable, *_CONSTANTS), functions=FUNCTIONS)


@functools.cache
def _context() -> Any:
    """An mpmath context of our own, so that settings of other code do not change results."""
    import mpmath

    context = mpmath.MPContext()
    context.dps = _DIGITS
    return context


@functools.cache
def _constants() -> Mapping[str, Any]:
    context = _context()
    # the constant of integration may be any number: take one that no expression equals by chance
    constant = context.mpc("0.73908513321516064")
    return dict.fromkeys(_CONSTANTS, constant) | {"E": context.mpc(context.e), "pi": context.mpc(context.pi)}


def _close(given: Any, wanted: Any) -> bool:
    return abs(given - wanted) <= abs(wanted) * 1e-18 + 1e-30


def _checked(value: Any) -> Any:
    # NaN is refused too: no comparison with it holds
    if not abs(value) <= _LARGEST:
        raise Unreadable("too large")
    return value


def _dual(tree: Node, variable: str, at: Any) -> tuple[Any, Any]:
    """Value and derivative of ``tree`` at one point."""
    context = _context()
    zero = context.mpc(0)
    if isinstance(tree, Number):
        return context.mpc(tree.value.numerator) / tree.value.denominator, zero
    if isinstance(tree, Name):
        return (context.mpc(at), context.mpc(1)) if tree.name == variable else (_constants()[tree.name], zero)
    if isinstance(tree, Sum):
        parts = [(sign, *_dual(term, variable, at)) for sign, term in tree.terms]
        return (
            _checked(sum((sign * value for sign, value, _ in parts), zero)),
            _checked(sum((sign * slope for sign, _, slope in parts), zero)),
        )
    if isinstance(tree, Product):
        value, slope = context.mpc(1), zero
        for side, factor in tree.factors:
            other, change = _dual(factor, variable, at)
            if side > 0:
                value, slope = value * other, slope * other + value * change
            else:
                value, slope = value / other, (slope * other - value * change) / (other * other)
            value, slope = _checked(value), _checked(slope)
        return value, slope
    if isinstance(tree, Power):
        return _power(_dual(tree.base, variable, at), _dual(tree.exponent, variable, at))
    return _call(tree, variable, at)


def _power(base: tuple[Any, Any], exponent: tuple[Any, Any]) -> tuple[Any, Any]:
    context = _context()
    (u, du), (v, dv) = base, exponent
    if u == 0:
        raise Unreadable("a power of zero")
    logarithm = context.log(u)
    if abs(v) > _LARGEST_EXPONENT or abs(v * logarithm) > _LARGEST_EXPONENT:
        raise Unreadable("too large")
    whole = v.imag == 0 and v.real == int(v.real)
    value = context.power(u, int(v.real)) if whole else context.exp(v * logarithm)
    return _checked(value), _checked(value * (dv * logarithm + v * du / u))


def _call(tree: Call, variable: str, at: Any) -> tuple[Any, Any]:
    context = _context()
    u, du = _dual(tree.argument, variable, at)
    name = tree.function.replace("arc", "a").lower()
    if name == "abs":
        if u.imag != 0 or u == 0:
            raise Unreadable("the absolute value of no real number")
        return context.mpc(abs(u.real)), du if u.real > 0 else -du
    # exp, and what grows like it off the real axis
    grows = max(abs(u.real), abs(u.imag)) if name in ("exp", "sinh", "cosh", "tanh") else abs(u.imag)
    if grows > _LARGEST_EXPONENT:
        raise Unreadable("too large")
    one = context.mpc(1)
    if name in ("log", "ln"):
        value, slope = context.log(u), one / u
    elif name == "sqrt":
        value = context.sqrt(u)
        slope = one / (2 * value)
    else:
        value = getattr(context, name)(u)
        slope = _SLOPES[name](context, u, value)
    return _checked(value), _checked(slope * du)


_SLOPES: Mapping[str, Any] = {
    "sin": lambda context, u, value: context.cos(u),
    "cos": lambda context, u, value: -context.sin(u),
    "tan": lambda context, u, value: 1 + value * value,
    "exp": lambda context, u, value: value,
    "asin": lambda context, u, value: 1 / context.sqrt(1 - u * u),
    "acos": lambda context, u, value: -1 / context.sqrt(1 - u * u),
    "atan": lambda context, u, value: 1 / (1 + u * u),
    "sinh": lambda context, u, value: context.cosh(u),
    "cosh": lambda context, u, value: context.sinh(u),
    "tanh": lambda context, u, value: 1 - value * value,
}
"""Derivatives of the functions, given argument and value."""
