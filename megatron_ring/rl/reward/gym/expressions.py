"""Expressions as trees: a small grammar of numbers, names, ``+ - * / **``, brackets and functions of one argument.

Nothing is evaluated while it is read, and a tree is bounded in size and depth before anybody computes with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 4000
MAX_TOKENS = 1000
MAX_DEPTH = 30
MAX_TERMS = 2000
MAX_DEGREE = 500
MAX_BITS = 4000
"""Bits of a numerator or denominator."""

_TOKEN = re.compile(
    r"[ \t]*(?:(\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})|([A-Za-z_]\w*)|(\*\*|[-+*/()]))", re.ASCII
)

Polynomial = dict[tuple[int, ...], Fraction]
"""Coefficient of each monomial, by the exponents of the names. Example: 3*x**2 - 1 is ``{(2,): 3, (0,): -1}``."""


class Unreadable(Exception):
    """The text is no expression of this grammar, or too large."""


@dataclass(frozen=True, slots=True)
class Number:
    """Example: ``Number(Fraction(3, 2), "1.5")``."""

    value: Fraction
    text: str


@dataclass(frozen=True, slots=True)
class Name:
    """Example: ``Name("x")``."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """Example: x - 2 is ``Sum(((1, Name("x")), (-1, Number(2, "2"))))``."""

    terms: tuple[tuple[int, Node], ...]


@dataclass(frozen=True, slots=True)
class Product:
    """Example: x / 2 is ``Product(((1, Name("x")), (-1, Number(2, "2"))))``: factors and divisors."""

    factors: tuple[tuple[int, Node], ...]


@dataclass(frozen=True, slots=True)
class Power:
    """Example: x**2 is ``Power(Name("x"), Number(2, "2"))``."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call:
    """Example: sin(x) is ``Call("sin", Name("x"))``."""

    function: str
    argument: Node


Node = Number | Name | Sum | Product | Power | Call


