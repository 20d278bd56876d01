"""Control tokens that somebody's text spells out: kept text, whatever the tokenizer and the template.

A mark, one character of Unicode's private use that the text does not hold, is put behind the first character of
each control token. It travels through the template with the text; the tokenizer then sees no control token, and the
ids of the mark are taken out again. Text without control tokens gets no mark and the ids that it always had.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterable, Sequence

from megatron_ring.errors import DataError

_MARKS = range(0xE000, 0xF900)


class ControlText:
    """The control tokens that a text must not become.

    Example, with ``|`` for the mark: of ``<eos>``, ``guard("a<eos>b", "|") == "a<|eos>b"``.
    """

    def __init__(self, tokens: Iterable[str]):
        # a token of one character cannot be kept apart from itself; it is a character like any other
        self.tokens = tuple(sorted({token for token in tokens if len(token) > 1}, key=lambda t: (-len(t), t)))
        inside = "|".join(map(re.escape, self.tokens))
        # each position by itself, since tokens may overlap: <role>HUMAN</role> and </role>
        self._inside = re.compile(f"(?={inside})(.)", re.DOTALL)
        self._beginnings = frozenset(token[:n] for token in self.tokens for n in range(2, len(token)))
        self._rests = tuple(token[1:] for token in self.tokens)
        self._longest = max(map(len, self.tokens), default=0)

    def guard(self, text: str, mark: str, *, alone: bool = False) -> str:
        """``text`` with a mark in every control token, and, if it is not alone, where a neighbour could complete one."""
        if any(token in text for token in self.tokens):
            text = self._inside.sub(rf"\1{mark}", text)
        if alone:
            return text
        body = text.rstrip()
        for length in range(min(self._longest, len(body)), 1, -1):
            if body[-length:] in self._beginnings:
                place = len(body) - length + 1
                text = text[:place] + mark + text[place:]
                break
        start = len(text) - len(text.lstrip())
        if text.startswith(self._rests, start):
            text = text[: start + 1] + mark + text[start + 1 :]
        return text


def free_mark(texts: Iterable[str]) -> str:
    """A character that none of ``texts`` holds. Raises DataError where they hold them all."""
    used = set().union(*map(set, texts))
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise DataError("the text holds every character of Unicode's private use; remove some of them")


def without_marks(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], marks: Collection[int], size: int
) -> list[int]:
    """``ids`` without those of the marks.

    Args:
        ids: of a text with marks in it.
        spans: where in the text each id begins and ends; empty for all but the last id of a character in bytes.
        marks: where the marks begin.
        size: of a mark, in what ``spans`` counts.

    Raises:
        DataError: the tokenizer has no ids of the marks' own.
    """
    kept: list[int] = []
    ended: set[int] = set()
    places = sorted(marks)
    for token, (start, end) in zip(ids, spans, strict=True):
        place = bisect.bisect_left(places, start)
        if place == len(places) or places[place] >= max(end, start + 1):
            kept.append(token)
        elif places[place] == start and end <= start + size:
            ended.update([start] if end > start else [])
        else:
            raise _cannot()
    if len(ended) != len(places):
        raise _cannot()
    return kept


def _cannot() -> DataError:
    return DataError(
        "this tokenizer cannot say the control tokens that the text spells out as text; remove them from the text"
    )
