"""The data types of an RL step.

Legend: R response tokens (end of sequence included), P prompt tokens, L layers with experts, K experts per
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megatron_ring.data.prompts.stream import Prompt

StopReason = Literal["eos", "length", "unfinished"]
"""eos: ended by a stop token, which is its last token. length: cut at the longest allowed response.
unfinished: generation stopped, and the next step continues it with its policy."""

RewardStatus = Literal[
    "correct",
    "wrong",
    "parse_error",
    "timeout",
    "memory",
    "crashed",
    "compile_error",
    "output_limit",
    "verifier_error",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """A verifier's result for one response; a failure of the response is a value, never an exception.

    Example: ``RewardResult(score=0.0, status="timeout", detail="test 3 of 8: 5.0 s")``.
    """

    score: float
    status: RewardStatus
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Response:
    """One sampled answer.

    ``logprobs_R`` are at the sampling temperature, before top-p and top-k, NaN where the engine does not know them;
    ``versions_R`` is the policy version that sampled each token. ``routes_SLK`` (S = P + R - 1: every position that was
    fed to the model) holds the engine's expert choices, for replay; None where they were not asked for.

    Example: ``Response(prompt_uid=17, sample=3, tokens_R=int32[42, 7, 2], logprobs_R=float32[-.1, -.7, -.01],
    versions_R=int32[5, 5, 5], stop="eos")``.
    """

    prompt_uid: int
    sample: int
    tokens_R: np.ndarray
    logprobs_R: np.ndarray
    versions_R: np.ndarray
    stop: StopReason
    routes_SLK: np.ndarray | None = None

    @property
    def length(self) -> int:
        """R, response tokens."""
        return len(self.tokens_R)

    @property
    def key(self) -> tuple[int, int]:
        """Identifies the response within the run."""
        return (self.prompt_uid, self.sample)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """A response with its prompt, its reward and, once assigned, the advantage of each of its tokens.

    ``arrival`` is when it ended, the same at every layout: policy version, round of that step, and tokens that it
    gained in that round. ``advantages_R`` is float32[R]: the same number everywhere for group-relative
    estimators. ``values_R`` and ``returns_R`` (float32[R], with a critic) are what the advantages were computed
    from and what the critic learns. They stay fixed, also for tokens that a later step trains on.

    A step may train on a part and carry the rest over: the tokens before ``start`` were trained on in an earlier step, and
    ``carried`` counts the steps since the response was first on offer.
    """

    prompt: Prompt
    response: Response
    reward: RewardResult
    arrival: tuple[int, int, int] = (0, 0, 0)
    advantages_R: np.ndarray | None = None
    values_R: np.ndarray | None = None
    returns_R: np.ndarray | None = None
    start: int = 0
    carried: int = 0

    @property
    def num_tokens(self) -> int:
        """P + R."""
        return len(self.prompt.tokens) + self.response.length

    @property
    def unused(self) -> int:
        """Response tokens that no step has trained on."""
        return self.response.length - self.start


class RolloutMeta(NamedTuple):
    """What every rank knows of every rollout on offer; its index in the job's list is what a :class:`Pick` names.

    ``uid`` (of the prompt) and ``sample`` are the response's key: no two share one. ``length`` counts response
    tokens; ``arrival`` orders finished responses; ``start`` and ``carried`` are the rollout's. ``version`` is that of its
    oldest token. ``rank`` has the rollout, at ``local_index`` of its own list.

    Example: ``RolloutMeta(uid=17, sample=3, length=118, arrival=5)``.
    """

    uid: int
    sample: int
    length: int
    arrival: int | tuple[int, int, int]
    zero_advantage: bool = False
    start: int = 0
    carried: int = 0
    prompt_tokens: int = 1
    score: float = 0.0
    version: int = 0
    rank: int = 0
    local_index: int = 0

    @property
    def unused(self) -> int:
        """Response tokens that no step has trained on."""
        return self.length - self.start


class Pick(NamedTuple):
    """Response tokens ``start`` to ``stop`` (exclusive) of rollout ``index`` of the job carry loss in a minibatch.

    The tokens before ``start`` are context only. Example: ``Pick(index=4, start=0, stop=118)``.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start
