"""Sets of real numbers: intervals, their unions, and the inequalities that describe them.

A region is a list of intervals in order, of which no two touch; an interval is (low, closed, high, closed), and a point
is an interval from itself to itself. Ends may hold symbols as long as no order among them is needed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from megatron_ring.rl.reward.mathematics.equal import equal, less
from megatron_ring.rl.reward.mathematics.numbers import Budget, TooExpensive
from megatron_ring.rl.reward.mathematics.residue import has_symbols
from megatron_ring.rl.reward.mathematics.words import Node

INFINITY = Node("constant", name="infty")
MINUS_INFINITY = Node("-", (INFINITY,))
REALS = Node("symbol", name="mathbb{R}")
MAX_INTERVALS = 40
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


class Interval(NamedTuple):
    """Numbers between two ends.

    Example: ``Interval(zero, True, INFINITY, False)`` for ``[0, \\infty)``.
    """

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


Region = list[Interval]
EVERYTHING: Region = [Interval(MINUS_INFINITY, False, INFINITY, False)]


def region_of(node: Node, budget: Budget) -> tuple[Region, str] | None:
    """The region that ``node`` describes and its symbol (empty for a set); None if it describes none.

    Example: ``x<3`` gives ``([Interval(MINUS_INFINITY, False, three, False)], "x")``.
    """
    if node.kind == "tuple" and len(node.parts) == 2 and node.name in ("()", "(]", "[)", "[]"):
        low, high = node.parts
        return ([Interval(low, node.name[0] == "[", high, node.name[1] == "]")], "")
    if node.kind == "set":
        return _union([[_point(part)] for part in node.parts], budget), ""
    if node == REALS:
        return EVERYTHING, ""
    if node.kind in ("cup", "cap", "setminus"):
        return _combined(node, budget)
    if node.kind == "builder":
        return _built(node, budget)
    if node.kind == "relation":
        return _of_relation(node, budget)
    if node.kind == "list" and (
        any(part.kind == "relation" and part.name != "=" for part in node.parts)
        or all(part.kind == "tuple" for part in node.parts)
    ):
        return _of_list(node, budget)
    return None


def same_region(a: Region, b: Region, budget: Budget) -> bool:
    """Whether two regions have the same intervals."""
    return len(a) == len(b) and all(
        x.low_closed == y.low_closed
        and x.high_closed == y.high_closed
        and equal(x.low, y.low, budget)
        and equal(x.high, y.high, budget)
        for x, y in zip(a, b, strict=True)
    )


def bare_symbol(node: Node) -> bool:
    """Whether ``node`` is one symbol and nothing else."""
    return node.kind == "symbol"


def _point(node: Node) -> Interval:
    return Interval(node, True, node, True)


def _combined(node: Node, budget: Budget) -> tuple[Region, str] | None:
    parts = [region_of(part, budget) for part in node.parts]
    regions = [part[0] for part in parts if part is not None]
    if len(regions) != len(parts):
        return None
    if node.kind == "cup":
        return _union(regions, budget), ""
    if node.kind == "setminus":
        regions = [regions[0], *(_complement(region, budget) for region in regions[1:])]
    result = regions[0]
    for region in regions[1:]:
        result = _intersection(result, region, budget)
    return result, ""


def _built(node: Node, budget: Budget) -> tuple[Region, str] | None:
    """``\\{x : ...\\}`` and ``\\{x \\in \\mathbb{R} : ...\\}``."""
    variable, condition = node.parts
    if variable.kind == "relation" and variable.name == "in" and variable.parts[1].name == "mathbb{R}":
        variable = variable.parts[0]
    found = region_of(condition, budget)
    if found is None or not bare_symbol(variable) or found[1] != variable.name:
        return None
    return found[0], ""


def _of_relation(node: Node, budget: Budget) -> tuple[Region, str] | None:
    names = node.name.split()
    if names == ["in"] and bare_symbol(node.parts[0]):
        found = region_of(node.parts[1], budget)
        return None if found is None or found[1] else (found[0], node.parts[0].name)
    if not set(names) <= set(_FLIPPED) or len(node.parts) != len(names) + 1:
        return None
    at = next((n for n, part in enumerate(node.parts) if bare_symbol(part)), None)
    if at is None:
        return None
    symbol = node.parts[at]
    if any(_mentions(part, symbol) for n, part in enumerate(node.parts) if n != at):
        return None
    if len(names) > 2 or (len(names) == 2 and (at != 1 or set(names) & {"=", "!="})):
        return None
    result = EVERYTHING
    for n, name in enumerate(names):
        turned, end = (_FLIPPED[name], n) if n + 1 == at else (name, n + 1)  # a < x is x > a
        bound = _half_line(turned, node.parts[end])
        result = bound if result is EVERYTHING else _intersection(result, bound, budget)
    return result, symbol.name


def _half_line(name: str, end: Node) -> Region:
    if name in ("<", "<="):
        return [Interval(MINUS_INFINITY, False, end, name == "<=")]
    if name in (">", ">="):
        return [Interval(end, name == ">=", INFINITY, False)]
    if name == "=":
        return [_point(end)]
    return [Interval(MINUS_INFINITY, False, end, False), Interval(end, False, INFINITY, False)]


def _of_list(node: Node, budget: Budget) -> tuple[Region, str] | None:
    """Inequalities of one symbol: ``or`` is a union, ``and`` an intersection; a comma is a union of disjoint regions."""
    parts = [region_of(part, budget) if part.kind in ("relation", "tuple") else None for part in node.parts]
    found = [part for part in parts if part is not None]
    names = {name for _, name in found if name}
    if len(found) != len(parts) or len(names) > 1:
        return None
    regions = [region for region, _ in found]
    if any(part.kind == "tuple" for part in node.parts):  # intervals side by side, whatever joins them
        return _union(regions, budget), "".join(names)
    if not names:
        return None
    narrowed = regions[0]
    for region in regions[1:]:
        narrowed = _intersection(narrowed, region, budget)
    joined = node.name == "or" or (node.name == "," and not narrowed)
    return (_union(regions, budget) if joined else narrowed), "".join(names)


def _mentions(node: Node, symbol: Node) -> bool:
    return node == symbol or any(_mentions(part, symbol) for part in node.parts)


def _union(regions: list[Region], budget: Budget) -> Region:
    intervals = [interval for region in regions for interval in region]
    if len(intervals) > MAX_INTERVALS:
        raise TooExpensive(f"more than {MAX_INTERVALS} intervals")
    if len(intervals) < 2 or any(has_symbols(i.low) or has_symbols(i.high) for i in intervals):
        return intervals
    result: Region = []
    for interval in _sorted(intervals, budget):
        last = result[-1] if result else None
        if last is None or not _touch(last, interval, budget):
            result.append(interval)
            continue
        if less(last.high, interval.high, budget):
            high, closed = interval.high, interval.high_closed
        else:
            high = last.high
            closed = last.high_closed or (interval.high_closed and equal(high, interval.high, budget))
        low_closed = last.low_closed or (interval.low_closed and equal(last.low, interval.low, budget))
        result[-1] = Interval(last.low, low_closed, high, closed)
    return result


def _sorted(intervals: Region, budget: Budget) -> Region:
    """By their lower ends; where these are equal, the closed one first."""
    result: Region = []
    for interval in intervals:
        at = len(result)
        while at and _before(interval, result[at - 1], budget):
            at -= 1
        result.insert(at, interval)
    return result


def _before(a: Interval, b: Interval, budget: Budget) -> bool:
    if less(a.low, b.low, budget):
        return True
    return a.low_closed and not b.low_closed and equal(a.low, b.low, budget)


def _touch(a: Interval, b: Interval, budget: Budget) -> bool:
    """Is there no gap between an interval and a later one?"""
    if less(b.low, a.high, budget):
        return True
    return equal(a.high, b.low, budget) and (a.high_closed or b.low_closed)


def _intersection(a: Region, b: Region, budget: Budget) -> Region:
    if len(a) * len(b) > MAX_INTERVALS:
        raise TooExpensive(f"more than {MAX_INTERVALS} intervals")
    pairs = [_overlap(x, y, budget) for x in a for y in b]
    return [pair for pair in pairs if pair is not None]


def _overlap(a: Interval, b: Interval, budget: Budget) -> Interval | None:
    low, low_closed = _tighter((a.low, a.low_closed), (b.low, b.low_closed), MINUS_INFINITY, budget, True)
    high, high_closed = _tighter((a.high, a.high_closed), (b.high, b.high_closed), INFINITY, budget, False)
    if less(high, low, budget) or (equal(high, low, budget) and not (low_closed and high_closed)):
        return None
    return Interval(low, low_closed, high, high_closed)


def _tighter(
    a: tuple[Node, bool], b: tuple[Node, bool], open_end: Node, budget: Budget, low: bool
) -> tuple[Node, bool]:
    if a[0] == open_end:
        return b
    if b[0] == open_end:
        return a
    if equal(a[0], b[0], budget):
        return a[0], a[1] and b[1]
    return b if bool(less(a[0], b[0], budget)) == low else a


def _complement(region: Region, budget: Budget) -> Region:
    result: Region = []
    low, low_closed = MINUS_INFINITY, False
    for interval in region:
        if interval.low != MINUS_INFINITY:
            result.append(Interval(low, low_closed, interval.low, not interval.low_closed))
        low, low_closed = interval.high, not interval.high_closed
    if low != INFINITY:
        result.append(Interval(low, low_closed, INFINITY, False))
    return result


ZERO = Node("number", number=Fraction(0))
