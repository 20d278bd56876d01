"""One process of the proof that every layout generates alike: runs every case of its world size.

Started by ``test_rollout_layouts.py`` through torchrun: ``rollout_worker.py WORLD FOLDER``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import RolloutBudget
from megatron_ring.rl.types import Response
from megatron_ring.runtime.session import Session
from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.running import engine_at_start, run_cases
from tests.helpers.rl.sequences import requests, sampling

REFERENCES = [Case(model, 1) for model in ("v1", "v2_mtp", "dense", "qwen3_moe")]
CASES = [
    *(Case("v1", 2, layout) for layout in (dict(tp=2), dict(pp=2), dict(ep=2), dict())),
    *(Case("v2_mtp", 2, layout) for layout in (dict(tp=2), dict(pp=2, vpp=2), dict(ep=2, overlap=True))),
    Case("dense", 2, dict(tp=2, sp=False)),
    *(Case("qwen3_moe", 2, layout) for layout in (dict(tp=2), dict(pp=2, vpp=2))),
    *(Case("v1", 4, layout) for layout in (dict(tp=2, pp=2), dict(pp=2, ep=2), dict(ep=2))),
    *(Case("v2_mtp", 4, layout) for layout in (dict(tp=2, ep=2), dict(tp=2, etp=1, ep=4))),
]
BUDGETED = RolloutBudget(tokens=40, concurrency=6)
NEXT = RolloutBudget(tokens=15, concurrency=3)
PARAMS = sampling(15, stop_ids=tuple(range(0, 250, 9)), record_routes=True)


def written(responses: list[Response]) -> list[dict[str, Any]]:
    return [
        dict(
            key=list(r.key),
            tokens=r.tokens_R.tolist(),
            logprobs=r.logprobs_R.tolist(),
            stop=r.stop,
            routes=r.routes_SLK.tolist() if r.routes_SLK is not None else None,
        )
        for r in responses
    ]


def run_case(case: Case, session: Session, folder: Path, *, is_reference: bool) -> None:
    engine = engine_at_start(case, session, folder, is_reference=is_reference)
    asked = requests(samples=2)
    # uneven shares: one rank is done long before the other and steps along
    dp_size, dp_rank = session.topology.dp_size, session.topology.dp_rank
    cuts = {1: [0, 16], 2: [0, 11, 16], 4: [0, 7, 7, 8, 16]}[dp_size]
    own = asked[cuts[dp_rank] : cuts[dp_rank + 1]]
    # passes of few tokens: a round of one rank takes more of them than the round of another
    rollout = InProcessEngine(engine, slots=5, prefill_tokens=20)
    rollout.publish(1)
    whole = list(rollout.generate(own, PARAMS))
    parts = list(rollout.generate(own, PARAMS, BUDGETED))
    rest = {r.key: r for r in parts if r.stop == "unfinished"}
    again = [
        replace(a, prefix=rest[k] if rest[k].length else None)
        for a in own
        if (k := (a.prompt.uid, a.sample)) in rest
    ]
    later = list(rollout.generate(again, PARAMS, NEXT))
    rest = {r.key: r for r in later if r.stop == "unfinished"}
    again = [replace(a, prefix=rest[k]) for a in own if (k := (a.prompt.uid, a.sample)) in rest]
    resumed = list(rollout.generate(again, PARAMS))
    # a rank without any request
    single = list(rollout.generate(asked[:1] if dp_rank == 0 else [], PARAMS))
    rollout.close()
    result = dict(
        dp_rank=dp_rank,
        whole=written(whole),
        parts=written(parts),
        later=written(later),
        resumed=written([r for r in [*parts, *later] if r.stop != "unfinished"] + resumed),
        single=written(single),
    )
    (folder / f"{case.name}.{session.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_cases(REFERENCES, CASES, run_case)
