"""Our own scorers of reasoning-gym's data sets; none of them evaluates an answer.

The package's scorers give 1 for junk around the answer, for ``nan``, or for numbers that the problem does not have. Nine of
them pass the answer to ``eval`` or sympy, and four pass the problem's file. So the package only generates the problems. Our
scorers accept what the package's rightly accept at full score: spaces, list spacing, signs and zeros of numbers, other
solutions of a puzzle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from megatron_ring.rl.reward.gym import calculus as gym_calculus
from megatron_ring.rl.reward.gym import puzzles as gym_puzzles
from megatron_ring.rl.reward.gym.expressions import (
    Name,
    Number,
    Power,
    Product,
    Sum,
    Unreadable,
    expand,
    literals,
    parse,
    value,
)
from megatron_ring.rl.reward.gym.readers import (
    grid,
    grid_of,
    json_value,
    last_place,
    number,
    numbers,
    prefixed,
    ratio,
    rational,
    rounded,
    same,
    whole,
)

Entry = Mapping[str, Any]
MAX_VARIABLES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """How one data set's answer is read.

    Example: ``Scorer(how="a whole number", right=by_whole)``.
    """

    how: str
    right: Callable[[str, Entry], bool]
    """Is the answer right? Raises only if the entry is damaged."""
    reads: tuple[str, ...] = ()
    """Keys of the entry's metadata that the scorer needs."""
    found: str = ""
    """The fault of the package's own scorer, if it has one."""


def by_text(answer: str, entry: Entry) -> bool:
    return answer.strip() == str(entry["answer"]).strip()


def by_digits(answer: str, entry: Entry) -> bool:
    # the package writes zero as an empty text
    own = entry["answer"].strip()
    return answer.strip() in (own, own or "0")


def by_folded(answer: str, entry: Entry) -> bool:
    return answer.strip().casefold() == str(entry["answer"]).strip().casefold()


def by_squeezed(answer: str, entry: Entry) -> bool:
    return "".join(answer.split()).casefold() == "".join(entry["answer"].split()).casefold()


def by_words(answer: str, entry: Entry) -> bool:
    return answer.casefold().split() == entry["answer"].casefold().split()


def by_grid(answer: str, entry: Entry) -> bool:
    return grid(answer) == grid(entry["answer"])


def by_json(answer: str, entry: Entry) -> bool:
    wanted = json_value(entry["answer"])
    return by_text(answer, entry) or (wanted is not None and same(json_value(answer), wanted))


def by_list(answer: str, entry: Entry) -> bool:
    given, wanted = (json_value(text, single_quotes=True) for text in (answer, entry["answer"]))
    return by_text(answer, entry) or (isinstance(wanted, list) and same(given, wanted))


def by_decimal(answer: str, entry: Entry) -> bool:
    given = number(answer)
    return given is not None and given == _wanted(entry["answer"])


def _wanted(text: Any) -> Fraction:
    found = rational(str(text))
    if found is None:
        raise ValueError(f"{str(text)[:60]!r} is no number")
    return found


def by_whole(answer: str, entry: Entry) -> bool:
    given = number(answer)
    return given is not None and given == whole(str(entry["answer"]))


def by_money(answer: str, entry: Entry) -> bool:
    # the question forbids units; a currency sign, a percent sign and a last full stop do not change the value
    text = _bare(answer.strip(), "$", "$").replace("\\$", "$").replace("\\%", "%").removesuffix(".").strip()
    sign = "-" if text[:1] == "-" else ""
    given = number(sign + text.removeprefix("-").strip().lstrip("$€£").removesuffix("%").strip())
    return given is not None and given == _wanted(entry["answer"])


def _bare(text: str, opening: str, closing: str) -> str:
    """``text`` without the signs around it. Example: ``_bare("(1)", "(", ")") == "1"``."""
    around = len(text) > 2 and text[0] == opening and text[-1] == closing
    return text[1:-1].strip() if around else text


def by_near(answer: str, entry: Entry) -> bool:
    places = entry["metadata"]["decimal_places"]
    if not isinstance(places, int) or not 0 <= places <= 50:
        raise ValueError(f"decimal_places={str(places)[:20]} must be from 0 to 50")
    given, wanted = number(answer), _wanted(entry["answer"])
    # one unit of the last place of the problem's own numbers, as in the package, but never more than the value
    return given is not None and abs(given - wanted) <= min(Fraction(1, 10**places), abs(wanted) / 1000)


def by_probability(answer: str, entry: Entry) -> bool:
    exact = entry["metadata"]["rational"]
    given, wanted = rational(answer), Fraction(exact["numerator"], exact["denominator"])
    if given is None or given in (0, 1) or ratio(answer) is not None:
        # a fraction must be exact, and so must 0 and 1, unless the package itself rounds to them
        return given == wanted or by_text(answer, entry)
    # to four places and three significant digits at least, and to all that are given
    return abs(given - wanted) <= min(Fraction(1, 10**4), wanted / 200, last_place(answer))


def by_significant(answer: str, entry: Entry) -> bool:
    given = number(answer)
    return given is not None and not rounded(given, 3).isdisjoint(rounded(_wanted(entry["answer"]), 3))


