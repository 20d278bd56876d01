"""One process of the proof that tied embeddings stay one weight: ``tied_worker.py WORLD FOLDER``.

At every layout a run of three steps, a save, and one step more: by the run itself, and by a run that resumes at another
layout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.runtime.session import Session, open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.parallel.cases import LR, NUM_MICROBATCHES, STEPS, Case
from tests.helpers.parallel.worker import batch

WORLD = 4
CASES = [
    Case("qwen3", WORLD, dict(pp=2)),
    Case("qwen3", WORLD, dict(pp=2, plain=True)),
    Case("qwen3", WORLD, dict(tp=2, pp=2)),
    Case("qwen3", WORLD, dict(pp=2, vpp=2, overlap=True)),
    Case("qwen3_moe", WORLD, dict(pp=2, ep=2)),
]
"""Layouts whose last stage has a copy of the embedding."""
REFERENCE = dict[str, Any]()
"""The layout they are compared with and resumed at: the weight is on every rank, once."""


def name_of(case: Case, bf16: bool) -> str:
    return f"{case.name}-{'bf16' if bf16 else 'fp32'}"


def make(
    case: Case, bf16: bool, session: Session, folder: Path, **settings: Any
) -> tuple[Engine, Checkpointer]:
    config = config_from_mapping({**case.settings(), "bf16": bf16, "save": str(folder), **settings})
    validate(config, WORLD)
    engine = Engine(config, session)
    return engine, Checkpointer(config, engine, session, stage="pretrain")


def steps(engine: Engine, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of so many steps on the same batch."""
    topology = engine.topology
    share = NUM_MICROBATCHES // topology.dp_size
    own = batch(engine.config.model.vocab_size)[topology.dp_rank * share : (topology.dp_rank + 1) * share]
    found = []
    for _ in range(count):
        report = engine.accumulate(own, NextTokenObjective())
        found.append((report.loss, report.grad_norm))
        engine.update(report, LR)
    return found


def copies_are_equal(engine: Engine) -> bool:
    """Bit for bit, on the first and the last stage of every pipeline. Collective over the world."""
    engine.gather_parameters()
    topology, same = engine.topology, torch.ones(())
    if topology.is_first_stage or topology.is_last_stage:
        chunk = engine.models[0 if topology.is_first_stage else -1]
        weight = chunk.shared_embedding_or_output_weight().detach().float()
        group = topology.groups.embd
        both = [torch.empty_like(weight) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(both, weight.contiguous(), group=group)
        same = torch.tensor(float(len(both) == 2 and torch.equal(*both)))
    torch.distributed.all_reduce(same, op=torch.distributed.ReduceOp.MIN)
    return bool(same)


def run_case(case: Case, bf16: bool, folder: Path) -> dict[str, Any]:
    saved = folder / name_of(case, bf16)
    parallel = config_from_mapping(case.settings()).parallel
    with open_session(parallel, seed=5) as session:
        engine, checkpointer = make(case, bf16, session, saved)
        found: dict[str, Any] = {"starts_equal": copies_are_equal(engine), "steps": steps(engine, STEPS)}
        found["ends_equal"] = copies_are_equal(engine)
        checkpointer.save(STEPS, {"step": STEPS})
        found["next"] = steps(engine, 1)
    other = Case(case.model, WORLD, REFERENCE)
    with open_session(config_from_mapping(other.settings()).parallel, seed=6) as session:
        engine, checkpointer = make(other, bf16, session, folder / "unused", load=str(saved), seed=99)
        checkpointer.load(saved)
        found["resumed"] = steps(engine, 1)
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[2]), dict[str, Any]()
    for bf16 in (False, True):
        for model in dict.fromkeys(case.model for case in CASES):
            other = Case(model, WORLD, REFERENCE)
            with open_session(config_from_mapping(other.settings()).parallel, seed=5) as session:
                engine, _ = make(other, bf16, session, folder / "unused")
                results[name_of(Case(model, 1), bf16)] = steps(engine, STEPS)
        for case in CASES:
            results[name_of(case, bf16)] = run_case(case, bf16, folder)
            print("done", name_of(case, bf16), flush=True)
    if os.environ.get("RANK", "0") == "0":
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
