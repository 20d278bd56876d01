"""One process of the layout-parity proof: runs every case of its world size and writes what it saw.

Started by ``test_layouts.py`` through torchrun: ``worker.py WORLD FOLDER [CASE-NAME ...]``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.rl.rollout.inprocess import continue_tokens
from megatron_ring.runtime import megatron_cpu
from megatron_ring.runtime.session import Session
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.parallel.cases import CASES, LR, NUM_MICROBATCHES, NUM_SLOTS, REFERENCES, STEPS, Case
from tests.helpers.parallel.collect import local_shards
from tests.helpers.parallel.running import engine_at_start, reduce_whole_gradients, run_cases


def batch(vocab_size: int) -> list[Microbatch]:
    """The step's microbatches: odd segment lengths, different amounts of padding, holes in the loss mask."""
    generator = torch.Generator().manual_seed(7)
    microbatches = []
    for index in range(NUM_MICROBATCHES):
        lengths = [(13, 7, 21), (5, 1, 17, 11), (47,), (9, 9, 9)][index % 4]
        sequences = []
        for length in lengths:
            tokens = torch.randint(0, vocab_size, (length + 1,), generator=generator)
            mask = (torch.rand(length, generator=generator) > 0.2).float()
            sequences.append((tokens[:-1], tokens[1:], mask))
        microbatches.append(pack_microbatch(sequences, NUM_SLOTS))
    return microbatches


def run_case(case: Case, session: Session, folder: Path, *, is_reference: bool) -> None:
    engine = engine_at_start(case, session, folder, is_reference=is_reference)
    config = engine.config
    reduce_whole_gradients(engine)
    dp, rank = session.topology.dp_size, session.topology.dp_rank
    own = batch(config.model.vocab_size)[rank * NUM_MICROBATCHES // dp : (rank + 1) * NUM_MICROBATCHES // dp]
    objective = NextTokenObjective(mtp_loss_scaling_factor=config.model.mtp_loss_scaling_factor)
    out = folder / case.name
    out.mkdir(exist_ok=True)
    losses, norms = [], []
    for step in range(STEPS):
        report = engine.accumulate(own, objective)
        if step == 0:
            torch.save(local_shards(engine, gradients=True), out / f"grads.{session.rank}.pt")
            first = report
        losses.append(report.loss)
        norms.append(report.grad_norm)
        engine.update(report, LR)
    torch.save(local_shards(engine, gradients=False), out / f"weights.{session.rank}.pt")
    if session.is_save_rank:
        summary = dict(
            losses=losses,
            norms=norms,
            balance=first.balance_loss,
            z=first.z_loss,
            violation=first.max_violation,
        )
    summary_eval = engine.evaluate(own, objective)
    sample = continue_tokens(engine, [5, 3, 7], limit=3, seed=0, stop_ids=())
    if session.is_save_rank:
        summary |= {"evaluation": summary_eval, "sample": sample}
        (out / "summary.json").write_text(json.dumps(summary))


def main() -> None:
    run_cases(REFERENCES, CASES, run_case)
    if os.environ.get("RANK", "0") == "0":
        (Path(sys.argv[2]) / f"hits.{sys.argv[1]}.json").write_text(json.dumps(sorted(megatron_cpu.hits())))


if __name__ == "__main__":
    main()
