"""Mathematics and science: the answer in the last box against the reference, by value (Ring-lite, arXiv 2506.14731).

No text of a model is ever evaluated: our own grammar parses an answer into a tree (``text``, ``tokens``, ``reader``), and
trees are compared (``compare``) by arithmetic whose cost is known in advance (``value``). An answer that is too expensive
to decide counts as wrong, with that reason; nothing hangs.

Ambiguous texts are read as follows:

- Boxes that only ``or``, ``and`` or a comma joins are one answer with several values; earlier boxes do not count.
- A word is compared as a word: as a product, ``yes`` would be y*e*s and equal ``sey``.
- The letter of a choice may be written with its text; the reference decides which of them is compared.
- ``1,234`` is a number or a list, ``3e-2`` a power of ten or ``3*e-2``: whichever makes both sides agree.
- In science, a reference that is one letter from A to J is a choice, and only its letter is compared.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.reward.answers import answer_part, boxed_answer, last_boxed, unboxed
from megatron_ring.rl.reward.mathematics import choices
from megatron_ring.rl.reward.mathematics.text import MAX_ANSWER_CHARS, TEXT, Unreadable, plain, word_list
from megatron_ring.rl.types import RewardResult

if TYPE_CHECKING:
    from megatron_ring.rl.reward.mathematics.words import Node

_INTEGER = re.compile(r"[+-]? ?\d{1,300}")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3}){1,30}")
_RATIONAL = re.compile(
    r"([+-]?)(?:(\d{1,300})/(\d{1,300})|\\frac\{(\d{1,300})\}\{(\d{1,300})\}|(\d{0,100}\.\d{1,100}))"
)
_WORD = re.compile(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+)*")
_SHORT_WORDS = frozenset(
    word_list("no yes odd even none all one two six ten red true zero dne up down left both")
)
_MATHEMATICAL = frozenset(
    word_list(
        "sin cos tan cot sec csc log exp sqrt cbrt arcsin arccos arctan sinh cosh tanh asin acos "
        "atan max min gcd lcm abs floor ceil alpha beta gamma delta epsilon zeta theta iota kappa "
        "lambda sigma omega infinity infty"
    )
)
_IN_BRACKETS = re.compile(r"\((?:\s*[+-]?\d+\s*,)+\s*[+-]?\d+\s*\)")
"""``(32,348)`` is a pair, not a number with a thousands separator."""
_AMBIGUOUS_COMMA = re.compile(r"\d,\d{3}(?!\d)")
_AMBIGUOUS_EXPONENT = re.compile(r"(?<![\d.])\d+[eE][+-]?\d")
_UNIT = r"[A-Za-z]{1,4}(?:\^\{?-?\d\}?)?"
_LOOSE_UNIT = re.compile(
    rf"(.*\d\}}*)(?: (?P<plain>[A-Za-z]{{1,3}})|\s*(?P<joined>{_UNIT}(?:/{_UNIT})+))", re.DOTALL
)
"""``5 m`` and ``5m/s``: letters after a number that may be a unit or symbols."""


_TEXT_COMMANDS_WORDS = (
    "text mathrm mathbf frac dfrac sqrt prime odot oplus otimes hbar dagger ast star nabla partial cdot times dot ddot "
    "vec hat bar left right pi theta alpha beta gamma delta lambda mu nu omega phi psi rho sigma tau Delta Omega"
)
_TEXT_COMMANDS = frozenset(_TEXT_COMMANDS_WORDS.split())
_DEEPEST_TEXT = 20
_NO_ANSWER = frozenset(("nan", "null", "n/a", "<na>"))
"""Markers of a missing value in tables."""
_ABOUT_ANSWER = re.compile(r"####|<<[^<>]*>>|\banswers?\b|^\[['\"]", re.IGNORECASE)
"""GSM8K's worked solutions, sentences such as "The answer is 3", and lists that Python printed."""


def verify_math(prompt: Prompt, text: str) -> RewardResult:
    """1 if the last box of ``text`` is equal in value to ``prompt.reference["answer"]``."""
    return _verify(_reference(prompt), text, science=False)


def verify_science(prompt: Prompt, text: str) -> RewardResult:
    """As :func:`verify_math`; if the reference is the letter of a choice, 1 if the last box names that choice."""
    reference = _reference(prompt)
    wanted = choices.CHOICE.fullmatch(reference)
    if wanted is None or len(reference) > 3:
        return _verify(reference, text, science=True)
    box = last_boxed(answer_part(text))
    if box is None:
        return _no_box()
    try:
        answer = plain(box)
    except Unreadable as error:
        return _unreadable(str(error))
    given = choices.named(answer)
    if given is None:
        return _unreadable(f"no choice in the box: {answer[:60]}")
    return _result(given == wanted[1].upper(), answer)


