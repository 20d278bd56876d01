"""Inputs that people outside have reported against other projects, each with the value it ought to have.

A folder holds one report: its files as they are, and a README that says where it comes from and what is expected.
The modules here (one per area) run them: ``rows()`` yields a :class:`Row` for every input. ``python -m tests.cases``
prints the whole table.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One input of a case, what it ought to give and what it gave.

    Example: ``Row(case="math_tiny_values", given="1e-20 for 1e-21", expected=0.0, got=0.0)``.
    """

    case: str
    given: str
    expected: Any
    got: Any


def lines(case: str, name: str = "cases.jsonl") -> list[dict[str, Any]]:
    """The objects of one of a case's JSONL files."""
    text = (FOLDER / case / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def areas() -> list[str]:
    """Names of the modules here that have rows."""
    names = [module.name for module in pkgutil.iter_modules([str(FOLDER)])]
    return [name for name in names if name.endswith("_cases") and name != "test_cases"]


def rows(area: str) -> Iterator[Row]:
    """What the inputs of one area give. A case that this machine cannot run raises ``unittest.SkipTest``."""
    yield from importlib.import_module(f"tests.cases.{area}").rows()
