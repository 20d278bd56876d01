"""The part of pytest that unit tests of code problems use. Read as text, run in the sandbox; never imported."""

import math
import re


class raises:
    """``with raises(ValueError, match="text"):`` or ``raises(ValueError, function, argument)``."""

    def __new__(cls, expected, *words, match=None, **named):
        made = object.__new__(cls)
        made.expected, made.match, made.value = expected, match, None
        if words:
            with made:
                words[0](*words[1:], **named)
        return made

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError(f"{self.match} is not in {error}")
        self.value, self.type = error, kind
        return True


class approx:
    """Equal to a number, or to numbers in a list, tuple or dict, within rel=1e-6 or abs=1e-12."""

    def __init__(self, expected, rel=1e-6, abs=1e-12, nan_ok=False):
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel or 0.0, abs or 0.0, nan_ok

    def __eq__(self, actual):
        return self.same(actual, self.expected)

    def same(self, actual, expected):
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self.same(actual[key], value) for key, value in expected.items())
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(actual, list | tuple)
                and len(actual) == len(expected)
                and all(map(self.same, actual, expected))
            )
        if not isinstance(actual, int | float | complex):
            return actual == expected
        if actual == expected or (self.nan_ok and math.isnan(actual) and math.isnan(expected)):
            return True
        return abs(actual - expected) <= max(self.rel * abs(expected), self.abs)

    __hash__ = None


class mark:
    """Marks; only parametrize has an effect here."""

    @staticmethod
    def parametrize(names, rows, ids=None):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def marked(function):
            before = getattr(function, "parameters", [{}])
            function.parameters = [
                {**words, **dict(zip(names, row if len(names) > 1 else [row], strict=True))}
                for words in before
                for row in rows
            ]
            return function

        return marked


def fail(reason="", pytrace=True):
    raise AssertionError(reason)


def main(*words):
    """Does nothing: tests that are defined are collected anyway."""
