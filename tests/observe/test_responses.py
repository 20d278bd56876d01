"""The table of samples: the best and the worst, readable, and of one run however often it was resumed."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.errors import ConfigError
from megatron_ring.observe.responses import ResponseLog, read_samples
from megatron_ring.rl.rollout_io import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.rl.rollout_metrics import best_and_worst, response_rows
from tests.helpers.rl.collecting import Places
from tests.helpers.rl.rollouts import rollout, step_of


def opened(folder: Path | None, step: int, *, every: int) -> ResponseLog:
    """The log of a run that goes on from ``step``."""
    log = ResponseLog(folder, every=every)
    log.resume(step)
    return log


def scored(uid: int, score: float):
    plain = rollout(uid, 0, 3)
    return replace(plain, reward=replace(plain.reward, score=score))


def rows(seed: int = 0):
    return response_rows(step_of(seed), Places())


def write(table: ResponseLog, step: int) -> None:
    if table.is_due(step):
        table.write(step, rows())


def test_the_best_and_the_worst_and_none_twice():
    rollouts = [scored(uid, score) for uid, score in enumerate([0.5, 1.0, 0.0, 0.7, -1.0, 1.0])]
    assert [r.prompt.uid for r in best_and_worst(rollouts)] == [1, 5, 2, 4]
    assert [r.prompt.uid for r in best_and_worst(rollouts[:3])] == [1, 0, 2]


def test_a_resume_replaces_what_was_said_after_the_checkpoint(tmp_path):
    table = opened(tmp_path, 0, every=2)
    for step in range(1, 9):
        write(table, step)
    assert {row["step"] for row in read_samples(tmp_path / "samples.jsonl")} == {2, 4, 6, 8}
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 10, "cut sho')
    opened(tmp_path, 5, every=2).write(6, rows(1))
    steps = [row["step"] for row in read_samples(tmp_path / "samples.jsonl")]
    assert steps == [2] * 4 + [4] * 4 + [6] * 4


def test_a_resume_on_a_full_disk_and_a_run_from_the_start_lose_no_sample(tmp_path, monkeypatch):
    opened(tmp_path, 0, every=1).write(3, rows())
    file = tmp_path / "samples.jsonl"
    before = file.read_bytes()

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match="No space left on device; check that"),
    ):
        patch.setattr(os, "fsync", full)
        opened(tmp_path, 3, every=1)
    assert file.read_bytes() == before
    opened(tmp_path, 0, every=1)
    assert (tmp_path / "samples.jsonl.old").read_bytes() == before and not file.exists()


class Odd:
    """What a young policy says: line separators that are no newline, and half a character."""

    def decode(self, tokens) -> str:
        return "a\u2028b\x85c\x1ed\ud800e\nf"


def test_any_text_comes_back_as_it_was(tmp_path):
    table = opened(tmp_path, 0, every=1)
    table.write(1, response_rows(step_of(0), Odd()))
    for _ in range(2):
        read = read_samples(tmp_path / "samples.jsonl")
        assert [row["response"] for row in read] == [Odd().decode([])] * 4
        opened(tmp_path, 1, every=1)
    odd = rollout(0, 0, 3)
    odd = replace(odd, reward=replace(odd.reward, detail=Odd().decode([])))
    (back,) = rollouts_from_bytes(rollouts_to_bytes([odd]))
    assert back.reward == odd.reward


def test_ranks_without_a_folder_write_nothing_and_a_full_disk_is_one_line(tmp_path):
    assert not opened(None, 0, every=1).is_due(1)
    gone = opened(tmp_path / "gone", 0, every=1)
    with pytest.raises(ConfigError, match=r"samples\.jsonl: No such file"):
        gone.write(1, rows())
