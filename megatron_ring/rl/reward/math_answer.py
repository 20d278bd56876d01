"""Mathematics and science: the last box against the reference, by value (PAPER.md, 3.3; Math-Verify).

Math-Verify costs some 6 ms and can hang or eat memory on hostile input. What can be decided without it is,
its own time limits (SIGALRM) stay off, memory is limited here and time by the process that kills this one.

Readings, where Math-Verify alone would be wrong or unclear:
- a word is compared as a word: ``yes`` would parse as the product y*e*s, equal to ``sey``;
- a full stop at the end of an answer is punctuation;
- in science, a reference that is one letter from A to J is a choice, and its letter alone is compared.
"""

from __future__ import annotations

import functools
import logging
import re

from megatron_ring.data.prompts import Prompt
from megatron_ring.rl.reward.answers import answer_part, last_boxed, unboxed
from megatron_ring.rl.types import RewardResult

MAX_ANSWER_CHARS = 1000
"""Longer boxes are prose or an attack on the parser: no answer."""

_INTEGER = re.compile(r"[+-]?\d{1,300}")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:(?:,|\\,|\{,\})\d{3}){1,30}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]{3,}(?:[ '-]+[A-Za-z]+)*")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?(?:[.:)](?:\s.*)?)?", re.DOTALL)
_CHOICE_IN_PARENTHESES = re.compile(r"\(([A-Ja-j])\)\s.+", re.DOTALL)
_FUNCTIONS = "sin cos tan cot sec csc log exp sqrt arcsin arccos arctan sinh cosh tanh max min"
_ANSWERS_OF_TWO_LETTERS = frozenset({"no"})


def judge_math(prompt: Prompt, text: str) -> RewardResult:
    """1 if the last box of ``text`` is equal in value to ``prompt.reference["answer"]``."""
    return _judge(_reference(prompt), text)


def judge_science(prompt: Prompt, text: str) -> RewardResult:
    """As mathematics; where the reference is the letter of a choice, 1 if the last box names that choice."""
    reference = _reference(prompt)
    wanted = _CHOICE.fullmatch(reference)
    if wanted is None or len(reference) > 3:
        return _judge(reference, text)
    box = last_boxed(answer_part(text))
    if box is None:
        return _no_box()
    plain = _plain(box)
    given = _CHOICE.fullmatch(plain) or _CHOICE_IN_PARENTHESES.fullmatch(plain)
    if given is None:
        return RewardResult(score=0.0, status="parse_error", detail=f"no choice in the box: {plain[:60]}")
    return _verdict(given[1].upper() == wanted[1].upper(), plain)


@functools.cache
def load() -> None:
    """Import what judging needs, which takes up to seconds."""
    import math_verify  # noqa: F401

    # it warns of every failed parse, and of the time limits that are off on purpose
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def _reference(prompt: Prompt) -> str:
    reference = unboxed(str(prompt.reference["answer"]))
    if not reference:
        raise ValueError(f"problem {prompt.uid} has an empty reference answer")
    return _plain(reference)


def _judge(reference: str, text: str) -> RewardResult:
    box = last_boxed(answer_part(text))
    if box is None:
        return _no_box()
    answer = _plain(box)
    if answer == reference:
        return _verdict(True, answer)
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        detail = f"a box of {len(answer)} characters; 1 to {MAX_ANSWER_CHARS} are read"
        return RewardResult(score=0.0, status="parse_error", detail=detail)
    wanted, given = _as_integer(reference), _as_integer(answer)
    if wanted is not None and given is not None:
        return _verdict(wanted == given, answer)
    if _is_word(reference):
        return _verdict(reference.casefold() == answer.casefold(), answer)
    return _by_value(reference, answer)


def _by_value(reference: str, answer: str) -> RewardResult:
    load()
    from math_verify import verify
    from sympy import Basic, MatrixBase

    wanted, given = _parse(reference), _parse(answer)
    if not any(isinstance(value, Basic | MatrixBase) for value in wanted):
        raise ValueError(f"Math-Verify cannot read the reference answer {reference[:60]}")
    if not any(isinstance(value, Basic | MatrixBase) for value in given):
        return RewardResult(score=0.0, status="parse_error", detail=f"cannot read {answer[:60]}")
    return _verdict(verify(wanted, given, timeout_seconds=None), answer)


def _parse(expression: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # in a box of ours, so that nothing but the whole of it is taken for the answer
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(rf"\boxed{{{expression}}}", extraction_config=targets, parsing_timeout=None)


def _plain(answer: str) -> str:
    """Without what never changes a value: outer space, dollars and full stop, ``\\text`` around words."""
    answer = answer.strip()
    if len(answer) <= MAX_ANSWER_CHARS:
        if len(answer) > 2 and answer[0] == answer[-1] == "$":
            answer = answer[1:-1].strip()
        whole = _TEXT.fullmatch(answer)
        answer = whole[1].strip() if whole else answer
        answer = answer[:-1].rstrip() if len(answer) > 1 and answer[-1] == "." else answer
    return answer


def _as_integer(answer: str) -> int | None:
    if _INTEGER.fullmatch(answer):
        return int(answer)
    if _GROUPED.fullmatch(answer):
        return int(re.sub(r"[^\d+-]", "", answer))
    return None


def _is_word(reference: str) -> bool:
    if reference.casefold() in _ANSWERS_OF_TWO_LETTERS:
        return True
    return _WORD.fullmatch(reference) is not None and not set(_FUNCTIONS.split()) & set(
        re.split(r"[ '-]+", reference)
    )


def _no_box() -> RewardResult:
    return RewardResult(
        score=0.0, status="parse_error", detail="no closed \\boxed{} at the end of the answer"
    )


def _verdict(right: bool, answer: str) -> RewardResult:
    if right:
        return RewardResult(score=1.0, status="correct")
    return RewardResult(score=0.0, status="wrong", detail=answer[:60])


def check_reference(answer: str) -> str | None:
    return None


def check_science_reference(answer: str) -> str | None:
    return None
