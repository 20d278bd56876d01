"""The tree that the parser builds, and the tokens that it consumes one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

from megatron_ring.rl.reward.mathematics.text import Unreadable, word_list
from megatron_ring.rl.reward.mathematics.tokens import MAX_DEPTH, Token


@dataclass(frozen=True, slots=True)
class Node:
    """One operation and its operands.

    Example: ``x+0.5`` is ``Node("add", (Node("symbol", name="x"), Node("number", number=Fraction(1, 2), digits=1)))``.
    """

    kind: str
    parts: tuple[Node, ...] = ()
    name: str = ""
    number: Fraction | None = None
    digits: int | None = None


RELATIONS = frozenset(
    word_list(
        "= < > <= >= != ~ in notin subset subseteq supset equiv perp parallel sim propto to "
        "rightarrow mapsto implies Rightarrow iff Leftrightarrow"
    )
)
_ENDS = frozenset(word_list(", ; or and ) ] } }) |) & cr end"))


class Words:
    """The remaining tokens, the nesting depth, and whether the parser is between bars."""

    def __init__(self, words: list[Token]) -> None:
        self.words, self.at, self.depth, self.bars = words, 0, 0, 0

    def peek(self, ahead: int = 0) -> str:
        """The next token's text if it is an operator; else, and at the end, empty."""
        at = self.at + ahead
        return self.words[at].text if at < len(self.words) and self.words[at].kind == "operator" else ""

    def kind(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.words[at].kind if at < len(self.words) else "end"

    def take(self) -> Token:
        if self.at >= len(self.words):
            raise Unreadable("it ends too early")
        self.at += 1
        return self.words[self.at - 1]

    def expect(self, *texts: str) -> str:
        if self.peek() not in texts:
            found = self.words[self.at].text if self.at < len(self.words) else "the end"
            raise Unreadable(f"{texts[0]!r} was expected and {found!r} found")
        return self.take().text

    def canonical_argument(self) -> str:
        """The text of a subscript or of a unit's power, without its braces."""
        if self.peek() != "{":
            return self.take().text if self.peek() != "-" else self.take().text + self.take().text
        return self.canonical_group()

    def canonical_group(self) -> str:
        self.expect("{")
        depth = 1
        words: list[str] = []
        while depth:
            token = self.take()
            depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "operator" else 0
            words.append(token.text)
        return " ".join(words[:-1])

    def opaque(self, name: str) -> Node:
        """An operation that is not evaluated: a symbol whose name is its text up to a relation or a closing bracket."""
        words, depth = [name], 0
        while self.at < len(self.words):
            token = self.words[self.at]
            if token.kind == "operator":
                if depth == 0 and (
                    token.text in RELATIONS - {"to", "rightarrow", "in"} or token.text in _ENDS
                ):
                    break
                depth += (token.text in ("(", "[", "{", "{(", "|(")) - (
                    token.text in (")", "]", "}", "})", "|)")
                )
            words.append(self.take().text)
        return Node("symbol", name=" ".join(words))

    @contextlib.contextmanager
    def deeper(self) -> Generator[None]:
        """One level of nesting; raises Unreadable if there are too many."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH}")
        yield
        self.depth -= 1


def sign_of(before: str, sign: str) -> str:
    if sign in ("pm", "mp"):
        return sign if before in ("", "+") else refuse("two signs side by side")
    if before in ("pm", "mp"):
        return refuse("two signs side by side")
    return "-" if (before == "-") != (sign == "-") else "+"


def refuse(why: str) -> NoReturn:
    """Raise Unreadable, in an expression."""
    raise Unreadable(why)


def divide(top: Node, bottom: Node) -> Node:
    return Node("multiply", (top, Node("inverse", (bottom,))))


def product_of(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Node("multiply", tuple(parts))
