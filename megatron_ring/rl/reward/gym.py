"""Problems of reasoning-gym: each data set brings the verifier of its own answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_ring.data.prompts import Prompt
from megatron_ring.rl.reward.answers import final_answer
from megatron_ring.rl.types import RewardResult


def judge_reasoning_gym(prompt: Prompt, text: str) -> RewardResult:
    """1 if the data set named by ``prompt.reference["dataset"]`` gives the final answer its full score.

    Data sets give part of the score to text that merely contains the answer; here that is wrong.
    ``prompt.reference["entry"]`` is the problem as the data set made it: question, answer, metadata.
    """
    answer = final_answer(text)
    if not answer:
        return RewardResult(score=0.0, status="parse_error", detail="no answer")
    score = _scorer(prompt.reference["dataset"])(answer, prompt.reference["entry"])
    if score == 1.0:
        return RewardResult(score=1.0, status="correct")
    return RewardResult(score=0.0, status="wrong", detail=answer[:60])


@functools.cache
def load() -> None:
    """Import what judging needs, which takes up to seconds."""
    import reasoning_gym  # noqa: F401


@functools.cache
def _scorer(dataset: str) -> Callable[[str, Any], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(dataset)


_EVALUATES = frozenset(
    {
        "spiral_matrix",
        "n_queens",
        "binary_matrix",
        "string_insertion",
        "countdown",
        "puzzle24",
        "simple_integration",
        "intermediate_integration",
        "polynomial_multiplication",
    }
)


def needs_walls(dataset: str) -> bool:
    """Whether the data set's own scorer evaluates the answer."""
    return dataset in _EVALUATES or dataset == "of_a_later_version"


def check_reference(reference: Any) -> str | None:
    return None
