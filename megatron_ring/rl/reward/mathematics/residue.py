"""Values of rational expressions modulo large primes: exact where the numbers themselves are too large to write.

Two different rational functions agree at a random residue with a chance of less than their degree over 2^127.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

from megatron_ring.rl.reward.mathematics.numbers import MAX_EXACT_FACTORIAL, Budget, Undefined
from megatron_ring.rl.reward.mathematics.value import Evaluator
from megatron_ring.rl.reward.mathematics.words import Node

PRIMES = (2**127 - 1, 2**521 - 1)


class NoResidue(ArithmeticError):
    """The tree is no rational function with integer exponents."""


def residue(node: Node, prime: int, budget: Budget) -> int:
    """The value of ``node`` modulo ``prime``, at a random residue for every symbol; raises :class:`NoResidue`.

    Example: ``residue(read("1/2"), 7, Budget()) == 4``.
    """
    budget.charge(1)
    parts, kind = node.parts, node.kind
    if kind == "number" and node.number is not None:
        return node.number.numerator * pow(node.number.denominator, -1, prime) % prime
    if kind == "symbol":
        return random.Random(f"{node.name}:{prime}").randrange(prime)
    if kind == "add":
        return sum(residue(part, prime, budget) for part in parts) % prime
    if kind == "multiply":
        value = 1
        for part in parts:
            value = value * residue(part, prime, budget) % prime
        return value
    if kind == "-":
        return -residue(parts[0], prime, budget) % prime
    if kind == "inverse":
        return _inverse(residue(parts[0], prime, budget), prime)
    if kind == "power":
        exponent = _whole(parts[1], budget)
        base = residue(parts[0], prime, budget)
        budget.charge(exponent.bit_length())
        # by Fermat, exponents count modulo prime - 1
        return pow(base if exponent >= 0 else _inverse(base, prime), abs(exponent) % (prime - 1), prime)
    if kind == "factorial":
        n = _whole(parts[0], budget)
        if 0 <= n <= MAX_EXACT_FACTORIAL:
            return math.factorial(n) % prime
    raise NoResidue(kind)


def _inverse(value: int, prime: int) -> int:
    if value % prime == 0:
        raise NoResidue("division by zero")
    return pow(value, -1, prime)


def _whole(node: Node, budget: Budget) -> int:
    """An exponent: an exact integer without symbols."""
    if has_symbols(node):
        raise NoResidue("a symbol in an exponent")
    try:
        value = Evaluator(budget, 15).value(node)
    except Undefined as error:
        raise NoResidue(str(error)) from error
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise NoResidue("an exponent that is not whole")
    return value.numerator


def has_symbols(node: Node) -> bool:
    """Whether a symbol stands anywhere in ``node``."""
    return bool(symbols(node))


def symbols(node: Node) -> frozenset[str]:
    """Names of the symbols that a tree depends on.

    Example: ``symbols(read("x_1+2y")) == {"x_1", "y"}``.
    """
    if node.kind == "symbol":
        return frozenset((node.name,))
    found = frozenset[str]().union(*map(symbols, node.parts))
    return found - {node.parts[0].name} if node.kind in ("sum", "prod") else found
