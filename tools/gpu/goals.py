"""Speed goals of the kernels on an H100 or H200, and whether they are met."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """``at_least`` of ``unit`` (a key of a row of ours) in the row whose name begins with ``what``."""

    what: str
    unit: str
    at_least: float

    def said(self, value: float) -> str:
        return (
            f"{value:.0%} of the memory's peak" if self.unit == "peak_share" else f"{value:,.0f} {self.unit}"
        )


GOALS = (
    Goal("grouped GEMM forward, ", "TFLOP/s", 500),
    Goal("grouped GEMM dgrad, ", "TFLOP/s", 500),
    Goal("grouped GEMM wgrad, ", "TFLOP/s", 400),
    Goal("MoE layer forward+backward, ", "TFLOP/s", 413),
    Goal("log p + entropy forward, ", "peak_share", 0.85),
    Goal("log p + entropy backward, ", "peak_share", 0.80),
)


@dataclass(frozen=True)
class Verdict:
    """Example: ``Verdict("grouped GEMM forward", "500 TFLOP/s", "512 TFLOP/s", True)``; nothing seen is not met."""

    what: str
    goal: str
    seen: str
    met: bool


def verdicts(rows: Sequence[dict[str, Any]], device: str, tiny: bool) -> list[Verdict]:
    """One for each goal, with balanced experts (skewed rows have no goal); empty on other cards and at tiny
    sizes."""
    # the PCIe and NVL cards have less
    if tiny or not re.search(r"\bH[12]00\b(?! (PCIe|NVL))", device):
        return []
    found = []
    for goal in GOALS:
        of_goal = (row for row in rows if row["what"].startswith(goal.what) and row["who"] == "ours")
        row = next((row for row in of_goal if not row["what"].endswith("skewed")), None)
        value = None if row is None else row.get(goal.unit)
        found.append(
            Verdict(
                what=goal.what.removesuffix(", "),
                goal=goal.said(goal.at_least),
                seen="not measured" if value is None else goal.said(value),
                met=value is not None and value >= goal.at_least,
            )
        )
    return found
