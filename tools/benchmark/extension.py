#!/usr/bin/env python3
"""How much the C++ kernels speed up a tiny training step, beside plain torch in their place.

    python tools/benchmark/extension.py [--preset ring_lite_tiny] [--rounds 40] [--threads 2]

Both kinds of step run in one process on one engine and take turns (``dispatch.force`` does what
``MEGATRON_RING_EXT=0`` does). Prints the ratio; decoding has its own benchmark, ``generate.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="ring_lite_tiny")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    machine.require_cpu("extension.py", "the C++ kernels, which serve a CPU")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    from megatron_ring.config.load import preset_config
    from megatron_ring.data.batch.microbatch import pack_microbatch
    from megatron_ring.kernels import dispatch
    from megatron_ring.runtime.session import open_session
    from megatron_ring.train.engine import Engine
    from megatron_ring.train.objective import NextTokenObjective

    torch.set_num_threads(args.threads)
    config = preset_config(args.preset)
    train = config.train
    generator = torch.Generator().manual_seed(0)
    with open_session(config.parallel, seed=0) as session:
        engine = Engine(config, session)

        def microbatch():
            rows = []
            for _ in range(train.micro_batch_size):
                row = torch.randint(config.model.vocab_size, (train.seq_length + 1,), generator=generator)
                rows.append((row[:-1], row[1:], torch.ones(train.seq_length)))
            return pack_microbatch(rows, train.micro_batch_size * train.seq_length)

        microbatches = [microbatch() for _ in range(train.global_batch_size // train.micro_batch_size)]
        objective = NextTokenObjective()

        def step(backend: str) -> float:
            with dispatch.force(backend):
                begun = time.perf_counter()
                engine.step(microbatches, objective, lr=1e-4)
                return time.perf_counter() - begun

        for backend in ("native", "torch"):
            step(backend)
        times = {"native": [], "torch": []}
        for _ in range(args.rounds):
            for backend, taken in times.items():
                taken.append(step(backend))
    medians = {name: statistics.median(taken) * 1e3 for name, taken in times.items()}
    ratios = [slow / fast for fast, slow in zip(times["native"], times["torch"], strict=True)]
    print(
        f"{args.preset}, {train.global_batch_size} x {train.seq_length} tokens, {args.threads} threads, cpu"
    )
    print(
        f"with the extension {medians['native']:.1f} ms a step, plain torch {medians['torch']:.1f} ms (medians)"
    )
    print(f"plain torch / extension: {statistics.median(ratios):.2f} in the median pair")


if __name__ == "__main__":
    main()
