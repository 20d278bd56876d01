"""Parsing of atoms: the operands between operators, from a letter to a matrix."""

from __future__ import annotations

from fractions import Fraction

from megatron_ring.rl.reward.mathematics.text import Unreadable, word_list
from megatron_ring.rl.reward.mathematics.words import Node, Words, divide, product_of, sign_of

OPAQUE = frozenset(word_list("int iint oint lim forall exists neg"))
_CLOSERS = {"(": (")", "]"), "[": (")", "]"), "{(": ("})",), "langle": ("rangle",)}
_BY_NAME = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil"), "|(": ("|)", "abs")}
_MATRICES = frozenset(
    ["matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array"]
)
_APPLIED = frozenset(word_list("f F g h G p \\Gamma \\zeta \\phi \\varphi \\sigma \\tau \\psi"))
"""Names that a bracket applies to a letter or a number; some to anything that stands in it."""
_ALWAYS_APPLIED = frozenset(word_list("f F \\Gamma \\zeta"))
_INVERSES = frozenset(word_list("arcsin arccos arctan arccot arcsinh arccosh arctanh"))


class Atoms(Words):
    """The part of the parser for atoms; their contents are parsed by the grammar that inherits this."""

    def answer(self) -> Node:
        raise NotImplementedError

    def product(self) -> Node:
        raise NotImplementedError

    def factor(self) -> Node:
        raise NotImplementedError

    def exponent(self) -> Node:
        raise NotImplementedError

    def argument(self) -> Node:
        raise NotImplementedError

    def beside(self, parts: list[Node]) -> Node:
        raise NotImplementedError

    def starts_factor(self) -> bool:
        raise NotImplementedError

    def atom(self) -> Node:
        kind = self.kind()
        if kind == "operator":
            return self.structure(self.take().text)
        token = self.take()
        if kind == "number":
            padded = token.text if token.text.isdigit() and token.text[0] == "0" < token.text else ""
            return Node("number", number=token.number, digits=token.digits, name=padded)
        if kind == "ellipsis":
            return Node("ellipsis", number=token.number, digits=token.digits, name=token.text)
        if kind == "function":
            return self.function(token.text)
        if kind == "symbol":
            return self.symbol(token.text)
        if kind == "accent":
            text = self.canonical_argument()
            return self.symbol(f"{token.text}{{{text}}}" if token.text != "mathrm" else text)
        if kind == "mark" or not token.text.isascii():
            raise Unreadable(f"{token.text[:20]!r} is no mathematics")
        return self.symbol(f"text{{{token.text.casefold()}}}")

    def symbol(self, name: str) -> Node:
        """A letter with its primes and subscripts; ``e`` and ``i`` are constants unless marked."""
        plain = name
        while True:
            if self.peek() == "_":
                self.take()
                name += "_" + self.canonical_argument()
            elif self.peek() == "'":
                self.take()
                name += "'"
            else:
                break
        if name in ("e", "i", "pi", "\\pi"):
            return Node("constant", name=name.removeprefix("\\"))
        if plain in _APPLIED and self.peek() == "(":
            closing = next((n for n in range(1, 6) if self.peek(n) == ")"), 0)
            if plain in _ALWAYS_APPLIED or closing == 2:
                start = self.at
                self.structure(self.take().text)
                name += "(" + " ".join(word.text for word in self.words[start + 1 : self.at])
        return Node("symbol", name=name)

    def function(self, name: str) -> Node:
        if name == "sqrt":
            return self.root()
        base = exponent = None
        while self.peek() in ("_", "^") and not self._degrees_ahead():
            if self.take().text == "_":
                base = self.argument()
            else:
                exponent = self.exponent()
        with self.deeper():
            arguments = self.arguments()
        if base is not None:
            arguments = (*arguments, base)
        if exponent == Node("-", (Node("number", number=Fraction(1)),)) and f"arc{name}" in _INVERSES:
            return Node("call", arguments, name=f"arc{name}")
        node = Node("call", arguments, name=name)
        return node if exponent is None else Node("power", (node, exponent))

    def _degrees_ahead(self) -> bool:
        return self.peek() == "^" and (self.peek(1) == "circ" or self.peek(2) == "circ")

    def arguments(self) -> tuple[Node, ...]:
        """The arguments of a function: a bracket, or the product up to the next sign or function."""
        if self.peek() in ("(", "{", "["):
            node = self.argument() if self.peek() == "{" else self.structure(self.take().text)
            return node.parts if node.kind == "tuple" else (node,)
        sign = ""
        while self.peek() in ("+", "-"):
            sign = sign_of(sign, self.take().text)
        parts = [self.factor()]
        while self.starts_factor() and self.kind() != "function" and self.peek() not in ("(", "["):
            parts.append(self.beside(parts))
        node = product_of(parts)
        return (Node("-", (node,)) if sign == "-" else node,)

    def root(self) -> Node:
        index = Node("number", number=Fraction(2))
        if self.peek() == "[":
            self.take()
            index = self.answer()
            self.expect("]")
        if self.kind() == "number":
            token = self.take()
            body = Node("number", number=token.number, digits=token.digits)
        elif self.peek() in ("(", "["):
            body = self.structure(self.take().text)
        else:
            body = self.argument()
        return Node("root", (body, index))

    def structure(self, name: str) -> Node:
        """An atom that begins with an operator or a command."""
        if name in _CLOSERS:
            return self.brackets(name)
        if name == "{":
            self.at -= 1
            return self.argument()
        if name in _BY_NAME or name == "|":
            return self.enclosed(name)
        if name == "frac":
            if (opaque := self._derivative()) is not None:
                return opaque
            return divide(self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("binom", "dbinom", "tbinom"):
            return Node("call", (self.argument(), self.argument()), name="binom")
        if name in ("infty", "pi"):
            return Node("constant", name=name)
        if name in ("emptyset", "varnothing"):
            return Node("set")
        if name == "begin":
            return self.matrix()
        if name in ("sum", "prod"):
            return self.repeated(name)
        if name in ("angle", "triangle"):
            letters = [self.take().text]
            while self.kind() == "symbol":
                letters.append(self.take().text)
            return Node("symbol", name=f"{name}{{{''.join(letters)}}}")
        if name in OPAQUE:
            return self.opaque(name)
        if name == "...":
            return Node("symbol", name="...")
        if name.startswith("$"):
            return Node("unit", (self.factor(),), name=name)
        raise Unreadable(f"{name!r} is out of place")

    def _derivative(self) -> Node | None:
        """``\\frac{d}{dx}`` and the like stand for an operation: the rest is one name."""
        ahead = [word.text for word in self.words[self.at : self.at + 3]]
        if ahead[:1] == ["{"] and ahead[1:2] in (["d"], ["\\partial"]) and ahead[2:3] in (["}"], ["^"]):
            return self.opaque("derivative")
        return None

    def brackets(self, opening: str) -> Node:
        if self.peek() in _CLOSERS[opening]:
            self.take()
            return Node("set") if opening == "{(" else Node("tuple", name=opening + ")")
        bars, self.bars = self.bars, int(opening == "{(")
        node = self.answer()
        if opening == "{(" and self.peek() in ("|", ":"):
            self.take()
            node = Node("builder", (node, self.answer()))
        closing = self.expect(*_CLOSERS[opening])
        self.bars = bars
        if opening == "{(":
            return node if node.kind == "builder" else Node("set", items_of(node))
        if node.kind == "list" and node.name == ",":
            return Node("tuple", node.parts, name="()" if opening == "langle" else opening + closing)
        if opening + closing not in ("()", "[]"):
            raise Unreadable("an interval of one number")
        return Node("tuple", (node,), name="<>") if opening == "langle" else node

    def enclosed(self, opening: str) -> Node:
        closing, name = _BY_NAME.get(opening, ("|", "abs"))
        bars, self.bars = self.bars, self.bars + (opening == "|")
        if self.peek() == closing:
            raise Unreadable("bars around nothing")
        node = self.answer()
        self.expect(closing, *(("|",) if closing == "|)" else ()))
        self.bars = bars
        return Node("call", (node,), name=name)

    def matrix(self) -> Node:
        name = self.canonical_group().replace(" ", "")
        if name not in _MATRICES:
            raise Unreadable(f"environment {name[:20]}")
        if name == "array" and self.peek() == "{":
            self.canonical_group()
        rows: list[list[Node]] = [[]]
        while self.peek() != "end":
            if self.peek() == "cr":
                self.take()
                if self.peek() != "end":
                    rows.append([])
                continue
            rows[-1].append(self.answer())
            if self.peek() == "&":
                self.take()
            elif self.peek() not in ("cr", "end"):
                raise Unreadable("a matrix that does not end")
        self.take()
        if self.canonical_group().replace(" ", "") != name:
            raise Unreadable("environments that do not match")
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise Unreadable("rows of a matrix that differ in length")
        kind = {"vmatrix": "determinant"}.get(name, "matrix")
        return Node(kind, tuple(Node("row", tuple(row)) for row in rows))

    def repeated(self, name: str) -> Node:
        """A sum or product: variable, first and last value, and the product that follows."""
        start = self.at
        if self.peek() == "_" and self.peek(1) == "{":
            self.at += 2
            begin = self.answer()
            self.expect("}")
            if begin.kind == "relation" and begin.name == "=" and self.peek() == "^":
                self.take()
                end = self.exponent()
                return Node(name, (begin.parts[0], begin.parts[1], end, self.product()))
        self.at = start
        return self.opaque(name)


def items_of(node: Node) -> tuple[Node, ...]:
    return node.parts if node.kind == "list" else (node,)
