"""What a step's rollouts were like, over all data-parallel ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import device as Device

from megatron_ring.rl.exchange import gather_json
from megatron_ring.rl.types import Rollout


def rollout_sums(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Sums over this rank's rollouts; :func:`add_up` makes them the step's, :func:`rollout_metrics` means.

    Example: two responses, 10 and 20 tokens, rewards 1 and 0: ``{"responses": 2., "reward": 1., "length": 30.,
    "length_squared": 500., "status/correct": 1., "status/wrong": 1., ...}``.
    """
    sums: dict[str, float] = defaultdict(float)
    for rollout in rollouts:
        length, reward = rollout.response.length, rollout.reward
        sums["responses"] += 1
        sums["reward"] += reward.score
        sums["reward_squared"] += reward.score**2
        sums["length"] += length
        sums["length_squared"] += length**2
        sums["cut"] += rollout.response.stop == "length"
        sums["empty"] += length == 0
        sums[f"status/{reward.status}"] += 1
        sums[f"domain/{rollout.prompt.domain}/responses"] += 1
        sums[f"domain/{rollout.prompt.domain}/reward"] += reward.score
    return dict(sums)


def add_up(own: Mapping[str, float], group: dist.ProcessGroup, device: Device) -> dict[str, float]:
    """Collective over ``group``: every rank's values, summed by name; ranks may lack names."""
    total: Counter[str] = Counter()
    for values in gather_json(dict(own), group, device):
        total.update(values)
    return dict(total)


def rollout_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of what :func:`rollout_sums` added up.

    Example: ``{"reward": .5, "reward_std": .5, "response_length": 15., "response_length_std": 5.,
    "cut_share": 0., "empty_share": 0., "status/correct": .5, ...,
    "reward/math": .5}``; ``reward/...`` only with several domains. ``empty_share``: responses of no token at all,
    which nothing is trained on.
    """
    count = sums.get("responses", 0.0)
    if not count:
        return {}
    reward, length = sums["reward"] / count, sums["length"] / count
    found = {
        "reward": reward,
        "reward_std": max(sums["reward_squared"] / count - reward**2, 0.0) ** 0.5,
        "response_length": length,
        "response_length_std": max(sums["length_squared"] / count - length**2, 0.0) ** 0.5,
        "cut_share": sums["cut"] / count,
        "empty_share": sums["empty"] / count,
    }
    found |= {name: value / count for name, value in sums.items() if name.startswith("status/")}
    ends = ("domain/", "/responses")
    domains = [n[len(ends[0]) : -len(ends[1])] for n in sums if n.startswith(ends[0]) and n.endswith(ends[1])]
    if len(domains) > 1:
        for name in domains:
            found[f"reward/{name}"] = sums[f"domain/{name}/reward"] / sums[f"domain/{name}/responses"]
    return found
