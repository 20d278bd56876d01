#!/usr/bin/env python3
"""Ring-lite with four layers in bf16 on one GPU: pre-training and C3PO steps, with rates, memory and the most
expensive kernels.

    python tools/gpu/whole.py OUT pretrain      writes OUT/pretrain.json and OUT/profile-pretrain.txt
    python tools/gpu/whole.py OUT rl            writes OUT/rl.json and OUT/profile-rl.txt
    python tools/gpu/whole.py OUT rl --tiny     the same code in seconds, on a CPU too

Four layers and the whole vocabulary are 2.84B parameters, about 51 GB of state: what one card of 80 GB holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.model_stats import count_parameters, flops_per_token, rank_memory
from megatron_ring.config.presets import PRESETS
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.launch.plan import activation_bytes
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.runtime import device
from megatron_ring.runtime.session import open_session
from megatron_ring.stages.rl import RlRun
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tools.gpu.peaks import peak_of
from tools.gpu.results import Results, children_path
from tools.gpu.toy import REWARD, write_corpus, write_problems


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a part runs. Example: ``Size(preset="ring_lite_tiny", layers=2, tokens=512, ...)``."""

    preset: str
    layers: int
    tokens: int
    microbatches: int
    steps: int
    prompts: int
    group: int
    length: int
    capacity: int


FULL = Size(
    preset="ring_lite",
    layers=4,
    tokens=8192,
    microbatches=4,
    steps=6,
    prompts=32,
    group=8,
    length=256,
    capacity=8192,
)
TINY = Size(
    preset="ring_lite_tiny",
    layers=2,
    tokens=512,
    microbatches=2,
    steps=4,
    prompts=4,
    group=4,
    length=16,
    capacity=512,
)


def pretrain(size: Size, results: Results, out: Path) -> None:
    """Steps on random tokens, two sequences a microbatch: the loss must fall, because the batch stays the
    same."""
    half = size.tokens // 2
    config = config_of(
        size, seq_length=size.tokens, micro_batch_size=1, global_batch_size=size.microbatches, lr=1e-4
    )
    with open_session(config.parallel, seed=1) as session:
        engine = Engine(config, session)
        batch = random_batch(config.model.vocab_size, size, half)
        objective, losses, seconds = NextTokenObjective(), [], []
        for step in range(size.steps):
            with _timed(seconds):
                report = engine.step(batch, objective, 1e-4)
            losses.append(report.loss)
            results.row(step=step, loss=report.loss, grad_norm=report.grad_norm, seconds=seconds[-1])
        if not losses[-1] < losses[0]:
            results.wrong(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} on one batch")
        # the first step compiles the remaining kernels
        rate = size.tokens * size.microbatches / statistics.median(seconds[1:])
        results.facts |= {
            "parameters": count_parameters(config.model).total,
            "tokens_per_second": rate,
            "mfu": _mfu(rate * flops_per_token(config.model, half)),
            **_memory(config),
        }
        _profile(lambda: engine.step(batch, objective, 1e-4), out / "profile-pretrain.txt", results)
        results.facts["waits_per_step"] = _waits(lambda: engine.step(batch, objective, 1e-4))


def reinforce(size: Size, results: Results, out: Path) -> None:
    """C3PO steps whose responses all have the same length."""
    with open_rl(size) as run:
        tokens = run.planner.token_budget
        steps = _Steps(results, tokens)
        for _ in range(3):
            run.train_step(steps)
        results.facts |= {
            "budget": tokens,
            "parameters": count_parameters(run.config.model).total,
            **_memory(run.config),
        }
        _profile(lambda: run.train_step(steps), out / "profile-rl.txt", results)


