"""One process of the layout-parity proof: runs every case of its world size and writes what it saw.

Started by ``test_layouts.py`` through torchrun: ``worker.py WORLD FOLDER [CASE-NAME ...]``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.validate import validate
from megatron_ring.data.microbatch import Microbatch, pack_microbatch
from megatron_ring.runtime import megatron_cpu
from megatron_ring.runtime.session import Session, open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.parallel.cases import CASES, LR, NUM_MICROBATCHES, NUM_SLOTS, REFERENCES, STEPS, Case
from tests.parallel.collect import local_shards


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


def reduce_whole_gradients(engine: Engine) -> None:
    """Have every data-parallel rank end up with whole gradients, not only its optimizer's share."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(*args, **kwargs):
        return finalize_model_grads(*args, **{**kwargs, "force_all_reduce": True})

    engine.models[0].config.finalize_model_grads_func = finalize
    for chunk in engine.chunks:
        chunk.force_all_reduce = True


def randomise(engine: Engine) -> None:
    """No tensor starts at zero or one, so that every gradient path shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                spread = 0.05 if parameter.dim() > 1 else 0.3
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            for name, buffer in model.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.add_(0.05 * torch.randn(buffer.shape, generator=generator))
    engine.optimizer.reload_model_params()


def run_case(case: Case, session: Session, folder: Path, *, is_reference: bool) -> None:
    settings = case.settings()
    initial = folder / f"initial-{case.model}"
    settings.update({"save": str(initial)} if is_reference else {"load": str(initial)})
    config = config_from_mapping(settings)
    validate(config, session.world_size)
    engine = Engine(config, session)
    reduce_whole_gradients(engine)
    checkpointer = Checkpointer(config, engine, session)
    if is_reference:
        randomise(engine)
        checkpointer.save(0, {"step": 0})
    else:
        checkpointer.load(initial)
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
    if session.is_main:
        summary = dict(
            losses=losses,
            norms=norms,
            balance=first.balance_loss,
            z=first.z_loss,
            violation=first.max_violation,
            evaluation=None,
        )
    summary_eval = engine.evaluate(own, objective)
    if session.is_main:
        summary["evaluation"] = summary_eval
        (out / "summary.json").write_text(json.dumps(summary))


def main() -> None:
    torch.set_num_threads(1)
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    names = set(sys.argv[3:])
    todo = [(case, True) for case in REFERENCES] if world == 1 else []
    todo += [(case, False) for case in CASES if case.world == world]
    for case, is_reference in todo:
        if names and case.name not in names and not is_reference:
            continue
        config = config_from_mapping(case.settings())
        with open_session(config.parallel, seed=11 if is_reference else 99) as session:
            run_case(case, session, folder, is_reference=is_reference)
            if session.is_main:
                print(f"done {case.name}", flush=True)
    if os.environ.get("RANK", "0") == "0":
        (folder / f"hits.{world}.json").write_text(json.dumps(sorted(megatron_cpu.hits())))


if __name__ == "__main__":
    main()
