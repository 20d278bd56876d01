"""Checkpoint folders: complete or not there; the pointer last; nothing foreign is run."""

from __future__ import annotations

import collections
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_ring.checkpoint import checksums, run_lock
from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.format import TRAINER_STATE, TrainerState, read_attachment
from megatron_ring.checkpoint.index import read_index
from megatron_ring.checkpoint.megatron_io import check_common
from megatron_ring.durable import write_durably
from megatron_ring.errors import CheckpointError


def save(root: Path, iteration: int, text: str = "x") -> Path:
    working = folders.begin(root, iteration, 100)
    (working / "data").write_text(text)
    return folders.commit(working, iteration)


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *parts: str) -> None:
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_a_commit_names_the_folder_then_moves_the_pointer(tmp_path):
    working = folders.begin(tmp_path, 7, 100)
    assert working.name == "iter_0000007.incomplete"
    assert folders.latest(tmp_path) is None and folders.iterations(tmp_path) == []
    final = folders.commit(working, 7)
    assert final == folders.latest(tmp_path) == tmp_path / "iter_0000007"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7\n"
    assert not working.exists()


@pytest.mark.parametrize("moment", ["rename", "pointer"])
def test_a_save_killed_before_its_end_leaves_the_previous_one(tmp_path, monkeypatch, moment):
    previous = save(tmp_path, 5)
    working = folders.begin(tmp_path, 10, 100)
    (working / "data").write_text("half")

    def die(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "rename":
            patch.setattr(Path, "rename", die)
        else:
            patch.setattr(folders, "write_durably", die)
        folders.commit(working, 10)
    assert folders.latest(tmp_path) == previous
    # the next save of that step starts from nothing
    assert list(folders.begin(tmp_path, 10, 100).iterdir()) == []
    assert folders.latest(tmp_path) == previous


def test_the_first_save_is_not_lost_with_its_pointer(tmp_path, monkeypatch):
    """Killed between name and pointer, or copied without it: the run went back to step 0 and said nothing."""

    def die(*_args: object) -> None:
        raise KeyboardInterrupt

    working = folders.begin(tmp_path, 5, 100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folders, "write_durably", die)
        folders.commit(working, 5)
    assert folders.latest(tmp_path) == tmp_path / "iter_0000005"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_lost_pointer_beside_several_checkpoints_is_one_line(tmp_path, dangling):
    for step in (5, 10):
        save(tmp_path, step)
    pointer = tmp_path / folders.TRACKER
    pointer.unlink()
    if dangling:
        pointer.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError) as caught:
        folders.latest(tmp_path)
    one_line(
        caught,
        str(pointer),
        "No such file"
        if dangling
        else "is missing beside checkpoints of steps 5, 10; write the step to resume",
    )


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, "old")
    final = save(tmp_path, 5, "new")
    assert (final / "data").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000005",
        "latest_checkpointed_iteration.txt",
    ]


def test_a_step_saved_again_and_killed_between_two_names_is_still_there(tmp_path, monkeypatch):
    final, rename = save(tmp_path, 5, "old"), Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".incomplete"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        save(tmp_path, 5, "new")
    assert not final.exists() and (folders.latest(tmp_path) / "data").read_text() == "old"
    assert (save(tmp_path, 5, "new") / "data").read_text() == "new"
    assert folders.latest(tmp_path) == final and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 20]), (1, [20]), (2, [3, 20]), (9, [1, 2, 3, 20])])
def test_pruning_keeps_the_newest_complete_ones(tmp_path, keep, left):
    for iteration in (1, 2, 20, 3):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000030.incomplete").mkdir()
    (tmp_path / "notes").mkdir()
    folders.prune(tmp_path, 20, keep)
    assert folders.iterations(tmp_path) == left
    assert (tmp_path / "iter_0000030.incomplete").exists() and (tmp_path / "notes").exists()


def test_a_pointer_to_a_missing_step_names_those_that_are_there(tmp_path):
    save(tmp_path, 4)
    (tmp_path / folders.TRACKER).write_text("9\n")
    with pytest.raises(CheckpointError) as caught:
        folders.latest(tmp_path)
    one_line(caught, folders.TRACKER, "names step 9", "(found: 4)", "write one of those")


@pytest.mark.parametrize(
    "text", ["", "release", "-3", "../../etc", "\u0663", "1" + "0" * 4000, b"\xff\xfe7", "3 4"]
)
def test_a_damaged_pointer_is_refused(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / folders.TRACKER).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        folders.latest(tmp_path)
    one_line(caught, repr(data.decode("utf-8", "backslashreplace")[:40]), "must hold a step number")
    assert len(str(caught.value)) < 300


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(100, 1, 99))
    with pytest.raises(CheckpointError) as caught:
        folders.begin(tmp_path, 3, 10**9)
    one_line(caught, f"--save {tmp_path}", "0.00 GB free", "needs 1.00 GB", "--keep-last-n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("I was here first")
    for root in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(CheckpointError) as caught:
            folders.begin(root, 3, 100)
        one_line(caught, f"--save {root}", "name a folder that can be written")
    assert (tmp_path / "run").read_text() == "I was here first"


WHOLE = {"iteration": 3, "optimizer_steps": 3, "layout": {}, "model": {}, "trainer": {"step": 3}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "holds a list"),
        ('{"iteration": 3}', "lacks optimizer_steps"),
        ("[" * 100_000, "nested too deeply"),
        ('{"iteration": ' + "9" * 5000 + "}", "digits"),
        ('{"iteration": 3, "iteration": 4}', "the key 'iteration' is there twice"),
        (json.dumps(WHOLE).encode("utf-16"), "codec can't decode"),
        *((json.dumps({**WHOLE, "trainer": value}), "for trainer") for value in (None, [], 3, "x")),
        *(
            (json.dumps({**WHOLE, "iteration": value}), "for iteration")
            for value in (None, True, -1, 1.5, "3")
        ),
        *((json.dumps({**WHOLE, "stage": value}), "for stage") for value in (3, [], True)),
        *((json.dumps({**WHOLE, "layout": value}), "for layout") for value in (None, [])),
        (json.dumps({k: v for k, v in WHOLE.items() if k != "trainer"}), "lacks trainer"),
    ],
)
def test_trainer_state_that_is_none_is_refused(tmp_path, text, reason):
    if text is not None:
        (tmp_path / TRAINER_STATE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        TrainerState.read(tmp_path)
    one_line(caught, TRAINER_STATE, reason, "load a complete checkpoint folder")


def test_trainer_state_comes_back_as_it_was_written(tmp_path):
    state = TrainerState(**WHOLE, stage="sft")
    state.write(tmp_path)
    assert TrainerState.read(tmp_path) == state


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.symlink_to(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [as_pipe, as_loop, as_device, Path.mkdir])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    for name, read in (
        (TRAINER_STATE, lambda: TrainerState.read(tmp_path)),
        (folders.TRACKER, lambda: folders.latest(tmp_path)),
        ("own.bin", lambda: read_attachment(tmp_path, "own.bin")),
        (".metadata", lambda: read_index(tmp_path)),
        (checksums.SUMS, lambda: checksums.read_sums(tmp_path)),
        ("common.pt", lambda: check_common(tmp_path)),
        (run_lock.LOCK, lambda: run_lock.must_be_mine(tmp_path)),
    ):
        make(tmp_path / name)
        if make is as_loop and name == folders.TRACKER:
            # a link to nothing is no pointer
            continue
        with pytest.raises(CheckpointError) as caught:
            read()
        one_line(caught, str(tmp_path / name))


def test_a_ranks_own_file_comes_back_whole(tmp_path):
    """The limit on its size is no memory that reading it takes."""
    (tmp_path / "own.bin").write_bytes(b"x" * 100_000)
    assert read_attachment(tmp_path, "own.bin") == b"x" * 100_000


def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no plain file"):
        write_durably(tmp_path / "pipe", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()