def by_candidate(answer: str, entry: Entry) -> bool:
    given = number(answer)
    wanted, others = entry["metadata"]["solution"], entry["metadata"]["candidates"]
    if given is None or abs(given - Fraction(wanted)) >= Fraction(1, 100):
        return False
    return all(abs(given - Fraction(wanted)) <= abs(given - Fraction(other)) for other in others)


def by_base(answer: str, entry: Entry) -> bool:
    given = prefixed(answer)
    return given is not None and given == prefixed(entry["answer"])


def by_fraction(answer: str, entry: Entry) -> bool:
    sides = ratio(answer)
    metadata = entry["metadata"]
    wanted = (metadata["simplified_numerator"], metadata["simplified_denominator"])
    return sides is not None and (whole(sides[0]), whole(sides[1])) == wanted


_COMPLEX = re.compile(r"([+-]?[\d.]+(?![\d.]*[ij]))?(?:([+-]?)([\d.]*)\*?[ij])?", re.IGNORECASE | re.ASCII)


def by_complex(answer: str, entry: Entry) -> bool:
    text = _bare("".join(answer.split()), "(", ")")
    match = _COMPLEX.fullmatch(text) if 0 < len(text) <= 200 else None
    if match is None or (match[1] and match[3] is not None and not match[2]):
        return False
    real = number(match[1]) if match[1] else Fraction(0)
    imaginary = number(match[2] + (match[3] or "1")) if match[3] is not None else Fraction(0)
    return [real, imaginary] == [Fraction(part) for part in entry["metadata"]["result"]]


def by_roots(answer: str, entry: Entry) -> bool:
    if not entry["answer"].strip():
        return answer.strip() in ("", '""', "''")
    given, wanted = numbers(answer), numbers(entry["answer"])
    if wanted is None:
        raise ValueError(f"answer={entry['answer'][:60]!r} is no list of numbers")
    if given is None or len(given) != len(wanted):
        return False
    # the four places that are asked for, rounded either way
    return all(abs(a - b) <= Fraction(1, 10**4) for a, b in zip(sorted(given), sorted(wanted), strict=True))


def by_sorted(answer: str, entry: Entry) -> bool:
    given = json_value(answer, single_quotes=True)
    if not isinstance(given, list) or not all(type(item) in (str, int, Decimal) for item in given):
        return False
    return [number(str(item)) for item in given] == [
        _wanted(item) for item in entry["metadata"]["sorted_numbers"]
    ]


def by_life(answer: str, entry: Entry) -> bool:
    wanted = json_value(entry["answer"])
    if not isinstance(wanted, list):
        raise ValueError("answer is no JSON list")
    return same(json_value(answer), wanted)


def by_anagrams(answer: str, entry: Entry) -> bool:
    given = json_value(answer)
    if not isinstance(given, list) or not all(isinstance(group, list) for group in given):
        return False
    if not all(isinstance(word, str) for group in given for word in group):
        return False
    return sorted(map(sorted, given)) == sorted(map(sorted, entry["metadata"]["solution"]))


def by_listed_words(answer: str, entry: Entry) -> bool:
    return [word.strip() for word in answer.split(",")] == [
        word.strip() for word in entry["answer"].split(",")
    ]


def by_palindrome(answer: str, entry: Entry) -> bool:
    letters = answer.strip().casefold()
    return letters == letters[::-1] and sorted(letters) == sorted(entry["metadata"]["letters"])


def by_primes(answer: str, entry: Entry) -> bool:
    given, wanted = (
        sorted(str(whole(factor)) for factor in re.split(r"\u00d7|\\times|\*", text))
        for text in (answer, entry["answer"])
    )
    return "None" not in given and given == wanted


def by_sorted_words(answer: str, entry: Entry) -> bool:
    return [word.strip() for word in answer.split(",")] == entry["metadata"]["sorted_words"]


def by_board(answer: str, entry: Entry) -> bool:
    return grid(answer) in [grid(board) for board in entry["metadata"]["valid_answers"]]


def by_output(answer: str, entry: Entry) -> bool:
    return grid_of(answer, whole) == [list(row) for row in entry["metadata"]["output"]]


def by_survo(answer: str, entry: Entry) -> bool:
    return grid_of(answer, whole) == entry["metadata"]["solution"]


def by_kakurasu(answer: str, entry: Entry) -> bool:
    lines = [re.sub(r"[\s,]", "", line) for line in answer.splitlines() if line.strip()]
    if not all(re.fullmatch("[01]+", line) for line in lines):
        return False
    return gym_puzzles.kakurasu([[int(cell) for cell in line] for line in lines], entry["metadata"])


def by_pool(answer: str, entry: Entry) -> bool:
    given, wanted = grid_of(answer, number), grid_of(entry["answer"], number)
    if wanted is None:
        raise ValueError("answer is no matrix")
    if given is None or [len(row) for row in given] != [len(row) for row in wanted]:
        return False
    # two places, rounded either way
    return all(
        abs(a - b) <= Fraction(1, 100)
        for row, other in zip(given, wanted, strict=True)
        for a, b in zip(row, other, strict=True)
    )