@functools.cache
def load() -> None:
    """Import what comparing needs, and compute constants that a process needs once."""
    importlib.import_module("megatron_ring.rl.reward.mathematics.compare")


def check_reference(answer: str) -> str | None:
    """Why no answer could equal this reference, in a few words; None if it can be verified.

    Examples: ``check_reference("3/4") is None``, ``check_reference("") == "it is empty"``.
    """
    return _problem(str(answer), science=False)


def check_science_reference(answer: str) -> str | None:
    """As :func:`check_reference`, for the domain of science."""
    return _problem(str(answer), science=True)


def _problem(answer: str, science: bool) -> str | None:
    if _INTEGER.fullmatch(answer):
        return None
    try:
        reference = plain(unboxed(answer) or "")
        if not reference:
            return "it is empty"
        if reference.casefold() in _NO_ANSWER:
            return f"{answer[:40]!r} says that there is none; write the answer, or remove the line"
        if _exact(reference) is not None or _is_word(reference) or choices.LETTER.fullmatch(reference):
            return None
        if science and choices.CHOICE.fullmatch(reference) and len(reference) <= 3:
            return None
        if _ABOUT_ANSWER.search(reference) or _ABOUT_ANSWER.search(answer):
            return f"more than the answer: {answer[-40:]!r}; write it alone (of GSM8K, what follows ####)"
        labelled = choices.labelled(reference)
        load()
        value = labelled[1] if labelled else reference
        if not _readings(value, loose_units=science) and _is_text(value):
            return None
        _worth(value)
    except Unreadable as error:
        return f"{str(error) or 'it cannot be read'}: {answer[:40]!r}"
    return None


def _worth(reference: str) -> None:
    """Parse and evaluate a reference once. Raises Unreadable if that is not possible."""
    from megatron_ring.rl.reward.mathematics.forms import check

    check(_read(reference))


def _reference(prompt: Prompt) -> str:
    reference = unboxed(str(prompt.reference["answer"]))
    try:
        reference = plain(reference or "")
    except Unreadable as error:
        raise ValueError(f"problem {prompt.uid}: the reference answer cannot be read: {error}") from error
    if not reference:
        raise ValueError(f"problem {prompt.uid} has an empty reference answer")
    return reference


def _verify(reference: str, text: str, science: bool) -> RewardResult:
    box = boxed_answer(answer_part(text))
    if box is None:
        return _no_box()
    try:
        answer = plain(box)
    except Unreadable as error:
        return _unreadable(str(error))
    if not answer:
        return _unreadable(f"a box of 0 characters; 1 to {MAX_ANSWER_CHARS} are read")
    if answer == reference:
        return _result(True, answer)
    wanted, given = _exact(reference), _exact(answer)
    if wanted is not None and given is not None and not (_is_long(reference) or _is_long(answer)):
        return _result(wanted == given, answer)
    if (chosen := choices.choice(reference, answer)) is not None:
        if isinstance(chosen, bool):
            return _result(chosen, answer)
        reference, answer = chosen
        if reference == answer:
            return _result(True, answer)
    if _is_word(reference):
        return _result(_as_word(reference) == _as_word(answer), answer)
    return _by_value(reference, answer, science)


def _by_value(reference: str, answer: str, science: bool) -> RewardResult:
    load()
    from megatron_ring.rl.reward.mathematics.compare import same
    from megatron_ring.rl.reward.mathematics.forms import lone_members
    from megatron_ring.rl.reward.mathematics.numbers import Budget, TooExpensive

    if (letter := choices.LETTER.fullmatch(reference)) is not None:
        reference = letter[1] or letter[2]
    wanted = _readings(reference, loose_units=science)
    if not wanted and _is_text(reference):
        return _result(_as_text(reference) == _as_text(answer), answer)
    if not wanted:
        why = _problem(reference, science)
        if why is None:
            why = "it cannot be read"
        raise ValueError(f"the reference answer cannot be verified: {why}")
    given = _readings(answer, loose_units=True)
    if not given:
        return _unreadable(f"cannot read {answer[:60]}: {_why(answer)}")
    if _IN_BRACKETS.fullmatch(answer):
        wanted = wanted[:1]  # 32,348 may be meant as a list, but a pair does not say so
    reason = ""
    budget = Budget()
    for a in wanted:
        for b in given:
            try:
                if same(*lone_members(a, b, budget), budget):
                    return _result(True, answer)
            except TooExpensive as error:
                return RewardResult(score=0.0, status="wrong", detail=f"{answer[:40]}: {error}")
            except Unreadable as error:
                reason = str(error)
    if reason:
        return _unreadable(f"{answer[:40]}: {reason}")
    return _result(False, answer)


