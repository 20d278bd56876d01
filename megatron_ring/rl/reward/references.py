"""Refuse problems that no verifier can check: every response to them would score 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from megatron_ring.data.prompts.problem_lines import Problem
from megatron_ring.data.prompts.sources import GYM_DOMAIN, JsonlSource, PromptSource
from megatron_ring.errors import DataError
from megatron_ring.rl.reward.code import verifier as code
from megatron_ring.rl.reward.gym import verifier as gym
from megatron_ring.rl.reward.mathematics import verifier as mathematics

SHOWN = 5
"""Problems that the error line names."""


def check_sources(sources: Iterable[PromptSource], own_domains: Collection[str] = ()) -> None:
    """Check every problem that comes from a file and has a built-in verifier.

    Args:
        sources: the sources of problems.
        own_domains: domains with a user's reward function; their references are not checked.

    Raises:
        DataError: some problems cannot be verified; the first ones are named by file and line.
    """
    found = [
        f"{source[index].origin}: {reason}"
        for source in sources
        if isinstance(source, JsonlSource)
        for index in range(len(source))
        if source[index].domain not in own_domains and (reason := unverifiable(source[index])) is not None
    ]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise DataError(
            f"{'; '.join(found[:SHOWN])}{more}: {count} that no verifier can check; correct or remove the lines"
        )


def unverifiable(problem: Problem) -> str | None:
    """Why no answer to the problem could be right, or None. Domains that are not built in have no rule here.

    Example: for ``Problem(domain="code", ..., reference={"tests": []})`` that is "tests is empty".
    """
    check = _CHECKS.get(problem.domain)
    return None if check is None else check(problem.reference)


def _mathematics(reference: Mapping[str, Any]) -> str | None:
    return _answer(reference, mathematics.check_reference)


def _science(reference: Mapping[str, Any]) -> str | None:
    return _answer(reference, mathematics.check_science_reference)


def _answer(reference: Mapping[str, Any], check: Callable[[str], str | None]) -> str | None:
    if "answer" not in reference:
        return f"no answer in it, only {', '.join(reference)}"
    answer = reference["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"answer={answer!r:.60} must be text or a number"
    if isinstance(answer, float) and not math.isfinite(answer):
        return (
            f"answer={answer} is no number that an answer could equal; write the answer, or remove the line"
        )
    return check(str(answer))


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "math": _mathematics,
    "science": _science,
    "code": code.check_reference,
    GYM_DOMAIN: gym.check_reference,
}
