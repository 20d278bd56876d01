"""The tokens of an answer. Any other text is refused here, before anything is computed.

A token is a number, symbol, function, operator, command or piece of prose from the tables below; no name is ever looked up
in Python. Lengths and nesting are bounded, so that parsing is linear in a bounded text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from megatron_ring.rl.reward.answers import braced
from megatron_ring.rl.reward.mathematics.text import Unreadable, word_list

MAX_TOKENS = 800
MAX_DEPTH = 40
"""Deepest nesting of brackets and braces."""


class Token(NamedTuple):
    """One word of an answer.

    Example: ``Token("number", "0.50", True, Fraction(1, 2), 2)`` for `` 0.50``: after a space, two significant digits.
    """

    kind: str
    text: str
    spaced: bool = False
    number: Fraction | None = None
    digits: int | None = None


FUNCTIONS = frozenset(
    word_list(
        "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth arcsinh arccosh "
        "arctanh exp cis ln log lg sqrt cbrt abs floor ceil max min gcd lcm sgn sign det Re Im arg"
    )
)
_SAME_FUNCTION = {
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "arsinh": "arcsinh",
    "arcosh": "arccosh",
    "artanh": "arctanh",
    "tg": "tan",
    "ctg": "cot",
    "cosec": "csc",
    "arctg": "arctan",
    "sgn": "sign",
}
GREEK = frozenset(
    word_list(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
        "xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi "
        "Sigma Upsilon Phi Psi Omega ell hbar imath jmath aleph nabla partial"
    )
)
_OPERATORS = {
    **dict.fromkeys(("cdot", "times", "ast", "bullet"), "*"),
    **dict.fromkeys(("div", "slash"), "/"),
    **dict.fromkeys(("le", "leq", "leqslant", "leqq"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant", "geqq"), ">="),
    **dict.fromkeys(("ne", "neq"), "!="),
    **dict.fromkeys(("approx", "simeq", "cong", "doteq", "thickapprox"), "~"),
    **dict.fromkeys(("cup", "bigcup"), "cup"),
    **dict.fromkeys(("cap", "bigcap"), "cap"),
    **dict.fromkeys(("setminus", "backslash", "smallsetminus"), "setminus"),
    **dict.fromkeys(("mid", "vert"), "|"),
    **dict.fromkeys(("lvert",), "|("),
    **dict.fromkeys(("rvert",), "|)"),
    **dict.fromkeys(("{", "lbrace"), "{("),
    **dict.fromkeys(("}", "rbrace"), "})"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("ldots", "dots", "cdots", "dotsc", "dotsb", "vdots"), "..."),
    **dict.fromkeys(("lor", "vee"), "or"),
    **dict.fromkeys(("land", "wedge"), "and"),
    **dict.fromkeys(("prime",), "'"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("colon",), ":"),
    **dict.fromkeys(("%",), "%"),
    **dict.fromkeys(("bmod", "mod"), "mod"),
    **dict.fromkeys(("degree", "degrees"), "deg"),
}
_KEPT = frozenset(
    word_list(
        "circ frac sqrt binom dbinom tbinom choose over begin end cr sum prod pm mp in notin subset "
        "subseteq supset equiv pmod lfloor rfloor lceil rceil langle rangle infty pi emptyset "
        "varnothing int iint oint lim angle triangle perp parallel sim propto to rightarrow mapsto "
        "implies Rightarrow iff Leftrightarrow forall exists neg &"
    )
)
ACCENTS = frozenset(
    word_list(
        "vec hat bar tilde overline widehat widetilde overrightarrow underline dot ddot mathbb "
        "mathcal mathfrak mathscr mathbf boldsymbol bm mathit mathsf mathtt mathrm overarc"
    )
)
_MARKS = frozenset(word_list("odot oplus star dagger top"))
"""Signs that are only allowed as a letter's superscript or subscript; as operations they are unknown."""
_PROSE = frozenset(word_list("text textnormal textbf textit textrm textsf texttt mbox operatorname hbox"))
_FONTS = frozenset(word_list("mathbf boldsymbol bm mathit mathsf mathtt mathrm"))
_CHARACTERS = {**{c: c for c in "+-*/^_!()[]{}|,;<>=:&'%"}, "$": "$", "@": "@"}
_PAIRS = {"<=": "<=", ">=": ">=", "!=": "!=", "=<": "<=", "=>": ">=", "==": "=", "->": "to"}
_PLAIN_NAMES = {
    "pi": "pi",
    "infinity": "infty",
    "infty": "infty",
    "inf": "infty",
    "oo": "infty",
    "or": "or",
    "and": "and",
    "union": "cup",
    "mod": "mod",
    "degrees": "deg",
    "degree": "deg",
    "deg": "deg",
    "percent": "%",
    "percentage": "%",
    "pct": "%",
}
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_WORD = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_SCIENTIFIC = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.A-Za-z])")
_POWER_OF_TEN = re.compile(r" ?[xX] ?(?=10 ?\^)")
_REPEATING = re.compile(
    r"(\d*\.\d*)(?:\\(?:overline|bar|dot|overset\{\.\})\s*(?:\{(\d+)\}|(\d))(?:(\d*)\\dot\s*(?:\{(\d)\}|(\d)))?|\((\d+)\))"
    r"(?:\.\.\.| ?\\[lc]?dots(?![A-Za-z]))?"
)
_ELLIPSIS = re.compile(r"(\d*\.\d+)(?:\.\.\.| ?\\[lc]?dots(?![A-Za-z]))")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!,?\d)|[1-9]\d{0,2}(?: \d{3})+(?! ?\d)")
_CURRENCY = frozenset("€£¥¢")