def _readings(text: str, loose_units: bool) -> list[Node]:
    """The possible trees of a text, the most likely first; empty if it cannot be parsed."""
    options: list[dict[str, bool]] = [{}]
    if _IN_BRACKETS.fullmatch(text):
        options = [{"grouped": False}]
    elif _AMBIGUOUS_COMMA.search(text):
        options.append({"grouped": False})
    if _AMBIGUOUS_EXPONENT.search(text):
        options.append({"scientific": False})
    found: list[Node] = []
    for option in options:
        try:
            found.append(_read(text, **option))
        except Unreadable:
            continue
    unit = _LOOSE_UNIT.fullmatch(text)
    if unit is not None and (loose_units or unit["joined"]):
        with contextlib.suppress(Unreadable):
            found.extend(_with_unit(_read(unit[1].strip()), unit["plain"] or unit["joined"]))
    return found


def _read(text: str, **options: bool) -> Node:
    from megatron_ring.rl.reward.mathematics.reader import read

    return read(text, **options)


def _with_unit(node: Node, unit: str) -> list[Node]:
    from megatron_ring.rl.reward.mathematics.units import is_measure
    from megatron_ring.rl.reward.mathematics.words import Node

    return [Node("unit", (node,), name=unit)] if is_measure(unit) else []


def _why(answer: str) -> str:
    try:
        _read(answer)
    except Unreadable as error:
        return str(error)
    return ""


def _exact(answer: str) -> Fraction | None:
    """The value of an integer, a fraction of two, or a short decimal: what most answers are."""
    if _INTEGER.fullmatch(answer):
        return Fraction(int(answer.replace(" ", "")))
    if _GROUPED.fullmatch(answer):
        return Fraction(int(answer.replace(",", "")))
    match = _RATIONAL.fullmatch(answer)
    if match is None:
        return None
    sign = -1 if match[1] == "-" else 1
    top, bottom = match[2] or match[4], match[3] or match[5]
    if top is None:
        return sign * Fraction(match[6])
    return None if int(bottom) == 0 else sign * Fraction(int(top), int(bottom))


def _is_long(answer: str) -> bool:
    """Does a decimal have enough digits to stand for the value that it was rounded from?"""
    return "." in answer and len(answer) > 6


def _as_word(answer: str) -> str:
    return " ".join(re.sub(r"[\\{}.,!]", " ", TEXT.sub(r" \1 ", answer)).casefold().split())


def _is_word(reference: str) -> bool:
    """Is a reference prose in Latin letters, which is compared as text?"""
    bare = TEXT.sub(r" \1 ", reference).strip() if "\\" in reference else reference
    match = _WORD.fullmatch(bare)
    if match is None or not all(c.isascii() or "\u00c0" <= c <= "\u024f" for c in bare):
        return False
    words = re.split(r"[ '-]+", bare.casefold())
    if set(words) & _MATHEMATICAL:
        return False
    name = len(bare) == 3 and bare[0].isupper() and bare[1:].islower()
    return name or max(map(len, words)) > 3 or any(word in _SHORT_WORDS for word in words)


def _is_text(reference: str) -> bool:
    """Is a reference that our grammar does not parse complete, so that an answer can be compared with it as text?

    Examples: ``4:30 p.m.`` and ``y^{\\prime}+ry=0`` are, ``甲`` and ``\\frac{1}{`` are not.
    """
    depth = deepest = 0
    for mark in re.findall(r"[({\[\])}]", reference):
        depth += 1 if mark in "({[" else -1
        deepest = max(deepest, depth if depth >= 0 else _DEEPEST_TEXT + 1)
    known = all(command in _TEXT_COMMANDS for command in re.findall(r"\\([A-Za-z]+)", reference))
    return (
        depth == 0
        and deepest <= _DEEPEST_TEXT
        and known
        and reference.isascii()
        and re.search(r"[0-9A-Za-z]", reference) is not None
        and re.search(r"</?[A-Za-z]", reference) is None
    )


def _as_text(answer: str) -> str:
    """Without fonts, spaces and capitals."""
    return re.sub(r"\s|~|\\[,;:! ]", "", TEXT.sub(r" \1 ", answer)).casefold()


def _no_box() -> RewardResult:
    return _unreadable("no closed \\boxed{} at the end of the answer")


def _unreadable(why: str) -> RewardResult:
    return RewardResult(score=0.0, status="parse_error", detail=why[:200])


def _result(right: bool, answer: str) -> RewardResult:
    if right:
        return RewardResult(score=1.0, status="correct")
    return RewardResult(score=0.0, status="wrong", detail=answer[:60])
