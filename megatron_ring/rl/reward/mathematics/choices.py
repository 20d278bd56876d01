"""Multiple choice: the letter of an answer, with or without its text, and what is then compared."""

from __future__ import annotations

import re

from megatron_ring.rl.reward.mathematics.text import TEXT, plain

CHOICE = re.compile(r"\(?([A-Ja-j])\)?(?:[.:)](?:\s.*)?)?", re.DOTALL)
IN_PARENTHESES = re.compile(r"\(([A-Ja-j])\)\s.+", re.DOTALL)
_WITH_TEXT = re.compile(r"([A-J])\s*(?:\\text\{\s*)?(?:\(.{2,}\)\s*\}?|-\s+\S\S.*)", re.DOTALL)
"""``B (the cell)`` and ``B - the cell``."""
LETTER = re.compile(r"\(?([A-J])\)?[.:)]?|\[([A-J])\]")
_LABELLED = re.compile(
    r"(?:\(([A-Ja-j])\)|\[([A-J])\]|([A-Ja-j])[.:)])\s*(.+)|([A-J])\s+(?=[\d\\$(-])(.+)", re.DOTALL
)
_NAMED_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct |right |best |final )?(?:option|choice|answer)(?: is)?:?) ?"
    r"((?i:\(?[A-J]\)?(?:[.:)]?|[.:)] .*|\) .*)))",
    re.DOTALL,
)
_MARKS = re.compile(r"^[\s\\$~]+|[\s\\$~]+$")
_SPECIES = (
    r"\.\s+(?:coli|elegans|difficile|pylori|influenzae|melanogaster|thaliana|subtilis|albicans|botulinum|perfringens"
    r"|tetani|cereus|anthracis|pertussis|burgdorferi|fragilis|faecalis|histolytica|granulosus|fumigatus|flavus|niger"
    r"|parvum|neoformans|sapiens|erectus|habilis|gambiae|aegypti|rerio|discoideum|jejuni|trachomatis|diphtheriae)\b"
)
"""The word after an abbreviated genus: ``E. coli`` is no choice E."""
_ANOTHER = re.compile(
    r"\((?i:[A-J])\)|\[[A-J]\]"
    rf"|^(?i:[A-J])(?!{_SPECIES})[.:)](?:\s|$)"
    r"|^\W*(?i:(?:or|and|nor|maybe|perhaps|possibly)(?![A-Za-z])|[,;/&|])"
    r"(?i:\W|also|else|either|maybe|perhaps|possibly|not|option|choice|answer)*(?:[A-Jb-j]|a(?!\s+[a-z]))(?![A-Za-z']|-\w)"
    r"|(?i:option|choice|answer)(?i: is)?:? \W*[A-J](?![A-Za-z'])"
    # a letter that is a choice by the words around it
    r"|\b(?i:wait|alternatively|otherwise|maybe|perhaps|possibly|actually|instead)\b"
    r"(?i:\W|also|or|it|is|its|it's|the)*\b[A-J](?![\w'-])"
    r"|(?<![\w'])[A-J](?i: (?:is|may|might|could|would|can)(?: be)?)?"
    r"(?i: (?:also|too|as well|possible|plausible|correct|right(?! of)))(?![A-Za-z])"
    r"|[\d)}$]\s*(?:[,;/&|]|\b(?:or|and)\b)\s*[A-J]\W*$"
    r"|^-\s*[A-J]$"
)
"""A second choice after the first: ``(B) (C)``, ``B. or C``, ``B) C) D)``, ``B. 5, Option C``, ``B. no wait, C``."""
_LABEL = re.compile(
    rf"(?<![^\s,;/&|])(?:([A-J])(?!{_SPECIES})(?:\)\.|[:).])|([a-j])\))(?=\s|$|\d|[a-z]{{2}})"
)
"""A choice's label among words: ``C.`` of ``12 C. 13``; ``E. coli`` has none."""
_IN_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_OR = re.compile(r"\\(?:lor|vee)(?![A-Za-z])")
_AND = re.compile(r"\\(?:land|wedge)(?![A-Za-z])")


def _several(text: str, letter: str) -> bool:
    """Does the text after the choice ``letter`` name another choice?"""
    text = _AND.sub(" and ", _OR.sub(" or ", TEXT.sub(r" \1 ", text))).replace(r"\cr", "\n")
    text = text.replace("*", " ").replace("$", " ").strip()
    if _ANOTHER.search(text):
        return True
    labels = _LABEL.finditer(_IN_BRACKETS.sub(" ", text))
    return any((label[1] or label[2]).upper() != letter.upper() for label in labels)


def named(answer: str) -> str | None:
    """The letter of the one choice that ``answer`` names, with or without its text; empty for several, None for none.

    Examples: ``named("(b) 12") == "B"``, ``named("(B) or (C)") == ""``.
    """
    answer = unmarked(answer)
    alone = LETTER.fullmatch(answer)
    if alone is not None:
        return alone[1] or alone[2]
    given = CHOICE.fullmatch(answer) or IN_PARENTHESES.fullmatch(answer) or _WITH_TEXT.fullmatch(answer)
    if given is None:
        return None
    return "" if _several(answer[given.end(1) + 1 :], given[1]) else given[1].upper()


def choice(reference: str, answer: str) -> bool | tuple[str, str] | None:
    """The result, or the two texts to compare, if one side names a choice; None if neither does.

    Examples: ``choice("B", "(B) 12") is True``, ``choice("12", "(B) 12") == ("12", "12")``.
    """
    wanted, given = LETTER.fullmatch(unmarked(reference)), labelled(answer)
    if wanted is not None:
        letter = wanted[1] or wanted[2]
        if given is not None:
            return given[0] == letter
        alone = LETTER.fullmatch(unmarked(answer))
        return None if alone is None else (alone[1] or alone[2]) == letter
    if (mine := labelled(reference)) is not None:
        letter, text = mine
        if given is not None:
            return False if given[0] != letter else (text, given[1])
        alone = LETTER.fullmatch(unmarked(answer))
        return (alone[1] or alone[2]) == letter if alone is not None else (text, answer)
    return None if given is None else (reference, given[1])


def labelled(answer: str) -> tuple[str, str] | None:
    """(letter, text) of ``(B) 12``, ``B. 12``, ``\\textbf{(B)}\\ 12``; None for what is no labelled choice."""
    match = _LABELLED.fullmatch(unmarked(answer))
    if match is None:
        return None
    letter = match[1] or match[2] or match[3] or match[5]
    text = plain(match[4] or match[6])
    return (letter.upper(), text) if text and not _several(text, letter) else None


def unmarked(answer: str) -> str:
    """``\\textbf{(B)} 12`` as ``(B) 12``: a label without its font."""
    whole = TEXT.match(answer)
    if whole is not None and len(whole[1].strip()) <= 4:
        answer = whole[1] + answer[whole.end() :]
    answer = _MARKS.sub("", answer)
    whole_name = _NAMED_CHOICE.fullmatch(answer)
    return whole_name[1] if whole_name else answer
