"""One of several processes that tell one another things: ``python -m tests.helpers.rl.exchange_worker FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import RolloutError
from megatron_ring.rl.batch.exchange import send_rollouts
from megatron_ring.rl.rollout.checked import Checked
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, SamplingParams
from megatron_ring.rl.rollout.relay import Relay
from megatron_ring.rl.types import Response
from megatron_ring.runtime.collectives import broadcast_json, gather_json
from tests.helpers.rl.collecting import ScriptedEngine, prompt
from tests.helpers.rl.exchange_cases import ROUTED, as_json, parcel, words

ASKED = [Request(prompt=prompt(uid), sample=sample) for uid in range(3) for sample in range(2)]
SAMPLING = SamplingParams(max_response_length=16)


def session_of(group: dist.ProcessGroup) -> Any:
    """A session whose model-parallel group is ``group``."""
    groups = SimpleNamespace(mp=group)
    return SimpleNamespace(topology=SimpleNamespace(groups=groups), device=torch.device("cpu"))


def relayed(group: dist.ProcessGroup) -> tuple[list, str]:
    """What each rank hears of an engine that rank 0 alone speaks to: (key, tokens, stop, version), and its error."""
    engine = ScriptedEngine()
    engine.publish(4)
    relay = Relay(engine, session_of(group))
    heard = list(relay.generate(ASKED, SAMPLING, RolloutBudget(tokens=20, concurrency=2)))
    rows = [
        [*r.key, r.tokens_R.tolist(), r.logprobs_R.tolist(), r.versions_R.tolist(), r.stop] for r in heard
    ]
    assert len(engine.calls) == (group.rank() == 0)
    engine.fails_after = 2
    try:
        list(relay.generate(ASKED, SAMPLING))
    except RolloutError as error:
        return rows, str(error)
    return rows, ""


class Spoilt(ScriptedEngine):
    """An engine of every rank; rank 1's last response is ``spoil``'s."""

    def __init__(self, spoil: Callable[[list[Response]], list[Response]], rank: int):
        super().__init__()
        self.on_every_rank = True
        self.spoil = spoil if rank == 1 else list

    def generate(self, requests, sampling, budget=None):
        yield from self.spoil(list(super().generate(requests, sampling, budget)))


SPOILS: dict[str, Callable[[list[Response]], list[Response]]] = {
    "nothing": list,
    "order": lambda responses: responses[::-1],
    "token": lambda responses: [*responses[:-1], replace(responses[-1], tokens_R=responses[-1].tokens_R + 1)],
    "log p": lambda responses: [replace(r, logprobs_R=r.logprobs_R * np.float32(1.5)) for r in responses],
}
"""What differs on one rank of a model-parallel group."""


def checked(group: dist.ProcessGroup) -> dict[str, str]:
    """What this rank is told of an engine whose ranks give different responses."""
    told: dict[str, str] = {}
    for name, spoil in SPOILS.items():
        engine = Checked(
            Spoilt(spoil, group.rank()), session_of(group), name="own:Spoilt", model=ModelConfig()
        )
        try:
            told[name] = str(len(list(engine.generate(ASKED, SAMPLING))))
        except RolloutError as error:
            told[name] = str(error)
    return told


def main() -> None:
    dist.init_process_group("gloo")
    group, rank, cpu = dist.group.WORLD, dist.get_rank(), torch.device("cpu")
    world = dist.get_world_size()
    found = {
        "gathered": gather_json(words(rank), group, cpu),
        "nothing": gather_json(None, group, cpu),
        "first": broadcast_json(words(rank) if rank == 0 else None, 0, group, cpu),
        "last": broadcast_json(words(rank) if rank == 1 else None, 1, group, cpu),
    }
    arrived = send_rollouts([parcel(rank, to) for to in range(world)], group, cpu)
    found["rollouts"] = [[as_json(rollout) for rollout in of_rank] for of_rank in arrived]
    routes = [r.response.routes_SLK for of_rank in arrived for r in of_rank]
    found["routes"] = [i for i, route in enumerate(routes) if route is not None]
    assert all(np.array_equal(route, ROUTED) for route in routes if route is not None)
    found["empty"] = [len(of_rank) for of_rank in send_rollouts([[]] * world, group, cpu)]
    found["relayed"], found["relayed_error"] = relayed(group)
    found["checked"] = checked(group)
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
