"""Encode control tokens that a user's text spells out as plain text, with any tokenizer and template.

A mark (a character of Unicode's private use area that the text does not contain) is inserted after the first character
of each control token. It passes through the template with the text. The tokenizer then finds no control token, and the
ids of the mark are removed again. Text without control tokens gets no mark, so its ids do not change.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterable, Sequence

from megatron_ring.errors import DataError

_MARKS = range(0xE000, 0xF900)


class ControlText:
    """The control tokens that must not be encoded from a text.

    Example, with ``|`` as the mark: ``ControlText(["<eos>"]).guard("a<eos>b", "|") == "a<|eos>b"``.
    """

    def __init__(self, tokens: Iterable[str]):
        # a token of one character cannot be split by a mark; it is treated as an ordinary character
        self.tokens = tuple(sorted({token for token in tokens if len(token) > 1}, key=lambda t: (-len(t), t)))
        inside = "|".join(map(re.escape, self.tokens))
        # a lookahead at each position, since tokens may overlap: <role>HUMAN</role> and </role>
        self._inside = re.compile(f"(?={inside})(.)", re.DOTALL)
        self._beginnings = frozenset(token[:n] for token in self.tokens for n in range(2, len(token)))
        self._rests = tuple(token[1:] for token in self.tokens)
        self._longest = max(map(len, self.tokens), default=0)

    def guard(self, text: str, mark: str, *, alone: bool = False) -> str:
        """``text`` with a mark in every control token; unless ``alone``, also where a neighbour could complete one."""
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
    """A private-use character that is in none of ``texts``. Raises DataError if there is none."""
    used = set().union(*map(set, texts))
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise DataError("the text contains every character of Unicode's private use area; remove some of them")


def without_marks(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], marks: Collection[int], size: int
) -> list[int]:
    """``ids`` without the ids of the marks.

    Args:
        ids: token ids of a text with marks.
        spans: begin and end of each id in the text. If a character becomes several byte tokens, the span is empty for all
            but the last of them.
        marks: offsets of the marks.
        size: length of a mark, in the unit of ``spans``.

    Raises:
        DataError: the tokenizer merges a mark with other characters.
    """
    kept: list[int] = []
    removed: set[int] = set()
    offsets = sorted(marks)
    for token, (start, end) in zip(ids, spans, strict=True):
        nearest = bisect.bisect_left(offsets, start)
        if nearest == len(offsets) or offsets[nearest] >= max(end, start + 1):
            kept.append(token)
        elif offsets[nearest] == start and end <= start + size:
            removed.update([start] if end > start else [])
        else:
            raise _cannot_encode()
    if len(removed) != len(offsets):
        raise _cannot_encode()
    return kept


def _cannot_encode() -> DataError:
    return DataError(
        "this tokenizer cannot encode the control tokens that the text spells out as text; remove them from the text"
    )
