"""What a value may be, written on its field: ``lr: Annotated[float, Above(0, remedy="try 3e-4")] = 3e-4``.

``config/settings.py`` reads these: they are in ``--help``, and a value that does not fit is one line. On a tuple's
items (``tuple[Annotated[int, AtLeast(0)], ...]``) they hold for each item; None is never compared.
"""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class Range:
    """``remedy`` ends the error's line; without one it is "set --the-flag"."""

    remedy: str = ""

    def holds(self, value: float) -> bool:
        """Does ``value`` fit?"""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """What the value must be. Example: ``AtLeast(0, below=1).words`` is ``"from 0 to below 1"``."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Range):
    """``least`` or more. Example: ``AtLeast(1)`` is ``"at least 1"``."""

    least: float
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value < self.below

    @property
    def words(self) -> str:
        return (
            f"at least {self.least}" if self.below == math.inf else f"from {self.least} to below {self.below}"
        )


@dataclass(frozen=True)
class Above(Range):
    """More than ``low``. Example: ``Above(0, at_most=1)`` is ``"above 0 and at most 1"``."""

    low: float
    at_most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low < value <= self.at_most

    @property
    def words(self) -> str:
        if self.at_most == math.inf:
            return f"above {self.low}" if self.low else "positive"
        return f"above {self.low} and at most {self.at_most}"


@dataclass(frozen=True)
class AtMost(Range):
    """``most`` or less. Example: ``AtMost(100)`` is ``"at most 100"``."""

    most: float

    def holds(self, value: float) -> bool:
        return value <= self.most

    @property
    def words(self) -> str:
        return f"at most {self.most}"


@dataclass(frozen=True)
class Between(Range):
    """``low`` to ``high``, both included. Example: ``Between(0, 1)`` is ``"from 0 to 1"``."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def words(self) -> str:
        return f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class ZeroOrAbove(Range):
    """0, which switches off, or more than ``low``. Example: ``ZeroOrAbove(1)`` is ``"0 (off) or above 1"``."""

    low: float

    def holds(self, value: float) -> bool:
        return value == 0 or value > self.low

    @property
    def words(self) -> str:
        return f"0 (off) or above {self.low}"


@dataclass(frozen=True)
class OneOf:
    """On text: one of ``names``, a list that is kept elsewhere or that a user may extend (otherwise use
    ``Literal``).

    Example: ``objective: Annotated[str, OneOf(("c3po", "grpo"), importable=True)] = "c3po"``.
    """

    names: tuple[str, ...]
    importable: bool = False
    """True when a user's ``module:name`` is allowed as well."""


Count = Annotated[int, AtLeast(1)]
CountOrOff = Annotated[int, AtLeast(0)]
