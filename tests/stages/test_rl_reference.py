"""A resumed run's reference is the one it began with, or the command is refused."""

from __future__ import annotations

import logging
import shutil

import pytest

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.format import TRAINER_STATE
from megatron_ring.checkpoint.origin import must_be_same
from megatron_ring.errors import CheckpointError
from megatron_ring.stages.rl import train_rl
from tests.helpers.e2e.runs import records


def test_a_resume_that_names_other_first_weights_is_refused(configure, tmp_path, caplog):
    """Without --pretrained-checkpoint the reference would be random weights, after one more step of its run others."""
    first, run = tmp_path / "first", tmp_path / "run"
    train_rl(configure(save=str(first), train_iters=1))
    began = {"kl_loss_coef": 1e-2, "save": str(run), "load": str(run), "pretrained_checkpoint": str(first)}
    train_rl(configure(**began, train_iters=1))
    name = str(first / "iter_0000001")
    with pytest.raises(CheckpointError) as caught:
        train_rl(configure(**began | {"pretrained_checkpoint": None}))
    line = str(caught.value)
    assert f"step 1 of {first}, but this command names random weights of seed " in line and "\n" not in line
    assert f"name them with --pretrained-checkpoint {name}, or set --kl-loss-coef 0" in line
    shutil.copytree(name, first / "iter_0000007")
    state = (first / "iter_0000007" / TRAINER_STATE).read_text()
    (first / "iter_0000007" / TRAINER_STATE).write_text(state.replace('"iteration": 1', '"iteration": 7'))
    (first / folders.TRACKER).write_text("7\n")
    with pytest.raises(
        CheckpointError, match=f"step 1 of {first}, but this command names step 7 of {first};"
    ):
        train_rl(configure(**began))
    sums = first / "iter_0000001/checksums.json"
    sums.write_text(sums.read_text() + "\n")
    with caplog.at_level(logging.WARNING):
        train_rl(configure(**began | {"pretrained_checkpoint": name}))
    assert "holds other files of that step" in caplog.text and len(records(tmp_path)) == 2


def test_without_a_reference_the_first_weights_need_no_name(configure, tmp_path):
    first, run = tmp_path / "first", tmp_path / "run"
    train_rl(configure(save=str(first), train_iters=1))
    where = {"save": str(run), "load": str(run)}
    train_rl(configure(**where, pretrained_checkpoint=str(first), train_iters=1))
    train_rl(configure(**where))
    with pytest.raises(CheckpointError, match=f"iter_0000002: the reference is .* step 1 of {first}, but"):
        train_rl(configure(**where, kl_loss_coef=1e-2))


BASE = {"folder": "/m/base/iter_0000000", "step": 0, "crc32": "aa"}


def test_two_converted_models_are_both_of_step_0_and_are_told_apart():
    other = {"folder": "/m/other/iter_0000000", "step": 0, "crc32": "bb"}
    with pytest.raises(CheckpointError, match="step 0 of /m/base, but this command names step 0 of /m/other"):
        must_be_same(BASE, other, None)
    with pytest.raises(CheckpointError, match="names step 0 of /m/other"):
        must_be_same(BASE, {**other, "written_from": "/hub/other"}, None)
    must_be_same(BASE, {**other, "crc32": "aa"}, None)


def test_a_reshard_of_the_first_weights_is_warned_of(caplog: pytest.LogCaptureFixture):
    again = {"folder": "/m/again/iter_0000000", "step": 0, "crc32": "bb", "written_from": BASE["folder"]}
    must_be_same(BASE, again, None)
    assert "/m/again/iter_0000000 holds other files of that step" in caplog.text
