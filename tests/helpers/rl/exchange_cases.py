"""What the processes of the exchange test say to one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from megatron_ring.rl.types import Rollout
from tests.helpers.rl.rollouts import rollout

ROUTED = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)


def words(rank: int) -> Any:
    """Longer on one rank than on the other."""
    return {"rank": rank, "text": "\N{SNOWMAN} " * (1 + 300 * rank), "list": [1.5, None, True]}


def parcel(source: int, to: int) -> list[Rollout]:
    """Rank 0 sends two responses to itself, three to rank 1; rank 1 none to itself, one with routes to rank 0."""
    if source == 0:
        # all but the first were cut in an earlier step
        return [replace(rollout(8 + to, n, 4 + n), start=n, carried=2 * n) for n in range(2 + to)]
    if to == 1:
        return []
    plain = rollout(3, 0, 5)
    return [replace(plain, response=replace(plain.response, routes_SLK=ROUTED), advantages_R=None)]


def as_json(rollout: Rollout) -> list:
    """What of a rollout has to arrive, its routes apart."""
    response = rollout.response
    return [
        *response.key,
        rollout.prompt.text,
        response.tokens_R.tolist(),
        response.logprobs_R.tolist(),
        response.versions_R.tolist(),
        None if rollout.advantages_R is None else rollout.advantages_R.tolist(),
        rollout.reward.detail,
        rollout.start,
        rollout.carried,
    ]
