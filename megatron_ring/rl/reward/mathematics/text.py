"""The text of a mathematical answer, written one way: Unicode and plain spellings become plain LaTeX.

``plain`` repeats its rules until nothing changes. It works on characters only, and removes nothing that distinguishes two
values: only space, dollars, sizes of brackets and the full stop.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_ring.rl.reward.answers import braced, unboxed

MAX_ANSWER_CHARS = 1000
"""Longer boxes are prose or an attack on the parser, and are refused."""
_MAX_PASSES = 12


def word_list(text: str) -> list[str]:
    """The words of a text, for long tables in few lines.

    Example: ``word_list("sin cos") == ["sin", "cos"]``.
    """
    return text.split()


_VULGAR = dict(
    zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
        word_list("12 13 23 14 34 15 25 35 45 16 56 18 38 58 78"),
        strict=True,
    )
)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ", "0123456789+-=()nixy", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₓₖ", "0123456789+-=()nixk", strict=True))
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϑ",
        word_list(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
            "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi theta"
        ),
        strict=True,
    )
)
_SIGNS = {
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•∗⸱", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("−–—‐‑‒﹣－⁃", "-"),
    **dict.fromkeys("≤≦⩽", r"\le "),
    **dict.fromkeys("≥≧⩾", r"\ge "),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("′’", "'"),
    **dict.fromkeys("…⋯", r"\ldots "),
    **dict.fromkeys("。．", "."),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("₹₽₩₫₺₴₪", "$"),
    "≠": r"\ne ",
    "≡": r"\equiv ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "∣": "|",
    "″": "''",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "∂": r"\partial ",
    "ℓ": "l",
    "％": "%",
    "￥": "¥",
}
_TABLE: dict[int, str] = {
    **{ord(a): b for a, b in _SIGNS.items()},
    **{ord(a): rf"\{b} " for a, b in _GREEK.items()},
    **{ord(a): rf"\frac{{{b[0]}}}{{{b[1]}}}" for a, b in _VULGAR.items()},
    ord("⅒"): r"\frac{1}{10}",
    ord("µ"): r"\mu ",
}
_SUPER = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUB = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-z]|)")
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}

_DROPPED = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|hfill|hline|bigskip|noindent)(?![A-Za-z])\s*"
    r"|\\(?:phantom|vphantom|hphantom|label|tag|(?:text)?color|colorbox)\*?\s*\{[^{}]*\}"
    r"|\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|ensuremath|relax|checkmark|blacksquare|qed)(?![A-Za-z])\s*"
)
_SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*")
_BAR_SIDES = re.compile(r"\\(left|right)\s*(?:\||\\vert(?![A-Za-z]))")
_EMPTY_SIDES = re.compile(r"\\(?:left|right)\s*\.(?!\d)")
_SPACES = re.compile(
    r"(?:\\[,;:> ]|~|\\q?quad|\\(?:enspace|thinspace|space|hspace\{[^{}]*\})(?![A-Za-z])|\s)+"
)
_NOTHING = re.compile(
    r"\\!|\\/(?!/)|\\allowbreak(?![A-Za-z])|[\u200b-\u200f\u2060-\u2064\ufeff\u00ad\u202a-\u202e]|[\ufe00-\ufe0f\u20e3✓✔✅☑]"
)
_FRACTION = re.compile(r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\;)\s*(?=\d{3}(?!\d))")
_OUTER_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|bf|rm|operatorname|emph|underline)\s*(?=\{)"
)
_TEXT_FONTS = re.compile(r"\\(?:texttt|textsf|textnormal|textup|textmd|textsl|textsc)(?=\s*\{)")
_UPRIGHT_FONTS = re.compile(r"\\(?:mathsf|mathtt|mathnormal)(?=\s*\{)")
_BOLD_FONTS = re.compile(r"\\(?:pmb|bold|bm|boldsymbol)(?=\s*\{)")
_ROW = re.compile(r"\\\\(?:\s*\[[^\[\]]*\])?")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}])")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
"""A group of words with a font command."""
_FENCES = re.compile(r"\\[()\[\]]")
_DOLLAR = re.compile(r"(?<!\\)\$")
_PRIMES = re.compile(r"\^\s*(?:\{((?:\s*\\prime)+)\s*\}|\\prime(?![A-Za-z]))")
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\(?:text|mathrm)\s*\{([A-Za-z ]+)\}\s*\}\s*\{\s*\\(?:text|mathrm)\s*\{([A-Za-z ]+)\}"
    r"(\^\{?\d\}?)?\s*\}"
)
_TRANSPOSED = re.compile(
    r"(?<=[)\]}])\s*\^\s*(?:\\(?:top|intercal)(?![A-Za-z])"
    r"|\{\s*(?:\\(?:top|intercal|text\{T\}|mathrm\{T\})|T)\s*\})"
)
_WITHOUT = re.compile(r"(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)")
_BETWEEN = re.compile(r"([(\[][^()\[\]]*,[^()\[\]]*[)\]])\s*[Uu]\s*(?=[(\[][^()\[\]]*,)")
_OUTWARD = re.compile(r"(^|=\s*|\\(?:cup|in)\s*)([\[\]])([^()\[\]]*[,;][^()\[\]]*)([\[\]])")
"""Intervals in French notation: ``[0,1[``."""
_LEADING = re.compile(
    r"(?:=(?![=<>])|\\(?:approx|therefore|implies|Rightarrow|Longrightarrow|rightarrow)(?![A-Za-z])"
    r"|\\text\{ ?(?i:(?:the )?(?:final |correct )?answer)(?: is)?:? ?\})\s*"
)
_SYSTEM = re.compile(
    r"(?:\\\{ ?)?\\begin ?\{ ?(cases|array|aligned|gathered) ?\} ?(?:\{[lcr| ]*\})?(.*)\\end ?\{ ?\1 ?\}",
    re.DOTALL,
)
_ALIGNED = re.compile(r"& ?(?==)|(?<==) ?&")
_SAYS_WHAT = re.compile(r"=|<|>|\\(?:le|ge|ne|lt|gt)q?(?![A-Za-z])")
_HALF_DAY = re.compile(
    r"(?<=\d)(?::00)? ?(?:\\(?:text|mathrm)\{ ?([AaPp])\.? ?[Mm]\.?\}|([AaPp])\.? ?[Mm]\.?)$"
)
_SPELLINGS = (
    (re.compile(r"\bper cent\b"), "percent"),
    (
        re.compile(
            r"(\\text\{ ?(?:hour|hr|minute|day|week|year|pound|foot|feet|ft)s?)(?:,| and|, and) ?\} ?(?=\d)"
        ),
        r"\1}",
    ),
    (re.compile(r"\\text\{ ?is (?!not)"), r"\\text{ "),
    (re.compile(r"(\d+) ?(?:to|\\text\{ ?to ?\}) ?(\d+)$"), r"\1:\2"),
    (re.compile(r"^(?:\{\})?\^\{?(\d+)\}?/_\{?(\d+)\}?$"), r"\\frac{\1}{\2}"),
    (re.compile(r"^(?:\\mathrm\{C\}|C) ?_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?$"), r"\\binom{\1}{\2}"),
    (
        re.compile(
            r"\\(?:hat|widehat|vec|mathbf) ?\{? ?\\?(?:hat ?\{?|mathbf ?\{?)?\\?([ij])(?:math)?(?![A-Za-z]) ?\}?\}?"
        ),
        r"\\mathbf{\1}",
    ),
    (re.compile(r"\\(?:hat|widehat|vec) ?\{? ?(?:\\mathbf ?\{)?k(?![A-Za-z]) ?\}?\}?"), r"\\mathbf{k}"),
)
"""(pattern, replacement) of other spellings with the same meaning."""
_OF_WHAT = re.compile(r"(-?\d[\d.,/]*) \(([A-Za-z][A-Za-z -]*)\)")
_MONEY = re.compile(r"(?:USD|US\s*(?=\\?\$))\s*\\?\$?\s*(?=\d)")
_BASES = {
    **dict(zip(word_list("two three four five six seven eight nine"), range(2, 10), strict=True)),
    **{"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16},
}
_BASED = re.compile(
    r"(-?)(?:\\(?:text|mathrm|textbf|mathbf)\{([0-9A-Za-z]+)\}|\(([0-9A-Za-z]+)\)|\{([0-9A-Za-z]+)\}|([0-9A-Za-z]+)) ?"
    r"(?:_ ?\{? ?\(?(?:\\(?:text|mathrm)\{)?(?:base )?\}? ?(\d\d?|[a-z]+)\}?\)? ?\}?"
    r"|(?:\\text\{ ?)?\(?(?: ?in)? ?base ?\}? ?(\d\d?|[a-z]+) ?\)?\}?)"
)
r"""A number and its base: ``(12)_8``, ``12_{\text{eight}}``, ``12\text{ (base 8)}``."""
_INTEGER_NAMES = (
    r"(?:\\text\{ ?(?:for |where |with )?)?(?:(?:for )?(?:any |all |every |some )?integers? ?\}? ?(?P<before>[a-z])"
    r"|(?<=[^A-Za-z])(?P<behind>[a-z]) ?\\text\{ ?(?:is )?(?:an |are |any )?integers? ?\})"
)
_FAMILY = re.compile(
    r"(?:[,;] ?|(?= ?\(| ?\\text)) ?\(?(?:\\text\{ ?,? ?(?:for|where|with)(?: (?:any|all|every|some))? ?\} ?)?"
    r"(?:(?P<name>[a-z]) ?\\in ?(?:\\mathbb ?\{? ?Z ?\}?|\\mathbf\{Z\}|Z)|" + _INTEGER_NAMES + r")\)?"
)
_FOR_ALL = re.compile(
    r"[,;]? ?(?:\\text\{ ?,? ?(?:for|where) (?:all|every|any|each)(?: real)? ?\}|\\forall) ?[a-z]"
    r"( ?\\in ?\\mathbb ?\{?R\}?)?"
)
r"""Behind an answer, what holds for it: ``k\in\mathbb{Z}`` in any words; of all numbers it says nothing."""
_PHRASES = {
    **dict.fromkeys(("all real numbers", "all reals", "every real number", "any real number"), r"\mathbb{R}"),
    **dict.fromkeys(
        (
            "no solution",
            "no solutions",
            "no real solution",
            "no real solutions",
            "empty set",
            "the empty set",
        ),
        r"\emptyset",
    ),
}
_TEXT_STOP = re.compile(r"[.,;:]\s*\}$")


class Unreadable(ValueError):
    """The text is no mathematics that can be compared; the message says why."""


def plain(text: str) -> str:
    """``text`` in one spelling; a fixed point. Raises :class:`Unreadable` for text that is too long.

    Examples: ``plain("$2√3$.") == r"2\\sqrt{3}"``, ``plain("x²·５") == r"x^{2}\\cdot 5"``.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise Unreadable(f"a box of {len(text)} characters; 1 to {MAX_ANSWER_CHARS} are read")
    for _ in range(_MAX_PASSES):
        before, text = text, _outer(_spelling(text))
        if text == before:
            return text
        if len(text) > 4 * MAX_ANSWER_CHARS:
            break
    raise Unreadable("nested too deeply in dollars, text or boxes")


def _spelling(text: str) -> str:
    if not text.isascii():
        text = _ascii(text)
    for mark in ("**", "`", '"'):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)]
    if "\\" in text:
        if "\\\\" in text and r"\begin" not in text:  # escaped once too often
            text = _DOUBLED.sub(r"\\", text)
        text = _FENCES.sub(" ", _ROW.sub(r"\\cr ", text))
        text = _NOTHING.sub("", _THOUSANDS.sub("", text))
        text = _UPRIGHT_FONTS.sub(r"\\mathrm", _TEXT_FONTS.sub(r"\\text", text))
        text = _BOLD_FONTS.sub(r"\\mathbf", text)
        text = _FRACTION.sub(r"\\frac", _DROPPED.sub("", text))
        text = _BAR_SIDES.sub(lambda side: rf"\{side[1][0]}vert ", text)
        text = _SIZES.sub("", _EMPTY_SIDES.sub("", text))
        text = _PRIMES.sub(lambda marks: "'" * max(1, (marks[1] or "").count("p")), text)
        text = _TRANSPOSED.sub("^T", text)
        text = _WITHOUT.sub(r"\\setminus ", text.replace(r"\Bbb", r"\mathbb"))
        text = _UNIT_FRACTION.sub(lambda unit: rf"\text{{{unit[1]}/{unit[2]}{unit[3] or ''}}}", text)
    text = _THOUSANDS.sub("", text).replace("**", "^").replace("+/-", r"\pm ")
    if len(_DOLLAR.findall(text)) > 1:  # one alone is money
        text = _DOLLAR.sub(" ", text)
    return _written_out(_SPACES.sub(" ", text).strip())


