"""Compare problems regardless of formatting, to keep held-out problems out of training.

Two problems are the same if the user's turns are equal, in order, after normalisation:

- Unicode compatibility forms (NFKC) and case are folded, zero-width characters removed, dashes and quotation marks
  replaced by plain ones;
- white space is collapsed, and removed around an operator that has it on both sides;
- delimiters of mathematics (dollars, ``\\(``, ``\\[``) and of emphasis (stars, underscores) are removed, and so are
  TeX's sizes and spaces (``\\left(``, ``\\dfrac``, ``\\,``);
- sentence punctuation (``. , ; : ? ! "``) is removed at the ends of words.

Everything with a mathematical meaning stays: signs, brackets, operators, points and commas inside numbers, exponents
and factorials. So ``2-3``, ``2 3``, ``2^3`` and ``23`` are four problems, and ``$2`` is not ``2``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

Asked = tuple[str, ...]
"""The user's turns, normalised."""

_TABLE = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
    | dict.fromkeys("\u2018\u2019\u02bc`\u00b4", "'")
)
_BEHIND = re.compile(r'(?:(?<=[^\W\d_]{2})!|[.,;:?"\u3002\u3001]|(?<=[?!"])!)+$')
"""Sentence punctuation after a word; after a digit, a single letter or a bracket, ``!`` is a factorial."""
_BEFORE = re.compile('^["\u00bf\u00a1]+')

_EMPHASIS = re.compile(
    r"(?<!\w)(?:\*\*\*(?![\s*])([^*]+)(?<!\s)\*\*\*(?!\*)|\*\*(?!\s)([^*]+)(?<!\s)\*\*|__(?=\w)([^_]+)(?<=[\w.?!])__"
    # a single star may be a product, a single underscore a subscript: only around whole words they are emphasis
    r"|(?<!\*)\*(?=\w)([^*]+)(?<=[\w.?!])\*(?!\*)|_(?=[^\W_])([^_]+)(?<=[^\W_]|[.?!])_)(?!\w)"
)
_MARKED = re.compile(
    r"(?<!\\)\\(?:textbf|textit|textsl|emph|underline)\s?\{([^{}]*)\}|<(b|i|u|em|strong)>([^<]*)</\2>"
)
"""Emphasis in TeX and in HTML."""
_SIZES = re.compile(
    r"(?<!\\)\\(?:left|right|bigg?[lrm]?)(?![a-z])\.?|(?<!\\)\\(?:(?:display|text)style(?![a-z])\s*|!)"
)
_FRACTION = re.compile(r"(?<!\\)\\[dt]frac(?![a-z])")
_TEX_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z]))")
_FENCES = re.compile(
    r"\$\$([^$]+)\$\$"
    # prices: a dollar before a digit or after a space does not close a formula
    r"|\$(?!\s)([^$]+)(?<!\s)\$(?!\d)"
    r"|(?<!\\)\\[()\[\]]"
)
_SPACED = re.compile(r"(?<=\S) ([-+=*/<>^\u00d7\u00f7]) (?=\S)")


def asked(turns: Sequence[str]) -> Asked:
    """Example: ``asked(["What is  1 + 2 ?"]) == asked(["what is 1 + 2"])``."""
    return tuple(_normal(turn) for turn in turns)


def is_among(turns: Asked, held_out: Collection[Asked]) -> bool:
    """Do these turns contain all turns of one of ``held_out``, consecutively, from any turn on?

    A conversation that continues after a held-out problem contains it. One with only the last turn of a held-out problem
    ("Are you sure?") does not.
    """
    lengths = {len(problem) for problem in held_out}
    return any(
        turns[start : start + length] in held_out
        for length in lengths
        for start in range(len(turns) - length + 1)
    )


def _normal(text: str) -> str:
    # zero-width spaces, byte order marks, soft hyphens
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    # NFKC would turn an exponent into a digit of its base
    text = "".join(f"^{c}" if unicodedata.decomposition(c).startswith("<super>") else c for c in text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).casefold().translate(_TABLE)
    text = _SIZES.sub("", _FRACTION.sub(r"\\frac", _TEX_SPACE.sub(" ", text)))
    text = _MARKED.sub(lambda words: words[1] or words[3] or "", text)
    text = _EMPHASIS.sub(lambda words: next(filter(None, words.groups())), text)
    text = _FENCES.sub(lambda fence: fence[1] or fence[2] or "", text)
    words = text.split()
    bare = [_BEHIND.sub("", _BEFORE.sub("", word)) for word in words]
    return _SPACED.sub(r"\1", " ".join(filter(None, bare)) or " ".join(words))
