"""Shapes of answers: what a tree contains beside its value (names, units), and the values in it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from mpmath import mp

from megatron_ring.rl.reward.mathematics.equal import number_of
from megatron_ring.rl.reward.mathematics.numbers import Budget
from megatron_ring.rl.reward.mathematics.region import ZERO, bare_symbol
from megatron_ring.rl.reward.mathematics.residue import symbols
from megatron_ring.rl.reward.mathematics.tokens import repeating
from megatron_ring.rl.reward.mathematics.units import scaled
from megatron_ring.rl.reward.mathematics.words import Node

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def listed(node: Node) -> Node:
    """Both values of a plus-minus, as a list."""
    target = node.parts[-1] if node.kind == "relation" and node.name == "=" else node
    if not _has_plus_minus(target) or target.kind in ("list", "tuple", "set"):
        return node
    return Node("list", (_signed(node, True), _signed(node, False)), name="or")


def outer_unit(node: Node) -> Node:
    """``3\\times 10^8\\text{ m}`` with its unit around the whole, not around its last factor."""
    if node.kind not in ("ratio", "multiply", "-", "add", "inverse"):
        return node
    last = outer_unit(node.parts[-1])
    if last.kind != "unit" or any(part.kind == "unit" for part in node.parts[:-1]):
        return node
    inner = Node(node.kind, (*node.parts[:-1], last.parts[0]), node.name)
    return Node("unit", (inner,), name=last.name)


def in_full(node: Node) -> Node:
    """``5\\text{ million dollars}`` as ``5000000\\text{ dollars}``."""
    if node.kind != "unit":
        return node
    factor, rest = scaled(node.name)
    if factor == 1:
        return node
    return Node(
        "unit", (Node("multiply", (node.parts[0], Node("number", number=Fraction(factor)))),), name=rest
    )


def turned(degrees: Node) -> Node:
    """An angle of so many degrees, in radians."""
    return Node(
        "multiply", (degrees.parts[0], Node("constant", name="pi"), Node("number", number=Fraction(1, 180)))
    )


def _has_plus_minus(node: Node) -> bool:
    return node.kind in ("pm", "mp") or any(map(_has_plus_minus, node.parts))


def _signed(node: Node, upper: bool) -> Node:
    if node.kind in ("pm", "mp"):
        inner = _signed(node.parts[0], upper)
        return inner if (node.kind == "pm") == upper else Node("-", (inner,))
    if not node.parts:
        return node
    parts = tuple(_signed(part, upper) for part in node.parts)
    return Node(node.kind, parts, node.name, node.number, node.digits)


def continued(node: Node) -> list[Node]:
    """The values that ``0.333...`` may have: repeating digits, or a truncated decimal."""
    if node.kind != "ellipsis":
        return [node]
    head, point, tail = node.name.partition(".")
    found = [Node("number", number=node.number, digits=node.digits)]
    for length in range(1, len(tail) // 2 + 1):
        block = tail[-length:]
        if tail[-2 * length : -length] == block:
            found.append(Node("number", number=repeating(f"{head}{point}{tail[:-length]}", block)))
            break
    return found


def is_about(node: Node) -> bool:
    return node.kind == "relation" and "~" in node.name.split()


def about_values(node: Node, budget: Budget) -> list[Node]:
    """``a = b \\approx c`` answers with its exact value or with the decimal, if the decimal is within a hundredth."""
    if not is_about(node):
        return [node]
    names = node.name.split()
    cut = names.index("~")
    exact = Node("relation", node.parts[: cut + 1], " ".join(names[:cut])) if cut else node.parts[0]
    if cut + 2 != len(node.parts):
        return [exact]
    value, decimal = number_of(node.parts[cut], budget), number_of(node.parts[-1], budget)
    if cut == 0 and is_name(node.parts[0]):
        return [node.parts[-1]]
    if value is None or decimal is None:
        return [exact]
    with mp.workdps(20):
        apart = abs(mp.mpf(1) * float(value) - float(decimal))
        if apart > 0.5 and apart > abs(float(value)) / 20:
            return []  # a claim that is false is no answer
        near = apart <= abs(float(value)) / 100
    return [exact, node.parts[-1]] if near else [exact]


def is_scalar(node: Node) -> bool:
    return node.kind not in (
        *(
            "relation",
            "builder",
            "cup",
            "cap",
            "setminus",
            "set",
            "tuple",
            "list",
            "matrix",
            "ratio",
            "based",
        ),
        *("unit", "ellipsis", "percent", "degrees", "modulus", "congruence", "pm", "mp", "beside", "row"),
    )


def is_measured_in_parts(node: Node) -> bool:
    r"""Whether it is a length or a time in several units: ``1\text{ hour }30\text{ minutes}``."""
    return node.kind == "multiply" and all(part.kind == "unit" for part in node.parts)


def is_clock(node: Node) -> bool:
    hours, minutes = node.parts[0].number, node.parts[1].number
    return (
        hours is not None
        and minutes is not None
        and hours.denominator == minutes.denominator == 1
        and 0 <= hours <= 24
        and (10 <= minutes < 60 or bool(node.parts[1].name))
    )


def is_equation(node: Node) -> bool:
    return node.kind == "relation" and set(node.name.split()) == {"="}


def assigned(node: Node, loose: bool) -> Node | None:
    """The value that an equation gives to a name; None if the equation has to be solved first.

    ``loose``, as an answer is read, lets ``a+b=5`` and ``1+1=2`` name the value of an expression.
    """
    if not is_equation(node):
        return None
    left, value = node.parts[0], node.parts[-1]
    if is_name(left):
        return value
    names = symbols(left)
    if left.kind == "call" and names and node.parts[1:] and not symbols(value):
        return value  # sin x = 1/2 gives the value of sin x
    return value if loose and (len(names) > 1 or not (names or symbols(value))) else None


def is_name(node: Node) -> bool:
    """Is a left side only a name? ``x``, ``(x, y)``, ``AB``, ``V_1:V_2``, ``|AB|``."""
    if node.kind in ("tuple", "list", "set", "multiply", "inverse", "ratio") or (
        node.kind == "call" and node.name == "abs"
    ):
        return bool(node.parts) and all(map(is_name, node.parts))
    return bare_symbol(node)


def _stem(name: Node) -> str:
    return name.name.partition("_")[0] if bare_symbol(name) else repr(name)


def unnamed(a: Sequence[Node], b: Sequence[Node]) -> tuple[Sequence[Node], Sequence[Node], bool]:
    """Both lists without names that only one of them has, and whether their order counts.

    ``x_1=2, x_2=3`` names the values of one unknown, ``x=2, y=3`` those of two.
    """
    values = [[assigned(part, loose=False) for part in parts] for parts in (a, b)]
    named = [all(value is not None for value in row) for row in values]
    if named[0] == named[1] or any(part.kind == "relation" for part in (b if named[0] else a)):
        return a, b, False
    rows = [
        [v for v in row if v is not None] if name else parts
        for row, name, parts in zip(values, named, (a, b), strict=True)
    ]
    names = [_stem(part.parts[0]) for part in (a if named[0] else b)]
    if len(names) > 1 and "".join(sorted(names)) in _ALPHABET and sorted(names) != names:
        # y=2, x=1 is the point (1,2)
        row = int(not named[0])
        rows[row] = [
            value for _, value in sorted(zip(names, rows[row], strict=True), key=lambda pair: pair[0])
        ]
    return rows[0], rows[1], len(set(names)) > 1


def difference(a: Node, b: Node) -> Node:
    return a if b == ZERO else Node("add", (a, Node("-", (b,))))


def ascending(node: Node) -> tuple[Node, str]:
    """``l < r`` as what is below zero, and whether it may be zero."""
    left, right = node.parts
    if node.name.startswith(">"):
        left, right = right, left
    return difference(left, right), node.name[1:]