def _written_out(text: str) -> str:
    """Spellings of a whole answer, one way: intervals, bases, times of day, money, phrases."""
    system = _SYSTEM.fullmatch(text)
    if system is not None:
        text = _joined(system[2]) or text
    text = _BETWEEN.sub(r"\1\\cup ", text)
    if text[-1:] in ("[", "]") or r"\cup" in text:
        text = _OUTWARD.sub(_inward, text)
    based = _BASED.fullmatch(text)
    if based is not None and (base := _base(based[6] or based[7])):
        digits = next(filter(None, based.group(2, 3, 4, 5))).upper()
        if all(int(digit, 36) < base for digit in digits):
            return f"{based[1]}{digits}_{{{base}}}"
    for spelling, meant in _SPELLINGS:
        text = spelling.sub(meant, text)
    text = _HALF_DAY.sub(lambda half: rf"\text{{ {(half[1] or half[2]).lower()}m}}", text)
    whole = _OF_WHAT.fullmatch(text)
    if whole is not None:
        return rf"{whole[1]}\text{{ {whole[2]}}}"
    if r"\in" in text or "integer" in text:
        text = _behind(_FAMILY, text, r", {0}\in\mathbb{{Z}}")
    if r"\text" in text or r"\forall" in text:
        text = _behind(_FOR_ALL, text, "")
    text = _MONEY.sub(r"\$", text, count=1) if text.startswith("US") else text
    return _PHRASES.get(text.casefold(), text)


