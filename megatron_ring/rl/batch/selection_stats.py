"""Statistics of the responses that the token budget used, beside those of all on offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ring.rl.types import Pick, RolloutMeta


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionStats:
    """Shows whether the budget favours some responses: by length, or by reward.

    Lengths are whole response lengths in tokens, quantiles at 10, 50 and 90%.

    Example: ``SelectionStats(sampled_length=(6.0, 2.0, 5.0, 11.0), selected_length=(5.0, 2.0, 4.0, 9.0),
    sampled_reward=0.5, selected_reward=0.6)``: mean, then quantiles.
    """

    sampled_length: tuple[float, float, float, float]
    selected_length: tuple[float, float, float, float]
    sampled_reward: float
    selected_reward: float

    def metrics(self) -> dict[str, float]:
        """``c3po/{sampled,selected}_{length_mean,length_p10,length_p50,length_p90,reward_mean}``."""
        named: dict[str, float] = {}
        for who, lengths, reward in (
            ("sampled", self.sampled_length, self.sampled_reward),
            ("selected", self.selected_length, self.selected_reward),
        ):
            for what, value in zip(("mean", "p10", "p50", "p90"), lengths, strict=True):
                named[f"c3po/{who}_length_{what}"] = value
            named[f"c3po/{who}_reward_mean"] = reward
        return named


def selection_stats(metas: Sequence[RolloutMeta], minibatches: Sequence[Sequence[Pick]]) -> SelectionStats:
    """Compare the responses that carry loss (each once, however many picks it has) with all on offer.

    Raises:
        ValueError: nothing is on offer, or nothing was picked.
    """
    length = np.array([meta.length for meta in metas], dtype=np.float64)
    reward = np.array([meta.score for meta in metas], dtype=np.float64)
    used = np.unique([pick.index for picks in minibatches for pick in picks])
    if not len(used):
        raise ValueError(f"{len(length)} responses on offer, none used: nothing to compare")
    return SelectionStats(
        sampled_length=_lengths(length),
        selected_length=_lengths(length[used]),
        sampled_reward=float(reward.mean()),
        selected_reward=float(reward[used].mean()),
    )


def _lengths(length: np.ndarray) -> tuple[float, float, float, float]:
    p10, p50, p90 = np.quantile(length, (0.1, 0.5, 0.9)).tolist()
    return float(length.mean()), p10, p50, p90
