"""The parser: from tokens to a tree. It computes nothing and keeps every symbol.

It raises :class:`Unreadable` for what it cannot parse, and never skips a token. Precedence, lowest first: lists and ``or``;
relations; sets; ratios; sums; products; powers. An operation that is not evaluated (an integral, a limit) becomes a symbol
whose name is its whole text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_ring.rl.reward.mathematics.atoms import OPAQUE, Atoms
from megatron_ring.rl.reward.mathematics.text import Unreadable, word_list
from megatron_ring.rl.reward.mathematics.tokens import MAX_DEPTH, Token, tokens
from megatron_ring.rl.reward.mathematics.words import RELATIONS, Node, divide, product_of, refuse, sign_of

_SIGNS = frozenset(("+", "-", "pm", "mp"))
_STARTS = frozenset(
    word_list(
        "( [ { {( |( frac sqrt binom dbinom tbinom begin sum prod lfloor lceil langle infty pi emptyset varnothing "
        "angle triangle ..."
    )
) | frozenset(OPAQUE)
_LETTER_DIGITS = re.compile(r"(-?[0-9A-Z]*[A-Z][0-9A-Z]*)_\{(\d+)\}")
MAX_POSTFIXES = 4
"""Most signs after one number: ``5!``, ``50\\%``, ``5\\text{ cm}``."""


def read(text: str, *, grouped: bool = True, scientific: bool = True) -> Node:
    """The tree of a normalised text; raises :class:`Unreadable`.

    Example: ``read("1/2").parts[1].kind == "inverse"``.
    """
    if (digits := _LETTER_DIGITS.fullmatch(text)) is not None:  # 3AF_{16} is no product
        return Node("based", (Node("symbol", name=digits[1]),), name=digits[2])
    reader = _Reader(tokens(text, grouped=grouped, scientific=scientific))
    if not reader.words:
        raise Unreadable("nothing to read")
    node = reader.chosen(reader.answer())
    if reader.at < len(reader.words):
        raise Unreadable(f"{reader.words[reader.at].text!r} is out of place")
    return node


class _Reader(Atoms):
    def answer(self) -> Node:
        with self.deeper():
            parts, joiners = [self.relation()], []
            while self.peek() in (",", ";", "or", "and"):
                joiner = self.take().text
                while self.peek() in ("or", "and"):
                    joiner = self.take().text
                if self.at == len(self.words) or self.peek() in (")", "]", "})", "}"):
                    raise Unreadable("a comma with nothing behind it")
                joiners.append(joiner)
                parts.append(self.relation())
        if not joiners:
            return parts[0]
        name = next((joiner for joiner in joiners if joiner in ("or", "and")), ",")
        return Node("list", tuple(parts), name=name)

    def relation(self) -> Node:
        if self.peek() in ("in",):
            raise Unreadable("a relation without its left side")
        parts, names = [self.sets()], []
        if self.peek() == "pmod" or (self.peek() == "(" and self.peek(1) == "mod"):
            return Node("congruence", (parts[0], self._bracketed_modulus()))
        while self.peek() in RELATIONS:
            names.append(self.take().text)
            parts.append(self.sets())
            if self.peek() in ("pmod", "mod") or (self.peek() == "(" and self.peek(1) == "mod"):
                parts.append(self._bracketed_modulus())
        if names == ["equiv"] and len(parts) == 2 and parts[1].name != "mod":
            names = ["="]  # without a modulus, equal for all
        return Node("relation", tuple(parts), name=" ".join(names)) if names else parts[0]

    def _bracketed_modulus(self) -> Node:
        if self.peek() != "(":
            return self._modulus()
        self.take()
        node = self._modulus()
        self.expect(")")
        return node

    def _modulus(self) -> Node:
        self.take()
        return Node("modulus", (self.argument() if self.peek() == "{" else self.sum(),))

    def sets(self) -> Node:
        node = self.ratio()
        signs = 0
        while self.peek() in ("cup", "cap", "setminus"):
            name, signs = self.take().text, signs + 1
            if signs > MAX_DEPTH:
                raise Unreadable(f"more than {MAX_DEPTH} sets")
            node = Node(name, (*(node.parts if node.kind == name == "cup" else (node,)), self.ratio()))
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.peek() == ":" and not self.bars:
            self.take()
            parts.append(self.sum())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def sum(self) -> Node:
        parts: list[Node] = []
        while True:
            sign = ""
            while self.peek() in _SIGNS:
                sign = sign_of(sign, self.take().text)
            node = self.product()
            if sign == "-" and node.kind == "based":
                node = Node("based", (Node("-", node.parts),), name=node.name)
            else:
                node = Node(sign, (node,)) if sign in ("-", "pm", "mp") else node
            parts.append(node)
            if self.peek() not in _SIGNS:
                return parts[0] if len(parts) == 1 else Node("add", tuple(parts))

    def product(self) -> Node:
        parts = [self.factor()]
        while True:
            operator = self.peek()
            if operator in ("*", "/", "mod"):
                self.take()
                sign = ""
                while self.peek() in _SIGNS:
                    sign = sign_of(sign, self.take().text)
                node = self.factor()
                node = Node(sign, (node,)) if sign in ("-", "pm", "mp") else node
                if operator == "mod":
                    if parts[0].name == "mod":
                        raise Unreadable("a remainder of a remainder")
                    parts = [Node("call", (product_of(parts), node), name="mod")]
                else:
                    parts.append(Node("inverse", (node,)) if operator == "/" else node)
            elif self.starts_factor():
                parts.append(self.beside(parts))
            else:
                return product_of(parts)

    def beside(self, parts: list[Node]) -> Node:
        """A factor without a sign; a proper fraction after an integer makes a mixed number."""
        before = parts[-1]
        bare = self.words[self.at - 1].kind == "number" and before.kind == "number" and before.digits is None
        if self.kind() == "number" and self.words[self.at - 1].kind == "number":
            slash = self.peek(1) == "/" and self.kind(2) == "number"
            if not (bare and slash):
                return self._row(parts)
            top, _, bottom = self.take(), self.take(), self.take()
            return self.postfix(self._mixed(parts, top.number, bottom.number))
        is_fraction = bare and self.peek() == "frac"
        node = self.atom()
        if (
            is_fraction
            and node.kind == "multiply"
            and len(node.parts) == 2
            and node.parts[1].kind == "inverse"
        ):
            top, bottom = node.parts[0], node.parts[1].parts[0]
            if top.kind == bottom.kind == "number" and 0 < (top.number or 0) < (bottom.number or 0):
                return self.postfix(self._mixed(parts, top.number, bottom.number))
        return self._raised(node)

    def _row(self, parts: list[Node]) -> Node:
        """Numbers side by side are no product."""
        parts.append(self.factor())
        row = Node("beside", tuple(parts))
        parts.clear()
        return row

    def _mixed(self, parts: list[Node], top: Fraction | None, bottom: Fraction | None) -> Node:
        whole = parts.pop().number
        assert whole is not None and top is not None and bottom is not None
        if not 0 < top < bottom or {top.denominator, bottom.denominator, whole.denominator} != {1}:
            raise Unreadable("two numbers side by side")
        return Node("number", number=whole + top / bottom)

    def starts_factor(self) -> bool:
        kind = self.kind()
        if kind in ("number", "ellipsis", "symbol", "function", "accent"):
            return True
        if self.peek() == "(" and self.peek(1) == "mod":
            return False
        return self.peek() in _STARTS or (self.peek() == "|" and not self.bars)

    def factor(self) -> Node:
        return self._raised(self.atom())

    def _raised(self, atom: Node) -> Node:
        node = self.postfix(atom)
        if self.peek() != "^":
            return node
        self.take()
        with self.deeper():
            exponent = self.exponent()
        return self.postfix(Node("power", (node, exponent)))

    def exponent(self) -> Node:
        sign = ""
        while self.peek() in ("+", "-"):
            sign = sign_of(sign, self.take().text)
        node = self.argument() if self.peek() == "{" else self.atom()
        if self.peek() == "^" and not self.degrees():  # a tower without braces stands on its right end
            self.take()
            with self.deeper():
                node = Node("power", (node, self.exponent()))
        return Node("-", (node,)) if sign == "-" else node

    def postfix(self, node: Node) -> Node:
        """Factorials, primes, subscripts of numbers, degrees, percent and units after an atom."""
        for _ in range(MAX_POSTFIXES):
            if self.peek() == "!" and node.kind != "factorial":
                self.take()
                if self.peek() == "!":
                    self.take()
                    node = Node("call", (node,), name="double factorial")
                else:
                    node = Node("factorial", (node,))
            elif self.peek() == "_" and node.kind == "number":
                self.take()
                node = Node("based", (node,), name=self.canonical_argument())
            elif self.degrees():
                node = Node("degrees", (node,)) if node.kind != "degrees" else refuse("two signs of degrees")
                if self.kind() == "symbol" and self.words[self.at].text in ("C", "F"):
                    node = Node("unit", (node,), name={"C": "celsius", "F": "fahrenheit"}[self.take().text])
            elif self.peek() == "%" and node.kind != "percent":
                self.take()
                node = Node("percent", (node,))
            elif self.peek().startswith("$"):
                node = Node("unit", (node,), name=self.take().text)
            elif self.kind() == "prose" and node.kind != "unit":
                node = Node("unit", (node,), name=self.unit())
            else:
                return node
        raise Unreadable("too many signs behind one number")

    def degrees(self) -> bool:
        """Consume ``^\\circ`` in any of its spellings."""
        if self.peek() == "deg":
            self.take()
            return True
        ahead = [self.words[at].text for at in range(self.at, min(self.at + 4, len(self.words)))]
        for spelling in (["^", "circ"], ["^", "{", "circ", "}"], ["^", "{", "deg", "}"], ["^", "deg"]):
            if ahead[: len(spelling)] == spelling:
                self.at += len(spelling)
                return True
        return False

    def unit(self) -> str:
        """The text of a unit: prose, and what joins it to more prose."""
        words = [self.take().text]
        while self.at < len(self.words):
            if self.kind() == "prose":
                words.append(" " + self.take().text)
            elif self.peek() in ("/", "*") and self.kind(1) == "prose":
                words.append(self.take().text + self.take().text)
            elif self.peek() == "^" and self.words[self.at - 1].kind in ("prose", "symbol"):
                self.take()
                words.append("^" + self.canonical_argument())
            else:
                break
        return "".join(words)

    def argument(self) -> Node:
        """``{...}``, or one token; of a number its first digit, as in TeX."""
        if self.peek() == "{":
            self.take()
            node = self.chosen(self.answer())
            self.expect("}")
            return node
        with self.deeper():
            if (
                self.kind() == "number"
                and self.words[self.at].text.isdigit()
                and len(self.words[self.at].text) > 1
            ):
                token = self.words[self.at]
                rest = token.text[1:]
                self.words[self.at] = Token("number", rest, False, Fraction(rest))
                node = Node("number", number=Fraction(token.text[0]))
            else:
                node = self.atom()
        return node

    def chosen(self, node: Node) -> Node:
        """``\\choose`` or ``\\over`` with what precedes it."""
        if self.peek() not in ("choose", "over"):
            return node
        name, other = self.take().text, self.answer()
        return Node("call", (node, other), name="binom") if name == "choose" else divide(node, other)
