"""Do two answers mean the same? Lists, tuples, sets, regions, relations, matrices and scalars.

Beside the value an answer may have a name to which it is assigned, a unit, or a sign of degrees. If only one side has it,
it is ignored; if both have it, it must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

from megatron_ring.rl.reward.mathematics.equal import (
    equal,
    number_of,
    proportional,
)
from megatron_ring.rl.reward.mathematics.forms import (
    families,
    one_argument,
    one_constant,
    residue_class,
    spelled,
    standard,
)
from megatron_ring.rl.reward.mathematics.numbers import Budget, TooExpensive
from megatron_ring.rl.reward.mathematics.region import REALS, bare_symbol, region_of, same_region
from megatron_ring.rl.reward.mathematics.residue import has_symbols
from megatron_ring.rl.reward.mathematics.shapes import (
    about_values,
    ascending,
    assigned,
    continued,
    difference,
    in_full,
    is_about,
    is_clock,
    is_equation,
    is_measured_in_parts,
    is_scalar,
    listed,
    outer_unit,
    turned,
    unnamed,
)
from megatron_ring.rl.reward.mathematics.text import Unreadable
from megatron_ring.rl.reward.mathematics.units import is_radian, same_unit
from megatron_ring.rl.reward.mathematics.words import Node

MAX_UNORDERED = 16
"""Most items without an exact value that are matched in any order."""
_RELATIONAL = frozenset(("relation", "builder", "cup", "cap", "setminus"))
_ORDERED = frozenset(["<", ">", "<=", ">="])


def same(wanted: Node, given: Node, budget: Budget) -> bool:
    """Does the answer ``given`` equal the reference ``wanted``? Raises Unreadable, or its subclass TooExpensive.

    Example: ``same(read("1,2"), read("x=2, x=1"), Budget())``.
    """
    budget.charge(1)
    if wanted == given:
        return True
    wanted, given = (outer_unit(listed(standard(node))) for node in families(wanted, given))
    if "ellipsis" in (wanted.kind, given.kind):
        return any(same(a, b, budget) for a in continued(wanted) for b in continued(given))
    if "unit" in (wanted.kind, given.kind):
        return _same_with_units(wanted, given, budget)
    if is_about(wanted) or is_about(given):
        return any(
            same(a, b, budget) for a in about_values(wanted, budget) for b in about_values(given, budget)
        )
    classes = residue_class(wanted), residue_class(given)
    if classes[0] is not None and classes[1] is not None:
        return _same_residues(classes[0], classes[1], budget)
    if "list" in (wanted.kind, given.kind):
        return _same_lists(wanted, given, budget)
    if wanted.kind in _RELATIONAL or given.kind in _RELATIONAL:
        return _same_relations(wanted, given, budget)
    if REALS in (wanted, given):
        return bool(_same_regions(wanted, given, budget))
    if "set" in (wanted.kind, given.kind):
        return wanted.kind == given.kind and _same_items(
            _distinct(wanted.parts, budget), _distinct(given.parts, budget), budget
        )
    if "tuple" in (wanted.kind, given.kind):
        return _same_tuples(wanted, given, budget)
    if "matrix" in (wanted.kind, given.kind):
        return wanted.kind == given.kind and _same_matrices(wanted, given, budget)
    if "ratio" in (wanted.kind, given.kind):
        return _same_ratios(wanted, given, budget)
    if "based" in (wanted.kind, given.kind):
        return _same_bases(wanted, given)
    if "congruence" in (wanted.kind, given.kind):
        values = [node.parts[0] if node.kind == "congruence" else node for node in (wanted, given)]
        return same(values[0], values[1], budget)
    if is_measured_in_parts(wanted) and is_measured_in_parts(given):
        return len(wanted.parts) == len(given.parts) and all(
            same(a, b, budget) and a.kind == b.kind for a, b in zip(wanted.parts, given.parts, strict=True)
        )
    if "beside" in (wanted.kind, given.kind):
        return False
    if wanted.kind == given.kind == "modulus":
        return same(wanted.parts[0], given.parts[0], budget)
    return _same_scalars(wanted, given, budget)


def _same_scalars(wanted: Node, given: Node, budget: Budget) -> bool:
    """A percent sign may be omitted, and may mean a hundredth; a degree sign may be omitted, and may be in radians."""
    if wanted.kind == given.kind and wanted.kind in ("percent", "degrees"):
        return equal(wanted.parts[0], given.parts[0], budget)
    for one, other in ((wanted, given), (given, wanted)):
        if one.kind == "percent":
            return equal(one, other, budget) or equal(one.parts[0], other, budget)
        if one.kind == "degrees":
            return equal(one.parts[0], other, budget) or equal(turned(one), other, budget)
    return equal(wanted, one_constant(wanted, given), budget)


def _same_with_units(wanted: Node, given: Node, budget: Budget) -> bool:
    """A unit may be omitted; if both sides have a known one, they must agree. An answer may omit "million"."""
    if in_full(wanted) != wanted and given.kind != "unit" and same(in_full(wanted).parts[0], given, budget):
        return True
    wanted, given = (wanted if given.kind != "unit" else in_full(wanted)), in_full(given)
    if wanted.kind == given.kind == "unit" and not same_unit(wanted.name, given.name):
        return False
    for node, other in ((wanted, given), (given, wanted)):
        if node.kind == "unit":
            same_unit(node.name, node.name)
            if other.kind == "degrees" and is_radian(node.name):
                return equal(turned(other), node.parts[0], budget)
    return same(
        wanted.parts[0] if wanted.kind == "unit" else wanted,
        given.parts[0] if given.kind == "unit" else given,
        budget,
    )


def _same_lists(wanted: Node, given: Node, budget: Budget) -> bool:
    """Several answers in any order; in order if the list ends with dots, or if the other side is a tuple."""
    for one, other in ((wanted, given), (given, wanted)):
        if other.kind in _RELATIONAL or any(part.kind == "relation" for part in one.parts):
            regions = _same_regions(wanted, given, budget)
            if regions is not None:
                return regions
            break
    a, b = _values(wanted), _values(given)
    a, b, ordered = unnamed(a, b)
    if not {wanted.name, given.name}.isdisjoint(("[]", "[)", "(]")) and len(a) == 2:
        return False  # an interval
    if ordered or "tuple" in (wanted.kind, given.kind):
        return len(a) == len(b) and all(same(x, y, budget) for x, y in zip(a, b, strict=True))
    if "set" in (wanted.kind, given.kind):
        return _same_items(_distinct(a, budget), _distinct(b, budget), budget)
    if any(part.name == "..." for part in (*a, *b)):
        return len(a) == len(b) and all(same(x, y, budget) for x, y in zip(a, b, strict=True))
    if all(part.kind == "tuple" for part in (*a, *b)):  # a point that is named twice is one point
        a, b = _distinct(a, budget), _distinct(b, budget)
    return _same_items(a, b, budget)


def _values(node: Node) -> tuple[Node, ...]:
    """The items of a list. ``x = 1 \\text{ or } 2`` names ``x`` for both items, and ``x = \\pm 1`` is two items."""
    if node.kind in ("tuple", "set"):
        return node.parts
    if node.kind != "list":
        value = assigned(node, loose=False)
        if value is not None and value.kind in ("list", "set", "tuple"):
            return value.parts
        return (node,)
    parts = tuple(item for part in node.parts for item in _items(part))
    names = {part.parts[0].name for part in parts if part.kind == "relation" and bare_symbol(part.parts[0])}
    first = parts[0]
    if len(names) == 1 and first.kind == "relation" and first.name == "=" and bare_symbol(first.parts[0]):
        return tuple(
            part
            if part.kind == "relation" or part.kind == "tuple"
            else Node("relation", (first.parts[0], part), "=")
            for part in parts
        )
    return parts


def _distinct(parts: Sequence[Node], budget: Budget) -> list[Node]:
    result: list[Node] = []
    seen: set[Node | Fraction] = set()
    for part in parts:
        value = number_of(part, budget) if is_scalar(part) else None
        key = value if isinstance(value, Fraction) else part
        if key not in seen:
            seen.add(key)
            result.append(part)
    others = [
        part for part in result if not isinstance(number_of(part, budget) if is_scalar(part) else 0, Fraction)
    ]
    if len(others) > MAX_UNORDERED:
        raise TooExpensive(f"more than {MAX_UNORDERED} members without an exact value")
    twice = [b for a, b in combinations(others, 2) if same(a, b, budget)]
    return [part for part in result if not any(part is other for other in twice)]


def _items(node: Node) -> tuple[Node, ...]:
    """The items that one item of a list stands for: both signs of a plus-minus, all values of one name, or itself."""
    node = listed(node)
    return (node,) if node.kind in ("tuple", "set") else _values(node)


def _same_items(a: Sequence[Node], b: Sequence[Node], budget: Budget) -> bool:
    """Do two lists have the same items in any order? Exact values are counted; others, which must be few, are matched."""
    if len(a) != len(b):
        return False
    left, right = [], []
    counts: Counter[Fraction] = Counter()
    exact: dict[Fraction, list[Node]] = {}
    for sign, parts, rest in ((1, a, left), (-1, b, right)):
        for part in parts:
            value = number_of(part, budget) if is_scalar(part) else None
            if isinstance(value, Fraction):
                counts[value] += sign
                exact.setdefault(value, []).append(part)
            else:
                rest.append(part)
    for value, count in counts.items():
        (left if count > 0 else right).extend(exact[value][:1] * abs(count))
    if len(left) > MAX_UNORDERED or len(right) > MAX_UNORDERED:
        # items without an equal partner differ, unless they are rounded decimals, of which no answer has so many
        if not any(count for count in counts.values()):
            raise TooExpensive(f"more than {MAX_UNORDERED} members without an exact value")
        return False
    for part in left:
        at = next((n for n, other in enumerate(right) if same(part, other, budget)), None)
        if at is None:
            return False
        right.pop(at)
    return not right


def _same_tuples(wanted: Node, given: Node, budget: Budget) -> bool:
    """Elementwise, with the same brackets; a matrix of one row or column is a tuple too."""
    if "matrix" in (wanted.kind, given.kind):
        matrix = wanted if wanted.kind == "matrix" else given
        if len(matrix.parts) > 1 and len(matrix.parts[0].parts) > 1:
            return False
        cells = tuple(cell for row in matrix.parts for cell in row.parts)
        wanted, given = (
            Node("tuple", cells, "()") if node.kind == "matrix" else node for node in (wanted, given)
        )
    if wanted.kind != given.kind or wanted.name.strip("<>") != given.name.strip("<>"):
        return False
    pairs = zip(wanted.parts, given.parts, strict=False)
    return len(wanted.parts) == len(given.parts) and all(same(a, b, budget) for a, b in pairs)


def _same_matrices(wanted: Node, given: Node, budget: Budget) -> bool:
    shapes = [(len(node.parts), len(node.parts[0].parts)) for node in (wanted, given)]
    return shapes[0] == shapes[1] and all(
        same(a, b, budget)
        for row, other in zip(wanted.parts, given.parts, strict=True)
        for a, b in zip(row.parts, other.parts, strict=True)
    )


def _same_ratios(wanted: Node, given: Node, budget: Budget) -> bool:
    """``2:4`` equals ``1:2`` and, with two numbers, a fraction; a possible time of day is compared as it is written."""
    if wanted.kind == given.kind == "ratio":
        if len(wanted.parts) != len(given.parts):
            return False
        if is_clock(wanted) or is_clock(given):
            return all(equal(a, b, budget) for a, b in zip(wanted.parts, given.parts, strict=True))
        a, b = wanted.parts, given.parts
        return all(
            equal(Node("multiply", (a[n], b[0])), Node("multiply", (b[n], a[0])), budget)
            for n in range(1, len(a))
        )
    ratio, other = (wanted, given) if wanted.kind == "ratio" else (given, wanted)
    if len(ratio.parts) != 2 or is_clock(ratio) or not is_scalar(other):
        return False
    return equal(Node("multiply", (ratio.parts[0], Node("inverse", ratio.parts[1:]))), other, budget)


def _same_residues(a: tuple[Node, Node], b: tuple[Node, Node], budget: Budget) -> bool:
    """``7`` and ``2`` are equal modulo ``5``; expressions without a value are compared as they are written."""
    if not same(a[1], b[1], budget):
        return False
    left, right, modulus = (number_of(node, budget) for node in (a[0], b[0], a[1]))
    if (
        isinstance(left, Fraction)
        and isinstance(right, Fraction)
        and isinstance(modulus, Fraction)
        and modulus
    ):
        return ((left - right) / modulus).denominator == 1
    return same(a[0], b[0], budget)


def _same_bases(wanted: Node, given: Node) -> bool:
    """``52_8`` is ``52_8``; without a base it is the same digits."""
    if wanted.kind == given.kind:
        return wanted == given
    based, other = (wanted, given) if wanted.kind == "based" else (given, wanted)
    return other == based.parts[0] or (
        based.parts[0].kind == "symbol" and spelled(other) == based.parts[0].name
    )


def _same_relations(wanted: Node, given: Node, budget: Budget) -> bool:
    if wanted.kind == given.kind == "relation" and is_equation(wanted) and is_equation(given):
        return _same_equations(wanted, given, budget)
    for node, other in ((wanted, given), (given, wanted)):
        if is_equation(node) and other.kind not in _RELATIONAL:
            value = assigned(node, loose=node is given)
            if node is given and not has_symbols(node) and not _holds(node, budget):
                return False
            return value is not None and (
                same(value, given, budget) if node is wanted else same(wanted, value, budget)
            )
    regions = _same_regions(wanted, given, budget)
    if regions is not None:
        return regions
    for node, other in ((wanted, given), (given, wanted)):
        if (
            node.kind == "relation"
            and node.name == "in"
            and other.kind != "relation"
            and bare_symbol(node.parts[0])
        ):
            return same(node.parts[1], other, budget)
    if wanted.kind == given.kind == "relation":
        return _same_inequalities(wanted, given, budget)
    if wanted.kind != given.kind or len(wanted.parts) != len(given.parts):
        return False
    if wanted.kind in ("cup", "cap"):
        return _same_items(wanted.parts, given.parts, budget)
    return all(same(a, b, budget) for a, b in zip(wanted.parts, given.parts, strict=True))


def _holds(equation: Node, budget: Budget) -> bool:
    """Whether ``1+1=2`` is true."""
    first, *others = equation.parts
    return all(same_quietly(first, other, budget) for other in others)


def _same_regions(wanted: Node, given: Node, budget: Budget) -> bool | None:
    """Are both the same region? None if one of them is no region. If both name their symbol, it must agree."""
    a, b = region_of(wanted, budget), region_of(given, budget)
    if a is None or b is None:
        return None
    if a[1] and b[1] and a[1] != b[1]:  # a>b is about a, and b<a about b
        return None if wanted.kind == given.kind == "relation" else False
    return same_region(a[0], b[0], budget)


def _same_equations(wanted: Node, given: Node, budget: Budget) -> bool:
    """The same name with the same value, or two equations of which one is a multiple of the other."""
    given = one_argument(wanted, given)
    (a, b), (c, d) = ((node.parts[0], node.parts[-1]) for node in (wanted, given))
    if bare_symbol(a) and bare_symbol(c):
        if a.name == c.name:
            return same(b, d, budget)
        if not (has_symbols(b) or has_symbols(d)):
            return False
    if same_quietly(a, c, budget) and same_quietly(b, d, budget):
        return True
    if all(map(is_scalar, (a, b, c, d))):
        return proportional(difference(a, b), difference(c, d), budget, positive=False)
    return False


def same_quietly(a: Node, b: Node, budget: Budget) -> bool:
    """As ``same``, but expressions without a value are not equal."""
    try:
        return same(a, b, budget)
    except TooExpensive:
        raise
    except Unreadable:
        return False


def _same_inequalities(wanted: Node, given: Node, budget: Budget) -> bool:
    a, b = wanted.name.split(), given.name.split()
    if len(a) != len(b) or len(wanted.parts) != len(given.parts):
        return False
    if a == b and all(same_quietly(x, y, budget) for x, y in zip(wanted.parts, given.parts, strict=True)):
        return True
    if len(a) == 1 and {*a, *b} <= _ORDERED and all(map(is_scalar, (*wanted.parts, *given.parts))):
        (left, strict), (right, other) = ascending(wanted), ascending(given)
        return strict == other and proportional(left, right, budget, positive=True)
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    if {*a, *b} <= _ORDERED and a == [turned[name] for name in reversed(b)]:
        return all(
            same_quietly(x, y, budget) for x, y in zip(wanted.parts, reversed(given.parts), strict=True)
        )
    if a == b and a[0] in ("!=", "perp", "parallel", "sim", "iff"):
        return all(
            same_quietly(x, y, budget) for x, y in zip(wanted.parts, reversed(given.parts), strict=True)
        )
    return False
