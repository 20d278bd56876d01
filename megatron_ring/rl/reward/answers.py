"""Find the answer in a response: pure functions on text.

Only the answer part counts, which begins after the last ``</think>``; in it, only the last ``\\boxed{...}``.
Earlier boxes are intermediate results, and an unclosed last box is an answer that was cut off, so it is no answer
at all. In mathematics, boxes that nothing but ``or``, ``and`` or a comma joins to the last one belong to it.
"""

from __future__ import annotations

import re
import sys

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_ANY_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(
    r"[+-]?(?:\d+(?:[.,/]\d+)*|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+(?=\{)|\\(?!(?:boxed|fbox)(?![A-Za-z]))[A-Za-z]+)"
)
_JOINER = re.compile(
    r"\s*(?:[,;/&]?\s*(?:or(?:\s+(?:else|maybe|perhaps|possibly))?|and(?:\s+also)?)|[,;/&]"
    r"|\\(?:lor|vee|land|wedge)(?![A-Za-z]))\s*(?:[A-Za-z](?:_\w{1,3})?'?\s*=\s*)?"
)
_FENCING = re.compile(r"\$|\\[()\[\],;:! ]|~|\\(?:q?quad|text)(?![A-Za-z])|[{}]")
_LONGEST_JOINER = 60
_MOST_BOXES = 20
_MOST_JOINED_CHARS = 1000


def answer_part(text: str) -> str:
    """What follows the last ``</think>``; the whole text where there is none."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces balanced, boxes around boxes taken off; None without one.

    ``\\boxed 5`` is a box too: it holds the number, letter or command that follows.
    Example: ``last_boxed(r"so \\boxed{3}, or \\boxed{\\frac{1}{2}}") == r"\\frac{1}{2}"``.
    """
    for start in reversed(_starts(text)):
        box = _box(text, start)
        if box is not None:
            # of boxes around boxes the innermost starts last, and it is the answer
            return unboxed(box[1])
    return None


def boxed_answer(text: str) -> str | None:
    """The last box, together with those before it that only ``or``, ``and`` or a comma joins to it.

    Example: ``boxed_answer(r"\\boxed{1}, so $x=\\boxed{2}$ or $x=\\boxed{3}$") == "2 , 3"``.
    """
    parts: list[str] = []
    begin = len(text)
    for start in reversed(_starts(text)):
        box = _box(text, start, _MOST_JOINED_CHARS if parts else sys.maxsize)
        if box is None:
            continue
        end, content = box
        if content is None or (parts and not _joined(text, end, begin)):
            break
        parts.append(unboxed(content) or "")
        begin = start.start()
    return " , ".join(reversed(parts)) if parts else None


def unboxed(content: str | None) -> str | None:
    """``content`` without boxes around the whole of it: a reference may come boxed."""
    while content is not None:
        content = content.strip()
        match = _BOX.match(content)
        inner = None if match is None else braced(content, match.end())
        if match is None or inner is None or match.end() + len(inner) + 2 != len(content):
            return content
        content = inner
    return None


def final_answer(text: str) -> str:
    """The last box of the answer part, or without a box all of that part."""
    part = answer_part(text)
    boxed = last_boxed(part)
    return part.strip() if boxed is None else boxed


def _starts(text: str) -> list[re.Match[str]]:
    return list(_ANY_BOX.finditer(text))[-_MOST_BOXES:]


def _box(text: str, start: re.Match[str], most: int = sys.maxsize) -> tuple[int, str | None] | None:
    """(end, content) of a box, content None if it is cut off or too long; None where the word is prose."""
    if text[start.end() : start.end() + 1] == "{":
        content = braced(text, start.end(), most)
        return (start.end() if content is None else start.end() + len(content) + 2), content
    bare = _bare(text, start.end())
    return None if bare is None else (start.end() + len(bare), bare)


def _joined(text: str, end: int, start: int) -> bool:
    """Whether two boxes have nothing but a word that joins them between them."""
    return (
        0 <= start - end <= _LONGEST_JOINER
        and _JOINER.fullmatch(_FENCING.sub(" ", text[end:start])) is not None
    )


def _bare(text: str, start: int) -> str | None:
    """What a box without braces holds: a number, a letter or a command with its arguments."""
    match = _BARE.match(text, start)
    if match is None:
        return None
    end = match.end()
    while "\\" in match[0] and text[end : end + 1] == "{":
        inner = braced(text, end, _MOST_JOINED_CHARS)
        if inner is None:
            return None
        end += len(inner) + 2
    return text[start:end]


def braced(text: str, start: int, most: int = sys.maxsize) -> str | None:
    """What the braces at ``start`` hold, of at most ``most`` characters; an escaped brace is any character."""
    depth = 0
    position = start
    last = min(len(text), start + most)
    while position < last:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None
