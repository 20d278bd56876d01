"""Is one problem another one, written otherwise? What keeps held-out problems out of training.

Two problems are the same where the user's turns are, one after the other, once they are normalised: compatibility
forms (NFKC) and upper case undone, characters without a width left out, dashes and quotation marks made plain, white
space collapsed, and none left around an operator that had it on both sides; the fences of mathematics (dollars,
``\\(``, ``\\[``) and of emphasis (stars, underscores) taken off, TeX's sizes and spaces are none (``\\left(``,
``\\dfrac``, ``\\,``), and the punctuation of a sentence off the ends of its words
(``. , ; : ? ! "``). What carries a meaning stays: signs, brackets, operators, points and commas inside numbers,
exponents and factorials, so that ``2-3``, ``2 3``, ``2^3`` and ``23`` are four problems, and ``$2`` is not ``2``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

Asked = tuple[str, ...]
"""The user's turns, normalised."""

_PLAIN = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
_PLAIN |= dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
_PLAIN |= dict.fromkeys("\u2018\u2019\u02bc`\u00b4", "'")
_TABLE = str.maketrans(_PLAIN)
_BEHIND = re.compile(r'(?:(?<=[^\W\d_]{2})!|[.,;:?"\u3002\u3001]|(?<=[?!"])!)+$')
"""Sentence punctuation behind a word; behind a digit, a letter or a bracket ``!`` is a factorial."""
_BEFORE = re.compile('^["\u00bf\u00a1]+')

_EMPHASIS = re.compile(
    r"(?<!\w)(?:\*\*\*(?![\s*])([^*]+)(?<!\s)\*\*\*(?!\*)|\*\*(?!\s)([^*]+)(?<!\s)\*\*|__(?=\w)([^_]+)(?<=[\w.?!])__"
    # one star may be a product's, one underscore an index's: it is emphasis around whole words
    r"|(?<!\*)\*(?=\w)([^*]+)(?<=[\w.?!])\*(?!\*)|_(?=[^\W_])([^_]+)(?<=[^\W_]|[.?!])_)(?!\w)"
)
_MARKED = re.compile(
    r"(?<!\\)\\(?:textbf|textit|textsl|emph|underline)\s?\{([^{}]*)\}|<(b|i|u|em|strong)>([^<]*)</\2>"
)
"""Emphasis of TeX's and of HTML's."""
_SIZES = re.compile(
    r"(?<!\\)\\(?:left|right|bigg?[lrm]?)(?![a-z])\.?|(?<!\\)\\(?:(?:display|text)style(?![a-z])\s*|!)"
)
_FRACTION = re.compile(r"(?<!\\)\\[dt]frac(?![a-z])")
_TEX_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z]))")
_FENCES = re.compile(
    r"\$\$([^$]+)\$\$"
    # a price ends with a digit, and the next one begins behind a space: neither closes a formula
    r"|\$(?!\s)([^$]+)(?<!\s)\$(?!\d)"
    r"|(?<!\\)\\[()\[\]]"
)
_SPACED = re.compile(r"(?<=\S) ([-+=*/<>^\u00d7\u00f7]) (?=\S)")


def asked(turns: Sequence[str]) -> Asked:
    """Example: ``asked(["What is  1 + 2 ?"]) == asked(["what is 1 + 2"])``."""
    return tuple(_normal(turn) for turn in turns)


def is_among(turns: Asked, held_out: Collection[Asked]) -> bool:
    """Is one of ``held_out`` asked in these turns, first turn or later, turn by turn?

    A conversation in which a held-out problem is asked, and then more, is that problem too; one that asks the last
    turn of it alone ("Are you sure?") is not.
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
    # an exponent is no digit of the number under it
    text = "".join(f"^{c}" if unicodedata.decomposition(c).startswith("<super>") else c for c in text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).casefold().translate(_TABLE)
    text = _SIZES.sub("", _FRACTION.sub(r"\\frac", _TEX_SPACE.sub(" ", text)))
    text = _MARKED.sub(lambda words: words[1] or words[3] or "", text)
    text = _EMPHASIS.sub(lambda words: next(filter(None, words.groups())), text)
    text = _FENCES.sub(lambda fence: fence[1] or fence[2] or "", text)
    words = text.split()
    bare = [_BEHIND.sub("", _BEFORE.sub("", word)) for word in words]
    return _SPACED.sub(r"\1", " ".join(filter(None, bare)) or " ".join(words))
