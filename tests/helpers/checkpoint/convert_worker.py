"""One process of the layout tests: ``convert_worker.py WORLD FOLDER``, started by
``test_convert_layouts.py``.

At every layout of this world size it loads the converted checkpoint (weights only), writes the logits of a
prompt, the published parts of its weights, and a checkpoint of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.publish import hf_parts, shards_of
from megatron_ring.checkpoint.state import model_state
from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.model_stats import padded_vocab_size
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.model.build import Logits
from megatron_ring.runtime.session import Session, open_session
from megatron_ring.train.engine import Engine
from tests.helpers.checkpoint.convert_cases import LAYOUTS, NUM_TOKENS, layout_name, layout_settings, prompt
from tests.helpers.parallel.cases import Case


def gathered(_: Microbatch, logits: Logits) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Whole-vocabulary logits of the model and of its multi-token-prediction layers, on every tensor rank."""
    whole = []
    for own_TV in (logits.main_TV, *logits.mtp_TV):
        parts = [torch.empty_like(own_TV) for _ in range(logits.tp_group.size())]
        torch.distributed.all_gather(parts, own_TV.contiguous(), group=logits.tp_group)
        whole.append(torch.cat(parts, dim=-1)[:, : logits.vocab_size].clone())
    return torch.zeros(()), whole


def run_case(model: str, world: int, layout: dict[str, int], session: Session, folder: Path, config) -> None:
    engine = Engine(config, session)
    checkpointer = Checkpointer(config, engine, session, stage="pretrain")
    checkpointer.load(folder / model / "megatron")
    out = folder / layout_name(model, world, layout)
    out.mkdir(exist_ok=True)
    tokens = prompt(config.model.vocab_size)
    # a second microbatch, because the interleaved schedule wants as many as stages
    batches = [pack_microbatch([(tokens, tokens, [0.0] * NUM_TOKENS)], NUM_TOKENS) for _ in range(4)]
    results = engine.forward(batches, gathered)
    if results and session.topology.tp_rank == 0 and session.topology.dp_rank == 0:
        torch.save(results[0], out / "logits.pt")
    rows = padded_vocab_size(config.model, config.parallel.tensor_model_parallel_size)
    parts = hf_parts(tensor_map(config.model, rows), shards_of(model_state(engine)))
    torch.save([(p.name, p.box.offset, p.data.clone()) for p in parts], out / f"parts.{session.rank}.pt")
    checkpointer.save(3, {"step": 3})


def main() -> None:
    torch.set_num_threads(1)
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    for model, layouts in LAYOUTS[world].items():
        for layout in layouts:
            settings = {
                **Case(model.removesuffix("_plain_head"), world, layout).settings(),
                **layout_settings(model),
            }
            save = folder / layout_name(model, world, layout) / "saved"
            settings |= {"finetune": True, "load": str(folder / model / "megatron"), "save": str(save)}
            config = config_from_mapping({**settings, "seq_length": NUM_TOKENS})
            validate(config, world)
            with open_session(config.parallel, seed=77) as session:
                run_case(model, world, layout, session, folder, config)
                if session.is_save_rank:
                    print("done", layout_name(model, world, layout), flush=True)


if __name__ == "__main__":
    # torchrun's workers inherit a thread count of their own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
