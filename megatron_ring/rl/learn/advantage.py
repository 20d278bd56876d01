"""Advantages from rewards: how much better a response is than what the policy does on average.

Pure functions over numpy. Legend: G responses to one prompt, R response tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_ring.config.importable import resolve
from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.errors import ConfigError
from megatron_ring.rl.own_code import own_code
from megatron_ring.rl.types import Rollout

EPSILON = 1e-6
"""Added to the standard deviation, so that a group of nearly equal rewards stays finite. Frameworks differ: TRL adds
1e-4, verl 1e-6 to the sample deviation (divided by n - 1); ours is the population's, as the paper's ``std R``."""


def group_norm(rewards_G: np.ndarray) -> np.ndarray:
    """``(R - mean) / (population std + 1e-6)`` (Ring-lite, 3.2); 0 where all rewards of the group are equal.

    Example: ``group_norm([1., 0., 0., 1.])`` is ``[1., -1., -1., 1.]`` (to 2e-6).
    """
    if _all_equal(rewards_G):
        return np.zeros(len(rewards_G))
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + EPSILON)


def group_mean(rewards_G: np.ndarray) -> np.ndarray:
    """``R - mean``. Example: ``group_mean([1., 0., 0., 1.])`` is ``[.5, -.5, -.5, .5]``."""
    return np.zeros(len(rewards_G)) if _all_equal(rewards_G) else rewards_G - rewards_G.mean()


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the others'; 0 for a single response.

    Example: ``rloo([1., 0., 0.])`` is ``[1., -.5, -.5]``.
    """
    count = len(rewards_G)
    if _all_equal(rewards_G):
        return np.zeros(count)
    return rewards_G - (rewards_G.sum() - rewards_G) / (count - 1)


Estimator = Callable[[np.ndarray], np.ndarray]
"""Rewards of the responses to one prompt [G] -> their advantages [G]."""

ESTIMATORS: dict[str, Estimator] = {"group_norm": group_norm, "group_mean": group_mean, "rloo": rloo}
"""Estimators by their name in ``advantage_estimator``; gae is not among them: it needs a critic's value per
token."""


def register(name: str, estimator: Estimator) -> None:
    """Add an estimator. A module that does so when it is imported is named by ``advantage_estimator=module:name``.

    Raises:
        ValueError: the name is taken.
    """
    if name in ESTIMATORS or name == "gae":
        raise ValueError(f"advantage_estimator {name} exists")
    ESTIMATORS[name] = estimator


def estimator_of(config: ObjectiveConfig) -> Estimator | None:
    """The estimator that ``advantage_estimator`` names, a registered one or ``module:name``; None for gae.

    Raises:
        ConfigError: it does not exist, does not take the rewards as its one argument, or cannot be imported.
    """
    if config.advantage_estimator == "gae":
        return None
    return resolve("advantage_estimator", config.advantage_estimator, ESTIMATORS, _problem)


def _problem(found: object) -> str | None:
    form = "write a function of one group's rewards [G] that returns its advantages [G]"
    if not callable(found):
        return f"is {type(found).__name__}, not a function; {form}"
    try:
        inspect.signature(found).bind(np.zeros(2))
    except TypeError as error:
        return f"does not take the rewards as its one argument ({error}); {form}"
    return None


def _all_equal(rewards_G: np.ndarray) -> bool:
    """Rounding in the mean must not turn equal rewards into tiny advantages that the std then blows up."""
    return bool((rewards_G == rewards_G[0]).all())


