#!/usr/bin/env python3
"""Where a step would make the host wait for a GPU, found without one: the real code on pretended CUDA tensors.

    python tools/gpu/waits.py pretrain                       a pre-training step at tiny size
    python tools/gpu/waits.py rl routing_replay='"R3"'       a C3PO step, with settings as Python values

Each line says how often, what was waited for, and where: "size" is a result whose shape only the device knows, "to device"
and "to host" are copies; pageable copies are called asynchronous and may still wait. What a GPU would refuse
raises: tensors of two devices in one operation and, with deterministic=True, what has no such algorithm. Waits
inside a library, and collectives of several ranks, are not seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from megatron_ring.config.settings import settings as known_settings
from megatron_ring.config.settings import unknown
from megatron_ring.errors import ConfigError
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tools.gpu.pretend import Place, Seen, pretending
from tools.gpu.whole import Size, config_of, open_rl, random_batch

SMALL = Size(
    preset="ring_lite_tiny", layers=2, tokens=64, microbatches=2, steps=2, prompts=2, group=2, length=4, capacity=64
)  # fmt: skip


@contextlib.contextmanager
def training(size: Size, **settings: Any) -> Iterator[tuple[Callable[[], Any], Seen]]:
    """An engine on the pretended GPU: one step of it, and what was seen."""
    config = {"seq_length": size.tokens, "micro_batch_size": 1, "global_batch_size": size.microbatches}
    with pretending() as seen:
        run = config_of(
            size, **config | {"lr": 1e-4, "bf16": True, "use_distributed_optimizer": True} | settings
        )
        with open_session(run.parallel, seed=1, deterministic=run.train.deterministic) as session:
            engine = Engine(run, session)
            batch = random_batch(run.model.vocab_size, size, size.tokens // 2)
            warmup = 0.5 if run.model.moe_router_warmup_iters else 1.0
            yield lambda: engine.step(batch, NextTokenObjective(), 1e-4, warmup), seen


@contextlib.contextmanager
def reinforcing(size: Size, **settings: Any) -> Iterator[tuple[Callable[[], Any], Seen]]:
    """A C3PO run on the pretended GPU: one step of it, and what was seen."""
    with pretending() as seen, open_rl(size, **{"bf16": True, "reward_workers": 1} | settings) as run:
        metrics = MetricsLogger(None, total_steps=1000, log_interval=1000, is_log_rank=False)
        yield lambda: run.train_step(metrics), seen


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE. Example: ``settings_of(["lr=1e-3"]) == {"lr": 1e-3}``."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known_settings():
            raise unknown(name, list(known_settings()), "setting")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ConfigError(
                f"{word} must be NAME=VALUE with a Python value; text wants quotes of its own: {name}='\"...\"'"
            ) from None
    return found


def one_step(opened: contextlib.AbstractContextManager) -> Seen:
    """What is seen in the second step: the first one allocates what stays."""
    with opened as (step, seen):
        step()
        seen.clear()
        step()
    return seen


def by_function(places: Counter[Place]) -> dict[tuple[str, str], int]:
    """Counts by kind and function, which outlast a change of lines."""
    counts: Counter[tuple[str, str]] = Counter()
    for place, count in places.items():
        counts[place.kind, place.function] += count
    return dict(counts)


def _table(seen: Seen) -> Iterator[str]:
    for title, places in (("waits", seen.waits), ("pageable copies", seen.pageable)):
        yield f"{sum(places.values())} {title}"
        for place, count in sorted(places.items()):
            yield f"{count:6}  {place.kind:10}  {place.file}:{place.line}  {place.function}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("pretrain", "rl"))
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="the project's settings")
    args = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        settings = settings_of(args.settings)
        opened = training(SMALL, **settings) if args.part == "pretrain" else reinforcing(SMALL, **settings)
        seen = one_step(opened)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print("\n".join(_table(seen)))


if __name__ == "__main__":
    main()
