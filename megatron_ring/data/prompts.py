"""Problems to answer: what a policy is asked, and what its answer is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw from the stream of problems.

    ``uid`` counts the draws of a run (resumes included), so that no two prompts of a run share one.
    ``tokens`` end with the generation prompt: a response goes on from there. ``domain`` names the reward
    function; ``reference`` is what that function needs.

    Example: ``Prompt(uid=17, domain="math", text="12 + 7 - 3 = ?", tokens=(5, 88, 41, 6),
    reference={"answer": "16"})``.
    """

    uid: int
    domain: str
    text: str
    tokens: tuple[int, ...]
    reference: Mapping[str, Any]
