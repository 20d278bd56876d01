"""Accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.collect.sampler import RolloutSampler
from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.rollout_metrics import add_up, rollout_metrics, rollout_sums
from megatron_ring.runtime.session import Session

SEED = 1_000_003
"""Seed of the responses to held-out problems, the same at every evaluation."""


def evaluate(
    problems: Sequence[Prompt],
    sampler: RolloutSampler,
    sampling: SamplingParams,
    session: Session,
    *,
    samples: int,
) -> dict[str, float]:
    """Mean reward and accuracy over ``samples`` responses to each problem. Collective over the world.

    Example: ``{"accuracy": 0.8, "problems": 200.0, "reward": 0.8, "response_length": 9.1}``; ``reward/...`` per
    domain where there are several.
    """
    topology = session.topology
    requests = [
        Request(prompt=prompt, sample=sample, prefix=None)
        for prompt in problems
        if topology.owns(prompt.uid)
        for sample in range(samples)
    ]
    rollouts, _ = sampler(requests, replace(sampling, seed=SEED, record_routes=False))
    sums = add_up(rollout_sums(rollouts), topology.groups.dp, session.device)
    found = rollout_metrics(sums)
    accuracy = sums.get("status/correct", 0.0) / max(sums.get("responses", 0.0), 1.0)
    names = ("reward", "response_length", *(n for n in found if n.startswith("reward/")))
    return {"accuracy": accuracy, "problems": float(len(problems)), **{n: found[n] for n in names}}