def tokens(text: str, *, grouped: bool = True, scientific: bool = True) -> list[Token]:
    """The words of a normalised text. ``1,234`` is one number where ``grouped``; ``3e-2`` is where ``scientific``.

    Example: ``[token.text for token in tokens(r"2\\sqrt{x}")] == ["2", "sqrt", "{", "x", "}"]``.
    """
    return _Tokenizer(text, grouped, scientific).run()


class _Tokenizer:
    def __init__(self, text: str, grouped: bool, scientific: bool) -> None:
        self.text, self.at, self.grouped, self.scientific = text, 0, grouped, scientific
        self.found: list[Token] = []
        self.spaced = False

    def run(self) -> list[Token]:
        depth = 0
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == " ":
                self.at, self.spaced = self.at + 1, True
                continue
            self._one(character)
            if len(self.found) > MAX_TOKENS:
                raise Unreadable(f"more than {MAX_TOKENS} words of mathematics")
        for token in self.found:
            depth += token.text in _OPENING if token.kind == "operator" else 0
            depth -= token.text in _CLOSING if token.kind == "operator" else 0
            if depth > MAX_DEPTH:
                raise Unreadable(f"nested deeper than {MAX_DEPTH}")
        return self.found

    def _add(self, kind: str, text: str, number: Fraction | None = None, digits: int | None = None) -> None:
        self.found.append(Token(kind, text, self.spaced, number, digits))
        self.spaced = False

    def _one(self, character: str) -> None:
        text, at = self.text, self.at
        if character.isdigit() or (character == "." and text[at + 1 : at + 2].isdigit()):
            self._number()
        elif character == "\\":
            self._command()
        elif text.startswith("...", at):
            self._add("operator", "...")
            self.at += 3
        elif text[at : at + 2] in _PAIRS:
            self._add("operator", _PAIRS[text[at : at + 2]])
            self.at += 2
        elif character in _CHARACTERS:
            self._add("operator", _CHARACTERS[character])
            self.at += 1
        elif character in _CURRENCY:
            self._add("operator", "$" + character)
            self.at += 1
        elif (word := _WORD.match(text, at)) is not None:
            self._word(word[0])
        else:
            raise Unreadable(f"{character!r} is no mathematics")

    def _number(self) -> None:
        text, at = self.text, self.at
        if (match := _REPEATING.match(text, at)) is not None:
            head, dotted = match[1], match[4] is not None
            block = (match[2] or match[3] or match[7]) + (match[4] + (match[5] or match[6]) if dotted else "")
            self._add("number", f"{head}({block})", repeating(head, block))
        elif (match := _ELLIPSIS.match(text, at)) is not None:
            self._add("ellipsis", match[1], Fraction(match[1]), significant(match[1]))
        elif self.grouped and (match := _GROUPED.match(text, at)) is not None:
            whole = re.sub(r"\D", "", match[0])
            after = re.compile(r"\.\d+").match(text, match.end())
            whole += after[0] if after else ""
            self._add("number", whole, Fraction(whole), significant(whole) if after else None)
            self.at = after.end() if after else match.end()
            return
        else:
            match = _NUMBER.match(text, at)
            assert match is not None
            self._plain_number(match)
            return
        self.at = match.end()

    def _plain_number(self, match: re.Match[str]) -> None:
        number, end = match[0], match.end()
        exponent = _SCIENTIFIC.match(self.text, end)
        if exponent is not None and (self.scientific or "." in number):
            value = Fraction(number) * Fraction(10) ** int(exponent[1])
            self._add("number", number + exponent[0], value, significant(number))
            end = exponent.end()
        else:
            self._add("number", number, Fraction(number), significant(number) if "." in number else None)
        times = _POWER_OF_TEN.match(self.text, end)
        if times is not None:
            self._add("operator", "*")
            end = times.end()
        self.at = end

    def _command(self) -> None:
        match = _COMMAND.match(self.text, self.at)
        if match is None:
            raise Unreadable("a backslash at the end")
        name, self.at = match[1], match.end()
        if name in _OPERATORS:
            self._add("operator", _OPERATORS[name])
        elif name in _KEPT:
            self._add("operator", name)
        elif name in FUNCTIONS or name in _SAME_FUNCTION:
            self._add("function", _SAME_FUNCTION.get(name, name))
        elif name in GREEK:
            self._add("symbol", "\\" + name.removeprefix("var"))
        elif name in _PROSE or name in _FONTS:
            self._prose(name)
        elif name in ACCENTS:
            self._add("accent", name)
        elif name in _MARKS:
            self._add("mark", name)
        elif name == "R":
            self._add("symbol", "mathbb{R}")
        elif name in ("$", "pounds", "euro"):
            self._add("operator", "$" + {"pounds": "£", "euro": "€"}.get(name, ""))
        elif name in "#&_":
            raise Unreadable(f"\\{name} is no mathematics")
        else:
            raise Unreadable(f"unknown command \\{name}")

    def _prose(self, name: str) -> None:
        """``\\text{...}`` and the like: a connective, a number, a function's name, or plain words."""
        opening = re.compile(r"\s*(?=\{)").match(self.text, self.at)
        inner = braced(self.text, opening.end()) if opening is not None else None
        if opening is None or inner is None:
            raise Unreadable(f"\\{name} without its braces")
        self.at = opening.end() + len(inner) + 2
        words = " ".join(inner.replace("\\", " \\").split())
        lowered = words.strip(" ,;:.").casefold()
        if words in (",", ";", ":"):
            self._add("operator", words)
        elif lowered in ("or", "and", "and also", ", and", ", or"):
            self._add("operator", lowered.split()[0] if lowered[0] != "," else lowered[2:])
        elif lowered == "min" and self.found and self.found[-1].kind == "number":
            self._add("prose", words)
        elif lowered in FUNCTIONS or lowered in _SAME_FUNCTION:
            self._add("function", _SAME_FUNCTION.get(lowered, lowered))
        elif _PLAIN_NAMES.get(lowered) in ("%", "deg"):
            self._add("operator", _PLAIN_NAMES[lowered])
        elif re.fullmatch(r"[-+]?[\d.,/() +-]*\d[\d.,/() +-]*", words) or (
            name in _FONTS and words in ("e", "i", "pi", "d")
        ):
            self.found.extend(tokens(words, grouped=self.grouped, scientific=self.scientific))
        elif name in _FONTS and name != "mathrm":
            self._add("symbol", f"bold{{{words}}}")
        else:
            self._add("prose", words)

    def _word(self, word: str) -> None:
        self.at += len(word)
        if not word.isascii():
            self._add("prose", word)
            return
        after_number = bool(self.found) and self.found[-1].kind == "number"
        lowered = word.casefold()
        if lowered in _PLAIN_NAMES:
            self._add("operator", _PLAIN_NAMES[lowered])
        elif lowered == "min" and after_number:
            self._add("prose", word)
        elif lowered in FUNCTIONS or lowered in _SAME_FUNCTION or lowered in GREEK:
            name = _SAME_FUNCTION.get(lowered, lowered)
            self._add(
                "function" if name in FUNCTIONS else "symbol", name if name in FUNCTIONS else "\\" + word
            )
        elif (len(word) > 1 and (after_number or self.spaced) and (lowered in UNITS or len(word) > 6)) or len(
            word
        ) > 9:
            self._add("prose", word)
        else:
            self._letters(word)

    def _letters(self, word: str) -> None:
        """Adjacent letters are symbols, except names of functions and of pi among them."""
        at = 0
        while at < len(word):
            name = next((n for n in _INNER_NAMES if word.startswith(n, at)), word[at])
            if name in FUNCTIONS:
                self._add("function", name)
            else:
                self._add("operator" if name in _PLAIN_NAMES else "symbol", _PLAIN_NAMES.get(name, name))
            at += len(name)


