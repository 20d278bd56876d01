"""Metrics of a step's rollouts and updates, over all data-parallel ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch.distributed as dist
from torch import device as Device

from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.rl.learn.objective import loss_tokens
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.train.engine import StepReport


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


def status_shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Share of responses by status of their verification, from what :func:`rollout_sums` added up.

    Example: ``{"correct": .5, "wrong": .5}``.
    """
    prefix = "status/"
    return {
        name.removeprefix(prefix): value / sums["responses"]
        for name, value in sums.items()
        if name.startswith(prefix)
    }


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
    found |= {f"status/{status}": share for status, share in status_shares(sums).items()}
    ends = ("domain/", "/responses")
    domains = [n[len(ends[0]) : -len(ends[1])] for n in sums if n.startswith(ends[0]) and n.endswith(ends[1])]
    if len(domains) > 1:
        for name in domains:
            found[f"reward/{name}"] = sums[f"domain/{name}/reward"] / sums[f"domain/{name}/responses"]
    return found


def router_metrics(reports: Sequence[StepReport]) -> dict[str, float]:
    """Gradient norm, router losses, load and replay of a step's updates; updates without tokens are skipped.

    ``grad_norm`` is the mean over updates; router figures are means over the tokens that they count; a flip rate is
    flipped choices / compared ones, whatever minibatch they are in, by layer and as the mean of layers.
    """
    made = [report for report in reports if loss_tokens(report)]
    if not made:
        return {}
    valid = sum(report.valid for report in made)
    found = {
        "grad_norm": sum(report.grad_norm for report in made) / len(made),
        "balance_loss": sum(report.balance_loss * report.valid for report in made) / valid,
        "router_z_loss": sum(report.z_loss * report.valid for report in made) / valid,
        "max_violation": sum(report.max_violation * report.valid for report in made) / valid,
    }
    replays = [report.replay for report in made if report.replay is not None]
    if replays:
        whole = reduce(add, replays)
        rates = whole.flip_rates
        found |= {f"router_flip_rate/{layer}": rate for layer, rate in enumerate(rates)}
        found |= {"router_flip_rate": sum(rates) / max(len(rates), 1), "missing_routes": whole.missing_share}
    return found


def value_metrics(reports: Sequence[StepReport]) -> dict[str, float]:
    """Means of the critic's reports over their loss tokens; empty without updates."""
    tokens = sum(report.denominator for report in reports)
    names = ("value_loss", "value_error", "value_mean", "return_mean") if tokens else ()
    return {
        name: sum(report.means[name] * report.denominator for report in reports) / tokens for name in names
    }


def best_and_worst(rollouts: Sequence[Rollout], count: int = 2) -> list[Rollout]:
    """The ``count`` best and the ``count`` worst responses; among equals, the first drawn. No response appears
    twice."""
    ranked = sorted(rollouts, key=lambda r: (-r.reward.score, r.response.key))
    return ranked if len(ranked) <= 2 * count else [*ranked[:count], *ranked[-count:]]


def response_rows(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The best and worst responses as rows of ``samples.jsonl``.

    Example: ``{"prompt": "12 + 7 - 3 = ?", "response": "...", "score": 1.0, "status": "correct", "tokens": 14,
    "stop": "eos"}``.
    """
    return [
        {
            "prompt": rollout.prompt.text,
            "response": tokenizer.decode(rollout.response.tokens_R.tolist()),
            "score": rollout.reward.score,
            "status": rollout.reward.status,
            "tokens": rollout.response.length,
            "stop": rollout.response.stop,
        }
        for rollout in best_and_worst(rollouts)
    ]
