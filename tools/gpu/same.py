#!/usr/bin/env python3
"""Check that pre-training and RL of a tiny model agree between GPU and CPU in fp32, and that a bf16 resume is
exact.

    python tools/gpu/same.py OUT        writes OUT/same.json; exit code 1 for what is wrong

Without a GPU it compares the CPU with itself, as a rehearsal. The runs are the launchers' own (examples/*.py), as a
user starts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.gpu.results import Results, children_path
from tools.gpu.toy import REWARD, write_corpus, write_problems

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "preset": "ring_lite_tiny", "num-layers": 2, "vocab-size": 512, "bf16": False, "log-interval": 1, "seq-length": 64,
    "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-3, "lr-decay-style": "constant", "deterministic": True,
}  # fmt: skip
RL = {
    "preset": "ring_lite_tiny", "num-layers": 2, "vocab-size": 512, "bf16": False, "log-interval": 1, "prompts-per-step": 4,
    "group-size": 4, "max-prompt-length": 16, "max-response-length": 16, "rollout-slots": 16, "token-budget": 128,
    "minibatches-per-step": 1, "microbatch-capacity": 256, "kl-loss-coef": 1e-3, "lr": 1e-4, "lr-decay-style": "constant",
    "old-logprobs": "recompute", "reward-workers": 1, "train-iters": 2, "token-budget-scope": "global",
}  # fmt: skip
STEPS = 4
SEEDS = (1234, 4321)
TOLERANCE = 1e-4
"""Relative, of a loss: the two devices sum fp32 products in different orders, and differences grow over
steps."""


class Runs:
    """Starts runs in one folder; each has a folder of its own."""

    def __init__(self, folder: Path, results: Results):
        self.folder, self.results = folder, results
        # most of a run's time is its start, and runs that are started together do not depend on one another
        self.pool, self._lock = ThreadPoolExecutor(max_workers=min(6, os.cpu_count() or 1)), threading.Lock()

    def start(self, *words: Any, on_cpu: bool) -> Future[list[dict]]:
        """:meth:`run` beside the others."""
        return self.pool.submit(self.run, *words, on_cpu=on_cpu)

    def run(self, name: str, script: str, settings: dict[str, object], *, on_cpu: bool) -> list[dict]:
        """The training records of a run; empty if it failed, which is then reported."""
        words: list[str] = []
        for key, value in {**settings, "metrics-file": self.folder / name / "metrics.jsonl"}.items():
            if isinstance(value, bool):
                words.append(f"--{key}" if value else f"--no-{key}")
            else:
                words += [f"--{key}", str(value)]
        environment = {
            **os.environ,
            "PYTHONPATH": children_path(self.folder),
            "PYTHONWARNINGS": "ignore",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        if on_cpu:
            environment["MEGATRON_RING_DEVICE"] = "cpu"
        command = [sys.executable, str(ROOT / "examples" / script), *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=self.folder, timeout=300
        )
        if done.returncode != 0:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            with self._lock:
                self.results.wrong(f"{name}: {script} ended with exit code {done.returncode}: {said[:400]}")
            return []
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def compare(
        self, name: str, ours: list[dict], theirs: list[dict], keys: tuple[str, ...], tolerance: float
    ) -> None:
        """A row with the largest relative difference of ``keys`` over the steps, and a line for each that is too large."""
        worst, lines = differences(name, ours, theirs, keys, tolerance)
        for line in lines:
            self.results.wrong(line)
        self.results.row(name=name, steps=len(ours), error=worst)


def differences(
    name: str, ours: list[dict], theirs: list[dict], keys: tuple[str, ...], tolerance: float
) -> tuple[float, list[str]]:
    """(the largest relative difference, a line for each above ``tolerance``)."""
    if len(ours) != len(theirs) or not ours:
        return float("inf"), [f"{name}: {len(ours)} and {len(theirs)} steps"]
    worst, lines = 0.0, []
    for one, other in zip(ours, theirs, strict=True):
        for key in keys:
            gap = abs(one[key] - other[key]) / max(abs(other[key]), 1e-12)
            worst = max(worst, gap)
            if not gap <= tolerance:
                lines.append(
                    f"{name}: step {one['step']}: {key} is {one[key]:.8g} and {other[key]:.8g}, "
                    f"{gap:.1e} apart, at most {tolerance:.0e}"
                )
    return worst, lines


def pretraining(runs: Runs, corpus: dict[str, Path]) -> Callable[[], None]:
    """Start steps in fp32 from one checkpoint on both devices; on the device, in bf16, all steps, and half of them.

    Returns what waits for them, resumes the half and compares.
    """
    base, common = runs.folder / "base", {**MODEL, **corpus, "train-iters": STEPS}
    runs.run("base", "pretrain_ring.py", {**common, "train-iters": 1, "save": base}, on_cpu=True)
    start = {**common, "pretrained-checkpoint": base}
    saved = {"save": runs.folder / "half", "load": runs.folder / "half", "save-interval": 2}
    halved = {**start, **saved, "bf16": True}
    cpu = runs.start("cpu", "pretrain_ring.py", start, on_cpu=True)
    device = runs.start("device", "pretrain_ring.py", start, on_cpu=False)
    first = runs.start("half", "pretrain_ring.py", {**halved, "exit-interval": 2}, on_cpu=False)
    straight = runs.start("straight", "pretrain_ring.py", {**start, "bf16": True}, on_cpu=False)

    def compare() -> None:
        steps = [*first.result(), *runs.run("rest", "pretrain_ring.py", halved, on_cpu=False)]
        keys = ("loss", "grad_norm")
        runs.compare("pre-training on both devices", device.result(), cpu.result(), keys, TOLERANCE)
        runs.compare("a resume on the device in bf16, bit for bit", steps, straight.result(), keys, 0.0)

    return compare


def reinforcement(runs: Runs) -> Callable[[], None]:
    """Start two steps on both devices: the same uniforms draw the same tokens unless one is within rounding of an edge.

    That happens in one or two of a hundred runs, and moves the gradient by a hundredth: then a second seed decides.
    """
    problems = runs.folder / "problems.jsonl"
    write_problems(problems, 64)
    (runs.folder / "toy_reward.py").write_text(REWARD, encoding="utf-8")
    settings = {
        **RL,
        "tokenizer-model": runs.folder / "tok.model",
        "prompt-data": problems,
        "pretrained-checkpoint": runs.folder / "base",
        "reward-functions": "bench=toy_reward:judge",
    }

    def start(seed: int) -> list[Future]:
        seeded = {**settings, "seed": seed}
        return [
            runs.start(f"rl-{where}-{seed}", "rl_ring.py", seeded, on_cpu=where == "cpu")
            for where in ("device", "cpu")
        ]

    started = start(SEEDS[0])

    def compare() -> None:
        what = "a C3PO step on both devices"
        pair = [each.result() for each in started]
        _, lines = differences(what, *pair, ("loss_tokens", "c3po/generated", "grad_norm"), 10 * TOLERANCE)
        if lines and all(pair):
            print(f"{lines[0]}; seed {SEEDS[1]} decides whether a draw was within rounding", flush=True)
            pair = [each.result() for each in start(SEEDS[1])]
        device, cpu = pair
        runs.compare(f"{what}: tokens", device, cpu, ("loss_tokens", "c3po/generated"), 0.0)
        runs.compare(f"{what}: gradient", device[:1], cpu[:1], ("grad_norm",), 10 * TOLERANCE)

    return compare


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for same.json")
    args = parser.parse_args()
    results = Results(args.out, "same")
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), results)
        for compare in (pretraining(runs, write_corpus(runs.folder)), reinforcement(runs)):
            compare()
    results.write()
    print(f"{len(results.rows)} comparisons, {len(results.bad)} wrong", flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())
