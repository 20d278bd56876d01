#!/usr/bin/env python3
"""What the stand-in for CUDA names costs: a tiny training step with it, and with its call sites answered by constants.

    python tools/benchmark/stand_in.py [--rounds 60] [--threads 1]

Both kinds of step run in one process on one engine and take turns. The direct answers keep no record of hits, look
nothing up and run no ``TorchFunctionMode``. Prints the ratio; exits 1 when the stand-in costs 3% or more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine

LIMIT = 1.03


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


@contextlib.contextmanager
def constants() -> Iterator[None]:
    """Answer what a step asks of CUDA with constants, over the stand-in that is active."""
    import torch
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    host = torch.device("cpu")

    def on_host(factory):
        return lambda *args, device=None, **kwargs: factory(*args, device=host, **kwargs)

    direct = types.ModuleType("torch_on_host")
    vars(direct).update(vars(torch))
    for name in ("zeros", "tensor", "empty", "ones"):
        setattr(direct, name, on_host(getattr(torch, name)))
    with contextlib.ExitStack() as stack:
        for module in (utils, clip_grads, optimizer, schedules):
            stack.enter_context(mock.patch.object(module, "torch", direct))
        stack.enter_context(mock.patch("torch.cuda.current_device", lambda: host))
        stack.enter_context(mock.patch("torch.cuda.synchronize", lambda: None))
        yield


def main() -> int:
    args = _arguments()
    machine.require_cpu("stand_in.py", "what stands in for CUDA on a CPU")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads)}
    import torch

    from megatron_ring.config.load import config_from_mapping
    from megatron_ring.config.presets import PRESETS
    from megatron_ring.data.batch.microbatch import pack_microbatch
    from megatron_ring.runtime.megatron_cpu import hits, reset_hits
    from megatron_ring.runtime.session import open_session
    from megatron_ring.train.engine import Engine
    from megatron_ring.train.objective import NextTokenObjective

    torch.set_num_threads(args.threads)
    # small on purpose: the smaller the step, the more its fixed costs show
    tiny = {"num_layers": 2, "hidden_size": 64, "kv_channels": 16}
    config = config_from_mapping({**PRESETS["ring_lite_tiny"], **tiny})
    with open_session(config.parallel, seed=1) as session:
        engine = Engine(config, session)
        tokens = torch.randint(0, config.model.vocab_size, (65,))
        microbatches = [pack_microbatch([(tokens[:-1], tokens[1:], torch.ones(64))], 64)] * 2
        objective = NextTokenObjective()

        def step() -> float:
            # processor time: other load on the machine is not the stand-in's cost
            start = time.process_time()
            engine.step(microbatches, objective, 1e-4)
            return time.process_time() - start

        step()
        reset_hits()
        step()
        used = sorted(hits())
        with constants():
            step()
            reset_hits()
            step()
            if hits():
                raise SystemExit(f"{sorted(hits())} still answered by the stand-in: nothing to compare")

        def direct_step() -> float:
            with constants():
                return step()

        pairs = []
        for turn in range(args.rounds):
            # the order alternates, so that a drift of the machine favours neither
            first, second = (step, direct_step) if turn % 2 else (direct_step, step)
            times = first(), second()
            pairs.append(times if turn % 2 else times[::-1])
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"a step of {mine * 1e3:.2f} ms of processor time uses {len(used)} rows of the table: {', '.join(used)}"
    )
    print(f"with constants in their place {theirs * 1e3:.2f} ms (medians of {args.rounds} steps each)")
    print(f"stand-in / constants: {ratio:.4f} in the median pair; must be below {LIMIT}")
    return int(ratio >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
