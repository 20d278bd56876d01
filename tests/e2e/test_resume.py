"""A run that dies and is started again is the run that never died."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.e2e.runs import TINY, TINY_V2, losses, pretrain, read_checkpoint, start, wait_for
from tests.helpers.parallel.spawning import several_worlds
from tests.helpers.parallel.watching import PATIENCE

pytestmark = several_worlds

STEPS = 10


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    pretrain(TINY | corpus | {"save": folder, "train-iters": STEPS})
    return folder


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (read_checkpoint(folder / f"iter_{STEPS:07d}") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different
    assert any(key.startswith("optimizer.state.exp_avg.") for key in ours)


@pytest.mark.parametrize(
    "async_save", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"]
)
def test_killed_run_resumes_bit_equal(straight, corpus, run_dir, async_save):
    settings = (
        TINY
        | corpus
        | {
            "save": run_dir,
            "load": run_dir,
            "train-iters": STEPS,
            "save-interval": 2,
            "async-save": async_save,
        }
    )
    process = start(settings)
    # as early as there is something to resume: a busy machine may kill it some steps later
    saved = run_dir / "latest_checkpointed_iteration.txt"
    wait_for(lambda: saved.exists() and len(losses(run_dir)) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(run_dir)) < STEPS
    pretrain(settings)
    assert losses(run_dir) == losses(straight)
    assert_same_weights(run_dir, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_signal_saves_and_leaves_cleanly(corpus, run_dir, number):
    settings = TINY | corpus | {"save": run_dir, "load": run_dir, "train-iters": 1000}
    process = start(settings)
    wait_for(lambda: len(losses(run_dir)) >= 2, process)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 0
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    assert saved == max(losses(run_dir))
    # the signal may come as early as step 2, before the end of the warm-up
    pretrain(settings | {"train-iters": saved + 1, "lr-warmup-iters": 0})
    assert max(losses(run_dir)) == saved + 1


LAYOUT_CHANGES = [
    pytest.param(
        {},
        1,
        {"expert-model-parallel-size": 2, "pipeline-model-parallel-size": 2},
        4,
        id="one-to-pp2ep2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"expert-model-parallel-size": 2, "pipeline-model-parallel-size": 2},
        4,
        {"tensor-model-parallel-size": 2, "sequence-parallel": True, "expert-tensor-parallel-size": 2},
        2,
        id="pp2ep2-to-tp2etp2",
    ),
]


@pytest.mark.parametrize(("first", "first_world", "second", "second_world"), LAYOUT_CHANGES)
def test_resume_at_another_layout_agrees(corpus, tmp_path, first, first_world, second, second_world):
    """Layer 0 is dense and the rest has experts, so with pp 2 one stage has no expert optimizer at all."""
    common = TINY_V2 | corpus | {"train-iters": STEPS}
    pretrain(common | {"save": tmp_path / "straight"})
    changing = common | {"save": tmp_path / "moved", "load": tmp_path / "moved"}
    pretrain(changing | first | {"exit-interval": 5}, first_world)
    pretrain(changing | second, second_world)
    ours, theirs = losses(tmp_path / "moved"), losses(tmp_path / "straight")
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-5), step