def gae(values_R: np.ndarray, score: float, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation of one response whose only reward, ``score``, comes at its end.

    ``delta_t = r_t + gamma V_(t+1) - V_t`` with V = 0 after the last token, ``A_t = delta_t + gamma lam
    A_(t+1)``.

    Args:
        values_R: the critic's value before each response token is sampled.

    Returns:
        advantages [R] and returns [R] (advantages + values: what the critic is trained towards).

    Example: ``gae([.5, .5], 1.0, 1.0, 1.0)`` is ``([.5, .5], [1., 1.])``.
    """
    values_R = np.asarray(values_R, dtype=np.float64)
    advantages_R = np.zeros(len(values_R))
    following = value_after = 0.0
    for t in range(len(values_R) - 1, -1, -1):
        reward = score if t == len(values_R) - 1 else 0.0
        delta = reward + gamma * value_after - values_R[t]
        following = delta + gamma * lam * following
        advantages_R[t] = following
        value_after = values_R[t]
    return advantages_R, advantages_R + values_R


def length_penalty(length: int, max_response_length: int, buffer: int) -> float:
    """DAPO's soft punishment of long responses: 0 up to ``max_response_length - buffer``, then down to -1.

    Example: ``length_penalty(90, max_response_length=100, buffer=20)`` is ``-0.5``.
    """
    over = length - (max_response_length - buffer)
    return -min(max(over / buffer, 0.0), 1.0)


def assign(
    rollouts: Sequence[Rollout],
    config: ObjectiveConfig,
    max_response_length: int,
    values: Sequence[np.ndarray] | None = None,
) -> list[Rollout]:
    """The rollouts, in their order, each with ``advantages_R``; a group is the responses to one prompt.

    Responses cut at ``max_response_length`` keep their reward (overlong=keep), or lose up to 1 by length
    (penalise), or are left out of what is returned (mask): their rewards still count in their group's mean,
    but no token of them carries loss or fills the budget.

    Args:
        rollouts: whole groups; the advantage of a response whose group is elsewhere would be wrong.
        values: the critic's value per response token, one array per rollout (advantage_estimator=gae): the
            rollouts get ``values_R`` and ``returns_R`` too.

    Raises:
        ConfigError: a user's estimator does not exist, raises, or does not return one finite number per response.
    """
    scores = np.array([_score(rollout, config, max_response_length) for rollout in rollouts])
    estimator = estimator_of(config)
    if estimator is None:
        if values is None:
            raise ValueError("advantage_estimator=gae needs the critic's values")
        rows: list[dict[str, np.ndarray]] = []
        for values_R, score in zip(values, scores, strict=True):
            advantages_R, returns_R = gae(values_R, score, config.gae_gamma, config.gae_lambda)
            rows.append({"advantages_R": advantages_R, "values_R": values_R, "returns_R": returns_R})
    else:
        with own_code("advantage_estimator", config.advantage_estimator):
            advantages = _group_relative(rollouts, scores, estimator)
        rows = [
            {"advantages_R": np.full(rollout.response.length, advantage)}
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]
    return [
        replace(rollout, **{name: row_R.astype(np.float32) for name, row_R in row.items()})
        for rollout, row in zip(rollouts, rows, strict=True)
        if not is_masked(rollout, config)
    ]


def is_masked(rollout: Rollout, config: ObjectiveConfig) -> bool:
    """Does no token of the response carry loss, because it was cut at max_response_length (overlong=mask)?"""
    return config.overlong == "mask" and rollout.response.stop == "length"


def moments(rollouts: Sequence[Rollout]) -> list[tuple[int, float, float]]:
    """Per rollout: tokens, sum and sum of squares of their advantages, in double precision."""
    rows = [
        rollout.advantages_R.astype(np.float64) for rollout in rollouts if rollout.advantages_R is not None
    ]
    return [(len(row_R), float(row_R.sum()), float(np.square(row_R).sum())) for row_R in rows]


def whiten(rollouts: Sequence[Rollout], of_all: Sequence[tuple[int, float, float]]) -> list[Rollout]:
    """Advantages shifted and scaled to mean 0 and deviation 1 over the tokens of the whole step; returns are
    unchanged.

    ``of_all`` are the :func:`moments` of every rank's rollouts, in any order: their sums are exact, so every layout
    gets the same numbers. The deviation is the population's, with 1e-8 added to the variance. With fewer than
    two tokens nothing changes.

    Example: advantages 1, 2 and 3 become about -1.22, 0 and 1.22.
    """
    counts, sums, squares = zip(*of_all, strict=True) if of_all else ((), (), ())
    tokens = sum(counts)
    if tokens < 2:
        return list(rollouts)
    mean = math.fsum(sums) / tokens
    scale = max(math.fsum(squares) / tokens - mean**2, 0.0) + 1e-8
    deviation = math.sqrt(scale)

    def whitened(advantages_R: np.ndarray | None) -> np.ndarray | None:
        return None if advantages_R is None else ((advantages_R - mean) / deviation).astype(np.float32)

    return [replace(rollout, advantages_R=whitened(rollout.advantages_R)) for rollout in rollouts]


def _score(rollout: Rollout, config: ObjectiveConfig, max_response_length: int) -> float:
    score = float(rollout.reward.score)
    if config.overlong == "penalise":
        score += length_penalty(rollout.response.length, max_response_length, config.overlong_buffer)
    return score


def _group_relative(rollouts: Sequence[Rollout], scores: np.ndarray, estimator: Estimator) -> np.ndarray:
    groups: dict[int, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt.uid, []).append(index)
    advantages = np.zeros(len(rollouts))
    for members in groups.values():
        found_G = np.asarray(estimator(scores[members].copy()), dtype=np.float64)
        if found_G.shape != (len(members),) or not np.isfinite(found_G).all():
            name = getattr(estimator, "__qualname__", type(estimator).__name__)
            raise ConfigError(
                f"advantage_estimator: {name} must give one finite number per reward, and for {scores[members].tolist()} "
                f"it gave {found_G.tolist()}; correct it"
            )
        advantages[members] = found_G
    return advantages
