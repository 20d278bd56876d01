"""One process of the plain optimizer's checkpoints at two processes: ``plain_worker.py FOLDER``.

At each layout it goes on from the single process's checkpoint, saves, and must resume from that bit for bit.
Started by ``test_plain_optimizer.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.checkpoint.plain_cases import LAYOUTS, configure, next_step, same, state_of


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for layout in LAYOUTS:
        for bf16 in (False, True):
            start, own = folder / f"one-{bf16}", folder / f"{layout}-{bf16}"
            steps = []
            for load, save in ((start, own), (own, None)):
                config = configure(bf16=bf16, load=str(load), save=save and str(save), **LAYOUTS[layout])
                with open_session(config.parallel, seed=5) as session:
                    engine = Engine(config, session)
                    checkpointer = Checkpointer(config, engine, session, stage="pretrain")
                    assert checkpointer.load(load) == {"step": 2}
                    if save:
                        held = state_of(engine)
                        checkpointer.save(3, {"step": 2})
                        checkpointer.finish()
                    else:
                        assert same(state_of(engine), held)
                    steps.append(next_step(engine))
                    steps[-1]["state"] = state_of(engine)
            first, second = steps
            assert same(first.pop("state"), second.pop("state")) and first == second
            (own / "step.json").write_text(json.dumps(first))


if __name__ == "__main__":
    main()
