"""The verifier of reasoning-gym problems: the package's generators make them, :mod:`table` defines the right answers.

Nothing that a model or a data file wrote is evaluated here. The package's own scorers are used only for data sets of newer
versions, and only in isolation (:func:`needs_isolation`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_ring.data.prompts.sources import UNSUITABLE
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.reward.answers import answer_part, braced, final_answer, last_boxed
from megatron_ring.rl.reward.gym import calculus as gym_calculus
from megatron_ring.rl.reward.gym import puzzles as gym_puzzles
from megatron_ring.rl.reward.gym.table import SCORERS
from megatron_ring.rl.types import RewardResult

MAX_ANSWER_CHARS = 20_000
"""Longest answer; or twice the length of the problem's own answer, if that is more."""

_HELD = "an object with dataset (a name) and entry (question, answer, metadata), as tools/freeze_prompts.py writes it"


def verify_reasoning_gym(prompt: Prompt, text: str) -> RewardResult:
    """1 if the final answer is right for the data set named by ``prompt.reference["dataset"]``.

    ``prompt.reference["entry"]`` is the problem as the data set made it: question, answer, metadata. An empty box counts if
    the right answer is empty.
    """
    dataset, entry = prompt.reference["dataset"], prompt.reference["entry"]
    own = str(entry["answer"])
    answer = final_answer(text)
    if not answer and not (own.strip() in ("", '""') and last_boxed(answer_part(text)) == ""):
        return RewardResult(score=0.0, status="parse_error", detail="no answer")
    if len(answer) > max(MAX_ANSWER_CHARS, 2 * len(own)):
        return RewardResult(score=0.0, status="wrong", detail=f"{len(answer)} characters")
    for bare in _unmarked(answer, dataset in SCORERS):
        if _is_right(dataset, bare, entry):
            return RewardResult(score=1.0, status="correct")
    return RewardResult(score=0.0, status="wrong", detail=answer[:60])


def _is_right(dataset: str, answer: str, entry: Mapping[str, Any]) -> bool:
    if dataset in SCORERS:
        return SCORERS[dataset].right(answer, entry)
    return _packages_scorer(dataset)(answer, entry) == 1.0


_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathtt)\s*(?=\{)")
_MOST_MARKS = 4


def _unmarked(answer: str, ours: bool) -> Iterator[str]:
    """The answer, then the answer without markup, layer by layer: a font, dollars, bold, a fence, a last full stop.

    Example: ``list(_unmarked(r"\text{Yes}.", True)) == [r"\text{Yes}.", r"\text{Yes}", "Yes"]``.
    """
    yield answer
    for _ in range(_MOST_MARKS if ours else 0):
        before = answer
        answer = _peeled(answer.strip())
        if answer == before:
            return
        yield answer


def _peeled(answer: str) -> str:
    font = _FONT.match(answer)
    inner = braced(answer, font.end()) if font is not None else None
    if font is not None and inner is not None and font.end() + len(inner) + 2 == len(answer):
        return inner
    for mark in ("```", "$$", "**", "$", "`"):
        if len(answer) > 2 * len(mark) and answer.startswith(mark) and answer.endswith(mark):
            inner = answer[len(mark) : -len(mark)]
            if mark in inner:
                return answer
            return inner.partition("\n")[2] if mark == "```" and "\n" in inner else inner
    return answer[:-1] if answer.endswith(".") and not answer.endswith("..") else answer


def needs_isolation(dataset: str) -> bool:
    """Is ``dataset`` scored by the package, which may evaluate the answer, rather than by us?"""
    return dataset not in SCORERS


def check_reference(reference: Mapping[str, Any]) -> str | None:
    """Why a problem with this reference cannot be verified, in one line; None if it can.

    For data sets with a scorer of ours, the problem's own answer is verified (or, where that is slow, only read).
    """
    dataset, entry = reference.get("dataset"), reference.get("entry")
    if not isinstance(dataset, str):
        return f"reference.dataset={_short(dataset)} must be text; write {_HELD}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("metadata"), Mapping):
        return f"reference.entry of {_short(dataset)} has no metadata; write {_HELD}"
    if not isinstance(entry.get("answer"), str | int):
        return f"reference.entry.answer={_short(entry.get('answer'))} must be text; write {_HELD}"
    scorer = SCORERS.get(dataset)
    if scorer is None:
        return _check_foreign(dataset)
    missing = [key for key in scorer.reads if key not in entry["metadata"]]
    if missing:
        return f"reference.entry.metadata lacks {', '.join(missing)}, which the verifier of {dataset} needs; write {_HELD}"
    try:
        if _own_answer_is_right(dataset, entry):
            return None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return f"reference.entry of {dataset} cannot be read ({why}); write it as reasoning-gym made it"
    return f"reference.entry of {dataset}: its answer {_short(entry['answer'])} is wrong by its own metadata; correct it"


def _own_answer_is_right(dataset: str, entry: Mapping[str, Any]) -> bool:
    metadata = entry["metadata"]
    if "integrand" in SCORERS[dataset].reads:
        # only read: verifying one antiderivative takes longer than all other data sets together
        return bool(gym_calculus.samples(metadata["integrand"], metadata["variable"]))
    if dataset == "word_ladder":
        return gym_puzzles.is_ladder(entry["answer"], metadata)
    return SCORERS[dataset].right(str(entry["answer"]), entry)


def _check_foreign(dataset: str) -> str | None:
    if dataset in UNSUITABLE:
        return f"reference.dataset={dataset}: {UNSUITABLE[dataset]}; leave the problem out"
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        return f"reference.dataset={_short(dataset)} needs reasoning-gym ({error}); pip install reasoning-gym"
    if dataset not in DATASETS:
        return f"reference.dataset={_short(dataset)} is no data set of reasoning-gym; correct the name"
    return None


def _short(value: object) -> str:
    return repr(value)[:60]


@functools.cache
def load() -> None:
    """Import what the verifier needs, which takes up to some seconds."""
    gym_calculus.is_antiderivative("x**2/2", "x", "x")
    gym_puzzles.dictionary()


@functools.cache
def _packages_scorer(dataset: str) -> Callable[[str, Any], float]:
    from reasoning_gym.factory import get_score_answer_fn

    scorer: Any = get_score_answer_fn(dataset)
    return scorer