def _joined(rows: str) -> str:
    r"""The equations of a system, joined: ``x=1\\land y=2``; empty if they are alternative cases."""
    lines = [line.strip(" ,;.") for line in _ALIGNED.sub("", rows).split(r"\cr")]
    lines = [line for line in lines if line]
    return r"\land ".join(lines) if "&" not in "".join(lines) and all(map(_SAYS_WHAT.search, lines)) else ""


def _behind(words: re.Pattern[str], text: str, written: str) -> str:
    """``text`` with the match of ``words`` at its end replaced by ``written``, the name in it included."""
    for match in words.finditer(text):
        if match.start() and match.end() == len(text):
            name = next((name for name in match.groupdict().values() if name), "")
            return text[: match.start()].rstrip(" ,;") + written.format(name)
    return text


def _inward(interval: re.Match[str]) -> str:
    before, opening, inner, closing = interval.groups()
    return f"{before}{'[' if opening == '[' else '('}{inner}{']' if closing == ']' else ')'}"


def _base(name: str) -> int:
    base = _BASES.get(name.casefold(), 0) if name.isalpha() else int(name)
    return base if 2 <= base <= 36 else 0


def _ascii(text: str) -> str:
    text = _ROOT.sub(
        lambda root: rf"\sqrt{_ROOT_INDEX[root[1]]}" + (f"{{{root[2]}}}" if root[2] else " "), text
    )
    text = _SUPER.sub(lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run[0]) + "}", text)
    text = _SUB.sub(lambda run: "_{" + "".join(_SUBSCRIPTS[c] for c in run[0]) + "}", text)
    text = _NOTHING.sub("", text).translate(_TABLE)
    if text.isascii():
        return text
    # full-width letters and digits, mathematical alphabets, Arabic digits: what Unicode calls the same character
    return "".join(c if c.isascii() else _folded(c) for c in text)


def _folded(character: str) -> str:
    if character.isspace():
        return " "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    folded = unicodedata.normalize("NFKC", character)
    return folded if folded.isascii() else character


def _outer(text: str) -> str:
    """``text`` without what encloses all of it: boxes, ``\\text``, plain braces, the full stop."""
    if text.startswith("\\"):
        text = unboxed(text) or text
        whole = _OUTER_TEXT.match(text)
        if whole is not None:
            inner = braced(text, whole.end())
            if inner is not None and whole.end() + len(inner) + 2 == len(text):
                return inner.strip()
    elif text.startswith("{") and braced(text, 0) == text[1:-1]:
        return text[1:-1].strip()
    leading = _LEADING.match(text)
    if leading is not None and len(text) > leading.end():
        text = text[leading.end() :]
    while len(text) > 1 and text[-1] in ".,;:" and not text.endswith(("..", r"\.", r"\,", r"\;", r"\:")):
        text = text[:-1].rstrip()
    return _TEXT_STOP.sub("}", text) if r"\text" in text else text
