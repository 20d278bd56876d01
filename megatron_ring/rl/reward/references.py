"""Problems that nobody can judge: every answer to them would be wrong, so they are refused before the first one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from megatron_ring.data.problem_lines import Problem
from megatron_ring.data.prompt_sources import GYM_DOMAIN, JsonlSource, PromptSource
from megatron_ring.errors import DataError
from megatron_ring.rl.reward import code, gym, math_answer

SHOWN = 5
"""Problems that the line names."""


def check_sources(sources: Iterable[PromptSource], own_domains: Collection[str] = ()) -> None:
    """Look at every problem that was written, not generated, and has a built-in judge.

    Args:
        sources: of problems.
        own_domains: those with a reward function of the user's, whose references are the function's affair.

    Raises:
        DataError: some cannot be judged; the first ones are named by file and line.
    """
    found = [
        f"{source[index].origin}: {reason}"
        for source in sources
        if isinstance(source, JsonlSource)
        for index in range(len(source))
        if source[index].domain not in own_domains and (reason := unjudgeable(source[index])) is not None
    ]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise DataError(
            f"{'; '.join(found[:SHOWN])}{more}: {count} that nobody can judge; correct or remove the lines"
        )


def unjudgeable(problem: Problem) -> str | None:
    """Why no answer to the problem could be right, or None. Other domains than the built-in ones have no rule here.

    Example: for ``Problem(domain="code", ..., reference={"tests": []})`` that is "tests is empty".
    """
    check = _CHECKS.get(problem.domain)
    return None if check is None else check(problem.reference)


def _mathematics(reference: Mapping[str, Any]) -> str | None:
    return _answer(reference, getattr(math_answer, "check_reference", _check_answer))


def _science(reference: Mapping[str, Any]) -> str | None:
    return _answer(reference, getattr(math_answer, "check_science_reference", _check_answer))


def _answer(reference: Mapping[str, Any], check: Callable[[str], str | None]) -> str | None:
    if "answer" not in reference:
        return f"no answer in it, only {', '.join(reference)}"
    answer = reference["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"answer={answer!r:.60} must be text or a number"
    return check(str(answer))


def _code(reference: Mapping[str, Any]) -> str | None:
    return getattr(code, "check_reference", _check_code)(reference)


def _gym(reference: Mapping[str, Any]) -> str | None:
    return getattr(gym, "check_reference", _check_gym)(reference)


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "math": _mathematics,
    "science": _science,
    "code": _code,
    GYM_DOMAIN: _gym,
}


def _check_answer(answer: str) -> str | None:
    if not answer.strip():
        return "answer is empty"
    return None if re.search(r"[0-9A-Za-z\\]", answer) else f"answer={answer!r:.60} cannot be read"


def _check_code(reference: Mapping[str, Any]) -> str | None:
    tests = reference.get("tests")
    if not isinstance(tests, list) or not tests:
        return "tests is empty" if tests == [] else f"tests={tests!r:.60} must be a list of tests"
    language, mode = reference.get("language", "python"), reference.get("mode", "stdin")
    if language not in ("python", "cpp", "java") or mode not in ("stdin", "function", "unit_test"):
        return f"language={language!r:.40} and mode={mode!r:.40} are not known together"
    if mode == "function" and not reference.get("function"):
        return "mode=function needs the name of the function under function"
    for number, test in enumerate(tests, 1):
        if mode == "unit_test" and not isinstance(test, str):
            return f"test {number} must be the source of a test"
        if mode != "unit_test" and not (isinstance(test, dict) and {"input", "output"} <= test.keys()):
            return f"test {number} must have input and output"
    return None


def _check_gym(reference: Mapping[str, Any]) -> str | None:
    entry = reference.get("entry")
    if not isinstance(reference.get("dataset"), str) or not isinstance(entry, dict) or "answer" not in entry:
        return "reference must have the dataset and the entry that it generated, as tools/freeze_prompts.py writes them"
    return None
