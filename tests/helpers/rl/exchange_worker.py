"""One of several processes that tell one another things: ``python -m tests.helpers.rl.exchange_worker FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.errors import RolloutError
from megatron_ring.rl.batch.exchange import send_rollouts
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, SamplingParams
from megatron_ring.rl.rollout.relay import Relay
from megatron_ring.runtime.collectives import broadcast_json, gather_json
from tests.helpers.rl.collecting import ScriptedEngine, prompt
from tests.helpers.rl.exchange_cases import ROUTED, as_json, parcel, words


def relayed(group: dist.ProcessGroup) -> tuple[list, str]:
    """What each rank hears of an engine that rank 0 alone speaks to: (key, tokens, stop, version), and its error."""
    session = SimpleNamespace(
        topology=SimpleNamespace(groups=SimpleNamespace(mp=group)), device=torch.device("cpu")
    )
    asked = [Request(prompt=prompt(uid), sample=sample) for uid in range(3) for sample in range(2)]
    engine = ScriptedEngine()
    engine.publish(4)
    relay = Relay(engine, session)
    heard = list(
        relay.generate(asked, SamplingParams(max_response_length=16), RolloutBudget(tokens=20, concurrency=2))
    )
    rows = [
        [*r.key, r.tokens_R.tolist(), r.logprobs_R.tolist(), r.versions_R.tolist(), r.stop] for r in heard
    ]
    assert len(engine.calls) == (group.rank() == 0)
    engine.fails_after = 2
    try:
        list(relay.generate(asked, SamplingParams(max_response_length=16)))
    except RolloutError as error:
        return rows, str(error)
    return rows, ""


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
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