@contextlib.contextmanager
def open_rl(size: Size, **settings: Any) -> Iterator[RlRun]:
    """A C3PO run on a toy task, in which no token ends a response."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        corpus = write_corpus(folder)
        (folder / "toy_reward.py").write_text(REWARD, encoding="utf-8")
        write_problems(folder / "problems.jsonl", 4096)
        stack.enter_context(mock.patch.dict(os.environ, {"PYTHONPATH": children_path(folder)}))
        stack.enter_context(mock.patch.object(sys, "path", [name, *sys.path]))
        needed = {
            "seq_length": 64,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "lr": 1e-5,
            "lr_decay_style": "constant",
            "train_iters": 1000,
            "tokenizer_model": str(corpus["tokenizer-model"]),
            "prompt_data": (str(folder / "problems.jsonl"),),
            "prompts_per_step": size.prompts,
            "group_size": size.group,
            "max_prompt_length": 16,
            "max_response_length": size.length,
            "rollout_slots": size.prompts * size.group,
            "token_budget": size.prompts * size.group * size.length,
            "minibatches_per_step": 1,
            "microbatch_capacity": size.capacity,
            "kl_loss_coef": 1e-3,
            "entropy_coef": 5e-4,
            "old_logprobs": "recompute",
            "mismatch_correction": "icepop",
            "reward_functions": ("bench=toy_reward:judge",),
            "reward_workers": 4,
        }
        config = config_of(size, **needed | settings)
        session = stack.enter_context(
            open_session(config.parallel, 0, deterministic=config.train.deterministic)
        )
        run = stack.enter_context(RlRun(config, session).opened())
        run.collector.sampling = replace(run.sampling, stop_ids=())
        yield run


class _Steps(MetricsLogger):
    """Keeps a row per step in place of a run's own records."""

    def __init__(self, results: Results, budget: int):
        super().__init__(None, total_steps=1000, log_interval=1000, is_log_rank=False)
        self.results, self.budget = results, budget

    def log(self, step: int, values: dict[str, float], tokens: float, seconds: float) -> None:
        phases = self.phase.drain()
        if values["loss_tokens"] != self.budget:
            self.results.wrong(f"step {step} trained on {values['loss_tokens']} tokens, not on {self.budget}")
        self.results.row(
            step=step, seconds=seconds, mismatch=values["mismatch"],
            tokens_per_second=self.budget / seconds, rollout_tokens_per_second=self.budget / phases["rollout"],
            **{f"seconds_{name}": spent for name, spent in phases.items()},
        )  # fmt: skip


def config_of(size: Size, **settings: Any) -> RunConfig:
    model = {**PRESETS[size.preset], "num_layers": size.layers}
    if size is TINY:
        model["bf16"] = device.has_cuda()
    config = config_from_mapping({**model, **settings})
    validate(config, 1)
    return config


def random_batch(vocabulary: int, size: Size, half: int) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(size.microbatches):
        rows = torch.randint(0, vocabulary, (2, half + 1), generator=generator)
        batch.append(pack_microbatch([(row[:-1], row[1:], torch.ones(half)) for row in rows], size.tokens))
    return batch


@contextlib.contextmanager
def _timed(seconds: list[float]):
    device.synchronize()
    begun = time.perf_counter()
    yield
    device.synchronize()
    seconds.append(time.perf_counter() - begun)


def _mfu(flops_per_second: float) -> float | None:
    """Share of the maker's figure for this card; None for a card that is not listed."""
    peak = peak_of(torch.cuda.get_device_name()) if device.has_cuda() else None
    return None if peak is None else flops_per_second / peak.flops


def _memory(config: RunConfig) -> dict[str, float]:
    """Gigabytes: the highest use, and the planner's estimate of it."""
    planned = rank_memory(config.model, config.parallel, 0, 1).total + activation_bytes(config, 0, 1)
    return {"peak_gb": device.peak_memory_bytes() / 1e9, "planned_gb": planned / 1e9}


def _profile(step: Callable[[], object], path: Path, results: Results) -> None:
    """The ten kernels that cost most go into the facts, twenty-five into ``path``."""
    with torch.profiler.profile(activities=device.profiler_activities()) as profile:
        step()
        device.synchronize()
    averages = profile.key_averages()
    on_device = device.has_cuda()

    def cost(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    total = sum(map(cost, averages)) or 1.0
    dearest = sorted(averages, key=cost, reverse=True)[:25]
    lines = [
        f"{cost(event) / 1e3:10.3f} ms {cost(event) / total:6.1%} {event.count:6} x {event.key[:110]}"
        for event in dearest
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[:10]), flush=True)
    results.facts["dearest"] = [
        {
            "kernel": event.key[:110],
            "ms": cost(event) / 1e3,
            "share": cost(event) / total,
            "calls": event.count,
        }
        for event in dearest[:10]
    ]


def _waits(step: Callable[[], object]) -> int | None:
    """How often the host waits for the device in a step, as torch's sync debug mode counts it; None without a GPU."""
    if not device.has_cuda():
        return None
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        device.warn_of_waits(True)
        try:
            step()
        finally:
            device.warn_of_waits(False)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("part", choices=("pretrain", "rl"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    args = parser.parse_args()
    # Megatron needs its communication in the order of its launches
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    results = Results(args.out, args.part)
    results.facts["tiny"] = args.tiny
    size = TINY if args.tiny else FULL
    (pretrain if args.part == "pretrain" else reinforce)(size, results, args.out)
    results.write()
    print(json.dumps({key: value for key, value in results.facts.items() if key != "dearest"}), flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())