def parse(
    text: str, *, names: Collection[str] = (), functions: Collection[str] = (), powers: bool = True
) -> Node:
    """The tree of ``text``, with Python's precedence. Raises Unreadable for any other name, function or sign."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    tokens: list[str] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"{text[position : position + 10]!r} is no part of an expression")
        number, name, sign = match.groups()
        if name is not None and name not in names and name not in functions:
            raise Unreadable(f"{name[:20]} is no name here")
        tokens.append(number or name or sign)
        position = match.end()
    if len(tokens) > MAX_TOKENS:
        raise Unreadable("too long")
    reader = _Reader(tokens, frozenset(functions), powers)
    tree = reader.sum(0)
    if reader.position != len(tokens):
        raise Unreadable("something follows the expression")
    return tree


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list[str], functions: frozenset[str], powers: bool) -> None:
        self.tokens = tokens
        self.functions = functions
        self.powers = powers
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"{token} is missing")

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        terms = [(1, self.product(depth))]
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            terms.append((sign, self.product(depth)))
        return terms[0][1] if len(terms) == 1 else Sum(tuple(terms))

    def product(self, depth: int) -> Node:
        factors = [(1, self.signed(depth))]
        while self.peek() in ("*", "/"):
            side = 1 if self.take() == "*" else -1
            factors.append((side, self.signed(depth)))
        return factors[0][1] if len(factors) == 1 else Product(tuple(factors))

    def signed(self, depth: int) -> Node:
        sign = 1
        signed = False
        while self.peek() in ("+", "-"):
            sign *= 1 if self.take() == "+" else -1
            signed = True
        tree = self.power(depth)
        return Sum(((sign, tree),)) if signed else tree

    def power(self, depth: int) -> Node:
        base = self.atom(depth)
        if self.peek() != "**":
            return base
        if not self.powers or depth > MAX_DEPTH:
            raise Unreadable("no powers here" if not self.powers else "nested too deep")
        self.take()
        return Power(base, self.signed(depth + 1))

    def atom(self, depth: int) -> Node:
        token = self.take()
        if token == "(":
            tree = self.sum(depth + 1)
            self.expect(")")
            return tree
        if token[:1].isdigit() or token[:1] == ".":
            return Number(Fraction(token if token[-1] != "." else token + "0"), token)
        if token in self.functions:
            self.expect("(")
            tree = Call(token, self.sum(depth + 1))
            self.expect(")")
            return tree
        if token == "" or not (token[0].isalpha() or token[0] == "_"):
            raise Unreadable("a number, a name or a bracket is missing")
        return Name(token)


def literals(tree: Node) -> list[Number]:
    """The numbers in a tree, as written. Example: of 1 + 2*2 those of 1, 2 and 2."""
    found: list[Number] = []
    stack: list[Node] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, Number):
            found.append(node)
        elif isinstance(node, Sum):
            stack.extend(term for _, term in node.terms)
        elif isinstance(node, Product):
            stack.extend(factor for _, factor in node.factors)
        elif isinstance(node, Power):
            stack.extend((node.base, node.exponent))
        elif isinstance(node, Call):
            stack.append(node.argument)
    return found


def value(tree: Node) -> Fraction:
    """The exact value of a tree without names. Raises Unreadable where it has none, or is too large."""
    polynomial = expand(tree, ())
    return polynomial.get((), Fraction(0))


def expand(tree: Node, names: tuple[str, ...]) -> Polynomial:
    """``tree`` as a polynomial in ``names`` with rational coefficients, like terms collected, zeros left out.

    Raises Unreadable if it is none (a division by a name, a function) or grows beyond the bounds of this module.
    """
    if isinstance(tree, Number):
        return _clean({(0,) * len(names): tree.value})
    if isinstance(tree, Name):
        if tree.name not in names:
            raise Unreadable(f"{tree.name} is no variable here")
        return {tuple(int(name == tree.name) for name in names): Fraction(1)}
    if isinstance(tree, Sum):
        total: Polynomial = {}
        for sign, term in tree.terms:
            for powers, coefficient in expand(term, names).items():
                total[powers] = total.get(powers, Fraction(0)) + sign * coefficient
        return _clean(total)
    if isinstance(tree, Product):
        result: Polynomial = {(0,) * len(names): Fraction(1)}
        for side, factor in tree.factors:
            other = expand(factor, names)
            result = _times(result, other if side > 0 else {(0,) * len(names): 1 / _constant(other)})
        return result
    if isinstance(tree, Power):
        return _to_the(expand(tree.base, names), _constant(expand(tree.exponent, names), zero=True))
    raise Unreadable(f"{tree.function} is no polynomial")


def _constant(polynomial: Polynomial, *, zero: bool = False) -> Fraction:
    if any(any(powers) for powers in polynomial) or (not polynomial and not zero):
        raise Unreadable("not a number, or zero")
    return next(iter(polynomial.values()), Fraction(0))


def _times(one: Polynomial, other: Polynomial) -> Polynomial:
    if len(one) * len(other) > MAX_TERMS:
        raise Unreadable("too many terms")
    result: Polynomial = {}
    for left, a in one.items():
        for right, b in other.items():
            powers = tuple(map(sum, zip(left, right, strict=True)))
            result[powers] = result.get(powers, Fraction(0)) + a * b
    return _clean(result)


def _to_the(base: Polynomial, exponent: Fraction) -> Polynomial:
    if exponent.denominator != 1 or not -64 <= exponent <= 64:
        raise Unreadable("an exponent that is no small whole number")
    if exponent < 0:
        size = len(next(iter(base), ()))
        return _to_the({(0,) * size: 1 / _constant(base)}, -exponent)
    result: Polynomial = {(0,) * len(next(iter(base), ())): Fraction(1)}
    for _ in range(int(exponent)):
        result = _times(result, base)
    return result


def _clean(polynomial: Polynomial) -> Polynomial:
    """``polynomial`` without zeros. Raises Unreadable if it is beyond the bounds."""
    kept = {powers: coefficient for powers, coefficient in polynomial.items() if coefficient}
    for powers, coefficient in kept.items():
        bits = max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length())
        if bits > MAX_BITS or sum(powers) > MAX_DEGREE:
            raise Unreadable("too large")
    if len(kept) > MAX_TERMS:
        raise Unreadable("too many terms")
    return kept
