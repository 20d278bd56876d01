"""Where the answer stands in a response: pure functions on text.

Only the answer part counts, which begins after the last ``</think>``; in it, only the last ``\\boxed{...}``.
Earlier boxes are intermediate results (Math-Verify would read two boxes as a set), and an unclosed last box
is an answer that was cut off, so it is no answer at all.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def answer_part(text: str) -> str:
    """What follows the last ``</think>``; the whole text where there is none."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces balanced, boxes around boxes taken off; None without one.

    Example: ``last_boxed(r"so \\boxed{3}, or \\boxed{\\frac{1}{2}}") == r"\\frac{1}{2}"``.
    """
    starts = list(_BOX.finditer(text))
    # of boxes around boxes the innermost starts last, and it is the answer
    return unboxed(_braced(text, starts[-1].end())) if starts else None


def unboxed(content: str | None) -> str | None:
    """``content`` without boxes around the whole of it: a reference may come boxed."""
    while content is not None:
        content = content.strip()
        match = _BOX.match(content)
        inner = None if match is None else _braced(content, match.end())
        if match is None or inner is None or match.end() + len(inner) + 2 != len(content):
            return content
        content = inner
    return None


def final_answer(text: str) -> str:
    """The last box of the answer part, or without a box all of that part."""
    part = answer_part(text)
    boxed = last_boxed(part)
    return part.strip() if boxed is None else boxed


def _braced(text: str, start: int) -> str | None:
    """Content of the braces that open at ``start``; an escaped brace is a character like any other."""
    depth = 0
    position = start
    while position < len(text):
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
