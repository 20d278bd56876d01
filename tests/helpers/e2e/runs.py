"""Start real training runs on a tiny corpus and read what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.helpers.parallel.preloaded import free_port
from tests.helpers.parallel.watching import (
    PATIENCE,
    assert_ended_well,
    kill_all,
    run_preloaded,
    write_stacks,
)
from tests.helpers.paths import python_path

ROOT = Path(__file__).resolve().parents[3]

TINY = {
    "preset": "ring_lite_tiny",
    "num-layers": 2,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 32,
    "vocab-size": 512,
    "moe-ffn-hidden-size": 32,
    "moe-shared-expert-intermediate-size": 32,
    "seq-length": 64,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "lr": 2e-3,
    "lr-warmup-iters": 3,
    "log-interval": 1,
}
TINY_V2 = TINY | {
    "preset": "ring_mini_v2_tiny",
    "ffn-hidden-size": 96,
    "first-k-dense-replace": 1,
    "mtp-num-layers": 1,
}


def flags(settings: dict[str, object]) -> list[str]:
    """``{"lr": 1, "bf16": False}`` as command-line words."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return words


def launcher(world: int) -> list[str]:
    """What starts a script, or with ``-m`` a module, on ``world`` processes."""
    start = [sys.executable, "-W", "ignore"]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        start += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return start


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}


def run(script: str, settings: dict[str, object], world: int = 1) -> subprocess.CompletedProcess[str]:
    return run_preloaded([str(ROOT / script), *flags(settings)], world, cwd=ROOT, env=environment())


def pretrain(settings: dict[str, object], world: int = 1) -> subprocess.CompletedProcess[str]:
    result = run("examples/pretrain_ring.py", settings, world)
    assert_ended_well(result)
    return result


def start(settings: dict[str, object], world: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher(world), str(ROOT / "examples/pretrain_ring.py"), *flags(settings)],
        env=environment() | {"PYTHONFAULTHANDLER": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until ``condition``; ends the run, and says where it was, if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not condition():
            assert process.poll() is None, f"the run ended before its time: {process.stdout.read()[-3000:]}"
            if time.monotonic() > deadline:
                write_stacks(process, sys.stderr.fileno())
                raise AssertionError(f"the run did not get there: {process.stdout.read()[-6000:]}")
            time.sleep(0.02)
    except BaseException:
        kill_all(process, set())
        raise


def records(folder: Path, kind: str = "train") -> list[dict]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    # read once: the run may write on meanwhile
    rows = records(folder)
    found = {record["step"]: record["loss"] for record in rows}
    assert len(found) == len(rows), "a step is reported twice"
    return found


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, whole, without a process group."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    _load_state_dict(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors
