"""RL runs that die at a given line of a step, each in a forked child: ``python -m tests.helpers.e2e.rl_worker FOLDER``.

Imports torch and Megatron once. ``FOLDER/settings.json`` holds the run's flat settings. Writes
``FOLDER/NAME.jsonl`` per scenario: one line per step with everything that was sampled and the loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LINES = (
    "prompts", "generate", "reward", "advantage", "budget", "pack", "score", "step", "save", "publish",
)  # fmt: skip
DIES_IN_STEP = 1
"""Counted from 0: a checkpoint of the first step is there."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Kills the process when ``line`` is reached in step ``DIES_IN_STEP``."""

    def __init__(self, line: str | None):
        self.line = line
        self.step = 0

    def wrap(self, owner: Any, name: str, line: str, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            armed = line == self.line and self.step == DIES_IN_STEP
            if armed and not after:
                die()
            result = original(*args, **kwargs)
            if armed:
                die()
            return result

        setattr(owner, name, wrapped)

    def wrap_generate(self, engine: type) -> None:
        """Dies with some responses out and others half done."""
        original = engine.generate

        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for count, response in enumerate(original(*args, **kwargs)):
                if self.line == "generate" and self.step == DIES_IN_STEP and count == 3:
                    die()
                yield response

        engine.generate = generate


def record(trap: Trap, path: Path) -> Callable[..., Any]:
    """A ``plan`` that notes the step's rollouts before it goes on."""
    from megatron_ring.rl.batch.planner import MinibatchPlanner

    original = MinibatchPlanner.plan

    def plan(self, rollouts, carried, step):
        rows = [
            [*r.response.key, r.response.stop, _digest(r.response.tokens_R), _digest(r.response.logprobs_R)]
            for r in rollouts
        ]
        rows.append([[r.response.key, r.start, r.carried] for r in carried])
        with path.open("a") as file:
            file.write(json.dumps([step, rows]) + "\n")
        return original(self, rollouts, carried, step)

    return plan


def _digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def run(folder: Path, name: str, line: str | None) -> None:
    from megatron_ring.checkpoint import folder as folders
    from megatron_ring.config.check import validate
    from megatron_ring.config.load import config_from_mapping
    from megatron_ring.rl.batch import planner
    from megatron_ring.rl.collect.collector import Collector
    from megatron_ring.rl.collect.sampler import RolloutSampler
    from megatron_ring.rl.rollout.inprocess import InProcessEngine
    from megatron_ring.stages import rl
    from megatron_ring.train.engine import Engine

    trap = Trap(line)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"save": str(folder / name), "load": str(folder / name)}
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    config = config_from_mapping(settings)
    validate(config, 1, "rl")
    planner.MinibatchPlanner.plan = record(trap, folder / f"{name}.jsonl")
    trap.wrap(Collector, "_draw", "prompts", after=True)
    trap.wrap_generate(InProcessEngine)
    trap.wrap(RolloutSampler, "_rewards_of", "reward")
    trap.wrap(rl, "assign", "advantage")
    trap.wrap(planner, "select", "budget", after=True)
    trap.wrap(planner, "pack", "pack", after=True)
    trap.wrap(Engine, "score", "score", after=True)
    trap.wrap(Engine, "update", "step", after=True)
    trap.wrap(folders, "commit", "save")
    trap.wrap(InProcessEngine, "publish", "publish")
    original = rl.RlRun.train_step

    def train_step(self, metrics):
        trap.step = self.step
        original(self, metrics)

    rl.RlRun.train_step = train_step
    rl.train_rl(config)


def in_child(folder: Path, name: str, line: str | None) -> int:
    """The child's exit status, -9 where it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            run(folder, name, line)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder = Path(sys.argv[1])
    import torch

    import megatron_ring.stages.rl  # noqa: F401

    torch.set_num_threads(1)
    codes = {"straight": [in_child(folder, "straight", None)]}
    for line in sys.argv[2:] or LINES:
        codes[line] = [in_child(folder, line, line), in_child(folder, line, None)]
        print(line, codes[line], flush=True)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
