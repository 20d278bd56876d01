"""What the layout proofs share on the worker's side: a session per case, and one initial checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.runtime.session import Session, open_session
from megatron_ring.train.engine import Engine
from tests.helpers.parallel.cases import Case


class RunCase(Protocol):
    def __call__(self, case: Case, session: Session, folder: Path, *, is_reference: bool) -> None: ...


def run_cases(references: Sequence[Case], cases: Sequence[Case], run_case: RunCase) -> None:
    """``WORLD FOLDER [CASE-NAME ...]``: every case of this world size, the references first with one process."""
    torch.set_num_threads(1)
    world, folder, names = int(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3:])
    todo = [(case, True) for case in references] if world == 1 else []
    todo += [(case, False) for case in cases if case.world == world and (not names or case.name in names)]
    for case, is_reference in todo:
        parallel = config_from_mapping(case.settings()).parallel
        with open_session(parallel, seed=11 if is_reference else 99) as session:
            run_case(case, session, folder, is_reference=is_reference)
            if session.is_save_rank:
                print(f"done {case.name}", flush=True)


def engine_at_start(
    case: Case, session: Session, folder: Path, *, is_reference: bool, **settings: Any
) -> Engine:
    """An engine with the model's initial weights: a reference draws and saves them, the others load them."""
    initial = folder / f"initial-{case.model}"
    config = config_from_mapping(
        {**case.settings(), **settings, "save" if is_reference else "load": str(initial)}
    )
    validate(config, session.world_size)
    engine = Engine(config, session)
    checkpointer = Checkpointer(config, engine, session, stage="pretrain")
    if is_reference:
        randomise(engine)
        checkpointer.save(0, {"step": 0})
    else:
        checkpointer.load(initial)
    return engine


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


def reduce_whole_gradients(engine: Engine) -> None:
    """Have every data-parallel rank end up with whole gradients, not only its optimizer's share."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(*args, **kwargs):
        return finalize_model_grads(*args, **{**kwargs, "force_all_reduce": True})

    engine.models[0].config.finalize_model_grads_func = finalize
    for chunk in engine.chunks:
        chunk.force_all_reduce = True