def significant(text: str) -> int:
    """Significant digits of a decimal as it is written: ``0.0150`` has three.

    Example: ``significant("0.0150") == 3``.
    """
    return max(1, len(text.replace(".", "").lstrip("0")))


def repeating(head: str, block: str) -> Fraction:
    """The value of a decimal whose digits ``block`` repeat forever after ``head``.

    Example: ``repeating("0.1", "6") == Fraction(1, 6)``.
    """
    places = len(head.partition(".")[2])
    whole = Fraction(head if head.strip(".") else "0")
    return whole + Fraction(int(block), (10 ** len(block) - 1) * 10**places)


_OPENING = frozenset(word_list("( [ { {( |( lfloor lceil langle begin"))
_CLOSING = frozenset(word_list(") ] } }) |) rfloor rceil rangle end"))
_NOT_INNER = ("det", "abs", "arg", "sgn", "max", "min")
_INNER_NAMES = [
    *sorted((n for n in FUNCTIONS if len(n) > 2 and n not in _NOT_INNER), key=len, reverse=True),
    "ln",
    "pi",
]
UNITS = frozenset(
    word_list(
        "mm cm dm km nm um in inch inches ft foot feet yd yard yards mile miles meter meters metre "
        "metres centimeter centimeters kilometer kilometers kg mg lb lbs oz gram grams kilogram "
        "kilograms ton tons tonne tonnes sec secs second seconds ms min mins minute minutes hr hrs "
        "hour hours day days week weeks month months year years mph kmh kph liter liters litre "
        "litres ml mL cc gallon gallons dollar dollars cent cents euro euros pound pounds usd rad "
        "rads radian radians unit units sq square cubic percent hz khz mhz ghz pa kpa mpa bar atm "
        "mol mmol kj kw kwh mw ev kev mev gev kn mv kv mah ohm ohms volt volts amp amps watt watts "
        "joule joules newton newtons kelvin celsius fahrenheit people persons students times ways "
        "points apples books coins bits bytes am pm erg ergs dyne dozen hundred thousand million billion trillion "
        "pieces cards girls boys men women cars eggs games pages pens cups balls rows pairs sides faces edges "
        "dogs cats birds trees boxes bags bottles stamps shirts cakes toys seats rooms words rides"
    )
)
"""Plain words that are a unit after a number."""
