"""Judged responses whose tokens tell which response and which place they are."""

from __future__ import annotations

import numpy as np

from megatron_ring.rl.types import Response, RewardResult, Rollout
from tests.helpers.rl.collecting import prompt


def rollout(uid: int, sample: int, length: int, advantage: float = 1.0) -> Rollout:
    """Its tokens tell which response and which place they are: 40 * response + place."""
    first = 40 * ((3 * uid + sample) % 24)
    response = Response(
        prompt_uid=uid,
        sample=sample,
        tokens_R=np.arange(first, first + length, dtype=np.int32),
        logprobs_R=np.full(length, -0.5, np.float32),
        versions_R=np.zeros(length, np.int32),
        stop="eos",
    )
    return Rollout(
        prompt=prompt(uid),
        response=response,
        reward=RewardResult(score=float(sample % 2), status="correct" if sample % 2 else "wrong"),
        advantages_R=np.full(length, advantage, np.float32),
    )


def step_of(number: int, groups: int = 3, **changes) -> list[Rollout]:
    """Nine responses of 3 to 19 tokens."""
    uids = range(groups * number, groups * (number + 1))
    return [rollout(uid, s, 3 + (7 * uid + 5 * s) % 17, **changes) for uid in uids for s in range(3)]