_ROLE = re.compile(r"(\w+) is (?:an? )?(\w+)")


def _roles(text: str) -> set[tuple[str, str]] | None:
    """(name, role) pairs of sentences such as "X is a knight"; None for any other text, or if a name occurs twice."""
    clean = " ".join(re.sub(r"[.,()]", " ", text.casefold()).split())
    pairs = [_ROLE.fullmatch(part) for part in re.split(r" and |(?<=\w) (?=\w+ is )", clean)]
    found = {(pair[1], pair[2]) for pair in pairs if pair is not None}
    names = {name for name, _ in found}
    return found if len(found) == len(pairs) == len(names) else None


def by_knights(answer: str, entry: Entry) -> bool:
    given = _roles(answer)
    return given is not None and given == _roles(entry["answer"])


_CLOCK = r"(\d{1,6}):(\d{1,2})(?::(\d{1,2}(?:\.\d{1,6})?))?"
_DURATION = re.compile(rf"(?:(-?\d{{1,7}})(?: days?)?|(?:(-?\d{{1,7}}) days?, *)?{_CLOCK})", re.ASCII)


def _seconds(text: str) -> tuple[bool, Fraction] | None:
    """(has a time of day, seconds) of ``3 days``, ``04:05:06.7`` or both."""
    match = _DURATION.fullmatch(text.strip().casefold())
    if match is None:
        return None
    days, more, hours, minutes, seconds = match.groups()
    total = 86400 * int(days or more or 0) + 3600 * int(hours or 0) + 60 * int(minutes or 0)
    return hours is not None, total + Fraction(seconds or 0)


def by_interval(answer: str, entry: Entry) -> bool:
    given = _seconds(answer)
    return given is not None and given == _seconds(entry["answer"])


def by_calendar(answer: str, entry: Entry) -> bool:
    return by_whole(answer, entry) if whole(entry["answer"]) is not None else by_folded(answer, entry)


def by_geometry(answer: str, entry: Entry) -> bool:
    task = entry["metadata"]["task_type"]
    given, wanted = (
        _bare(text.replace("^\\circ", "").replace("°", "").strip(), "(", ")").split(",")
        for text in (answer, entry["answer"])
    )
    # half of the last place that the answer is given to
    slack = Fraction(1, 200) if task == "angle_measure" else Fraction(1, 2000)
    values = list(map(number, given))
    return len(given) == len(wanted) and all(
        value is not None and abs(value - _wanted(other)) <= slack
        for value, other in zip(values, wanted, strict=True)
    )


def _arithmetic(answer: str, available: list[int], target: int) -> bool:
    """Is the answer an expression of + - * / and brackets that uses exactly these integers and equals the target?"""
    try:
        tree = parse(answer, powers=False)
        used = literals(tree)
        if not all(literal.text.isdigit() for literal in used):
            return False
        return sorted(int(literal.text) for literal in used) == sorted(available) and value(tree) == target
    except Unreadable:
        return False


def by_countdown(answer: str, entry: Entry) -> bool:
    return _arithmetic(answer, entry["metadata"]["numbers"], entry["metadata"]["target"])


def by_game24(answer: str, entry: Entry) -> bool:
    return _arithmetic(answer, entry["metadata"]["numbers"], 24)


def by_expanded(answer: str, entry: Entry) -> bool:
    names = tuple(sorted(set(re.findall(r"[A-Za-z]\w*", entry["answer"]))))
    if len(names) > MAX_VARIABLES:
        raise ValueError(f"answer={entry['answer'][:60]!r} has more than {MAX_VARIABLES} variables")
    try:
        wanted = expand(parse(entry["answer"], names=names), names)
    except Unreadable as error:
        raise ValueError(f"answer={entry['answer'][:60]!r} is no polynomial: {error}") from None
    try:
        tree = parse(answer, names=names)
        return _is_flat(tree) and expand(tree, names) == wanted
    except Unreadable:
        return False


def _is_flat(tree: Any, inside: bool = False) -> bool:
    """Is a tree a sum of products of numbers, names and their powers? The unexpanded problem is no answer."""
    if isinstance(tree, Sum):
        return (not inside or len(tree.terms) == 1) and all(_is_flat(term, True) for _, term in tree.terms)
    if isinstance(tree, Product):
        return all(_is_flat(factor, True) for _, factor in tree.factors)
    if isinstance(tree, Power):
        return isinstance(tree.base, Number | Name) and isinstance(tree.exponent, Number)
    return isinstance(tree, Number | Name)


def by_integral(answer: str, entry: Entry) -> bool:
    metadata = entry["metadata"]
    # some of the package's own answers contain an unevaluated integral; other answers may not
    right = gym_calculus.is_antiderivative(answer, metadata["integrand"], metadata["variable"])
    return right or by_text(answer, entry)


def by_puzzle(play: Callable[[str, Mapping[str, Any]], bool]) -> Callable[[str, Entry], bool]:
    return lambda answer, entry: play(answer, entry["metadata"])
