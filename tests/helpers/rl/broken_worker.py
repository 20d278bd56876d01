"""One of two processes whose weights broke on the last one: ``broken_worker.py FOLDER`` under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_ring.config.load import config_from_mapping
from megatron_ring.errors import RolloutError
from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import RolloutBudget
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.parallel.cases import Case
from tests.helpers.rl.sequences import requests, sampling

CASES = [Case("v1", 2, layout) for layout in (dict(), dict(tp=2), dict(pp=2), dict(ep=2))]


def said(case: Case, token_budget: int | None) -> str:
    config = config_from_mapping(case.settings())
    with open_session(config.parallel, seed=5) as session:
        engine = Engine(config, session)
        rollout = InProcessEngine(engine, slots=5)
        rollout.publish(7)
        if session.rank == session.world_size - 1:
            with torch.no_grad():
                for parameter in engine.models[-1].output_layer.parameters():
                    parameter.fill_(torch.nan)
        try:
            budget = None if token_budget is None else RolloutBudget(tokens=token_budget, concurrency=5)
            list(rollout.generate(requests(), sampling(), budget))
        except RolloutError as error:
            return f"{session.rank} {error}"
        return f"{session.rank} nothing"


def main() -> None:
    torch.set_num_threads(1)
    found = {f"{case.name}, budget {budget}": said(case, budget) for case in CASES for budget in (None, 60)}
    rank = next(iter(found.values())).partition(" ")[0]
    lines = {name: line.partition(" ")[2] for name, line in found.items()}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
