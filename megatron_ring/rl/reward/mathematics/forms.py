"""Forms that say the same: points with a name, members of a set, transposed rows, families over the whole numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_ring.rl.reward.mathematics.equal import has_value, has_value_somewhere
from megatron_ring.rl.reward.mathematics.numbers import WORK, Budget, TooExpensive
from megatron_ring.rl.reward.mathematics.residue import has_symbols, symbols
from megatron_ring.rl.reward.mathematics.shapes import (
    is_measured_in_parts,
    is_name,
    is_scalar,
    listed,
    outer_unit,
)
from megatron_ring.rl.reward.mathematics.text import Unreadable
from megatron_ring.rl.reward.mathematics.words import Node

_POINT = re.compile(r"[A-Z]'*(?:_\w+)?")
_FUNCTION = re.compile(r"(.+)\((\w) ?\)")
_CONSTANTS = ("c", "k", "K", "text{c}", "text{k}", "text{constant}", "text{const}")
_INTEGERS = ("mathbb{Z}", "Z")


def standard(node: Node) -> Node:
    r"""``P(1,2)`` as ``(1,2)``, ``x\in\{1,2\}`` as the set, ``(x,y)=(1,2),(3,4)`` as points, ``[[1],[2]]`` as a matrix."""
    parts = node.parts
    if node.kind == "relation" and node.name == "in" and is_name(parts[0]) and parts[1].kind == "set":
        return parts[1]
    if node.kind == "multiply" and len(parts) == 2 and _POINT.fullmatch(parts[0].name):
        return parts[1] if parts[0].kind == "symbol" and _is_row(parts[1], "()") else node
    if node.kind == "power" and parts[1] == Node("symbol", name="T"):
        return _transposed(parts[0]) if parts[0].kind in ("tuple", "matrix") else node
    if _is_row(node, "[]") and all(_is_row(part, "[]") for part in parts):
        same_length = len({len(part.parts) for part in parts}) == 1
        return Node("matrix", tuple(Node("row", part.parts) for part in parts)) if same_length else node
    if node.kind == "list" and _is_equation(parts[0]):
        name, first = parts[0].parts
        if (
            name.kind == "tuple"
            and is_name(name)
            and all(_is_row(part, "()") for part in (first, *parts[1:]))
        ):
            return Node("list", (first, *parts[1:]), name=node.name)
    return node


def _is_equation(node: Node) -> bool:
    return node.kind == "relation" and node.name == "=" and len(node.parts) == 2


def _is_row(node: Node, brackets: str) -> bool:
    return node.kind == "tuple" and node.name == brackets and len(node.parts) > 1


def _transposed(node: Node) -> Node:
    if node.kind == "tuple":
        return Node("tuple", node.parts, name="()")
    columns = zip(*(row.parts for row in node.parts), strict=True)
    return Node("matrix", tuple(Node("row", column) for column in columns))


def renamed(node: Node, old: str, new: str) -> Node:
    """``node`` with another name for one of its symbols."""
    name = new if node.kind == "symbol" and node.name == old else node.name
    parts = tuple(renamed(part, old, new) for part in node.parts)
    return Node(node.kind, parts, name, node.number, node.digits)


def families(wanted: Node, given: Node) -> tuple[Node, Node]:
    r"""Both sides without ``k\\in\\mathbb{Z}``, which an answer may leave out, and with one name for the whole number."""
    (a, k), (b, n) = _family(wanted), _family(given)
    if k and n and k != n and k not in symbols(b):
        b = renamed(b, n, k)
    return a, b


def _family(node: Node) -> tuple[Node, str]:
    if node.kind == "list" and len(node.parts) == 2:
        value, domain = node.parts
        if domain.kind == "relation" and domain.name == "in" and domain.parts[1].name in _INTEGERS:
            name = domain.parts[0].name
            if domain.parts[0].kind == "symbol" and name in symbols(value):
                return value, name
    return node, ""


def lone_members(wanted: Node, given: Node, budget: Budget) -> tuple[Node, Node]:
    r"""Both sides, a set of one number or point as that where the other side is no set: ``\\{5\\}`` for 5."""
    return _lone(wanted, given, budget), _lone(given, wanted, budget)


def _lone(node: Node, other: Node, budget: Budget) -> Node:
    is_one = is_scalar(other) or _is_row(other, "()") or _is_equation(other)
    if node.kind != "set" or len(node.parts) != 1 or not is_one:
        return node
    member = node.parts[0]
    is_value = is_scalar(member) and has_value(member, budget)
    return member if is_value or _is_row(member, "()") else node


def one_argument(wanted: Node, given: Node) -> Node:
    """``f(y)=y`` or ``y=x`` with the names of ``f(x)=x``, where both define one function."""
    left, right = (_FUNCTION.fullmatch(node.parts[0].name) for node in (wanted, given))
    names = {node.parts[0].name for node, function in ((wanted, left), (given, right)) if function is None}
    used = symbols(wanted.parts[1]) | symbols(given.parts[1])
    argument = left or right
    if names == {"y"} and "y" not in used and argument is not None and used <= {argument[2]}:
        return Node("relation", (wanted.parts[0], *given.parts[1:]), "=")
    if (
        left is None
        or right is None
        or left[1] != right[1]
        or left[2] == right[2]
        or left[2] in symbols(given)
    ):
        return given
    return Node("relation", (wanted.parts[0], *(renamed(p, right[2], left[2]) for p in given.parts[1:])), "=")


def one_constant(wanted: Node, given: Node) -> Node:
    """``x+c`` with the name of the constant in ``x+C``."""
    constant = Node("symbol", name="C")
    if wanted.kind != "add" or constant not in wanted.parts or given.kind != "add" or "C" in symbols(given):
        return given
    others = [part.name for part in given.parts if part.kind == "symbol" and part.name in _CONSTANTS]
    if len(others) != 1 or others[0] in symbols(wanted):
        return given
    return renamed(given, others[0], "C")


def residue_class(node: Node) -> tuple[Node, Node] | None:
    r"""Residue and modulus of ``x\\equiv 2\\pmod 5``, ``2\\pmod 5`` and ``x\\equiv 2\\mod 5``."""
    parts = node.parts
    if node.kind == "congruence":
        return parts[0], parts[1].parts[0]
    if node.kind == "relation" and node.name == "equiv" and is_name(parts[0]):
        if len(parts) == 3 and parts[2].kind == "modulus":
            return parts[1], parts[2].parts[0]
        if len(parts) == 2 and parts[1].kind == "call" and parts[1].name == "mod":
            return parts[1].parts[0], parts[1].parts[1]
    return None


def spelled(node: Node) -> str:
    """Digits and letters that were parsed as a product, as they were written."""
    if node.kind == "multiply":
        return "".join(map(spelled, node.parts))
    if node.kind == "number" and node.number is not None:
        return node.name or str(node.number)
    return node.name.upper() if node.kind in ("symbol", "constant") else "?"


def scalars_of(node: Node) -> Iterator[Node]:
    """The scalar trees that a comparison would evaluate."""
    node = outer_unit(listed(standard(node)))
    if node.kind == "ellipsis":
        return
    if is_scalar(node) and not is_measured_in_parts(node):
        yield node
        return
    for part in node.parts:
        yield from scalars_of(part)


def check(node: Node) -> None:
    """Evaluate a reference as a comparison would. Raises Unreadable if it has no value or costs too much."""
    budget = Budget()
    for part in scalars_of(node):
        if not has_symbols(part):
            if not has_value(part, budget):
                raise Unreadable("it has no value")
        elif not has_value_somewhere(part, budget):
            raise Unreadable("it has no value at any point")
        if budget.left < 0.6 * WORK:
            raise TooExpensive("it takes more work than a reference may")
