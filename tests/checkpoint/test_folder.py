"""Checkpoint folders: complete or not there; the pointer last; nothing foreign is run."""

from __future__ import annotations

import collections
import os
import pathlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import folder as folders
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


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, "old")
    final = save(tmp_path, 5, "new")
    assert (final / "data").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000005",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 20]), (1, [20]), (2, [3, 20]), (9, [1, 2, 3, 20])])
def test_pruning_keeps_the_newest_complete_ones(tmp_path, keep, left):
    for iteration in (1, 2, 20, 3):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000030.incomplete").mkdir()
    (tmp_path / "notes").mkdir()
    folders.prune(tmp_path, keep)
    assert folders.iterations(tmp_path) == left
    assert (tmp_path / "iter_0000030.incomplete").exists() and (tmp_path / "notes").exists()


def test_a_pointer_to_a_missing_step_names_those_that_are_there(tmp_path):
    save(tmp_path, 4)
    (tmp_path / folders.TRACKER).write_text("9\n")
    with pytest.raises(CheckpointError) as caught:
        folders.latest(tmp_path)
    one_line(caught, folders.TRACKER, "names step 9", "(found: 4)", "write one of those")


@pytest.mark.parametrize("text", ["", "release", "-3", "../../etc"])
def test_a_damaged_pointer_is_refused(tmp_path, text):
    (tmp_path / folders.TRACKER).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        folders.latest(tmp_path)
    one_line(caught, repr(text), "must hold a step number")


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


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"iteration": 3}'], ids=["missing", "cut", "a-list", "too-little"]
)
def test_trainer_state_that_is_none_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / folders.TRAINER_STATE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        folders.read_trainer_state(tmp_path)
    one_line(caught, folders.TRAINER_STATE, "load a complete checkpoint folder")


class Evil:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls what ``module`` holds under the dotted ``name``."""
    out = (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
        + b"\x93("
    )
    for argument in arguments:
        out += pickle.dumps(argument, 2)[2:-1]
    return out + b"tR."


def evil_pickles(mark: Path) -> dict[str, bytes]:
    command = f"touch {mark}"
    return {
        "os.system": pickle.dumps(Evil(os.system, command)),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        # ways round a check of the module's name alone
        "an import of a trusted module": named("torch", "os.system", command),
        "an import of a trusted standard module": named("pathlib", "os.system", command),
        "a reader of pickles": named("torch.storage", "_load_from_bytes", torch_bytes(mark)),
        "a runner inside a trusted module": named("torch.utils.collect_env", "run", command),
    }


def torch_bytes(mark: Path) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(Evil(pathlib.Path.touch, mark), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("way", evil_pickles(Path("x")))
def test_metadata_that_would_run_code_is_refused_and_nothing_runs(tmp_path, way):
    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(evil_pickles(mark)[way])
    with pytest.raises(CheckpointError) as caught:
        folders.check_metadata(tmp_path)
    one_line(caught, ".metadata", "cannot be read safely", "load a checkpoint that Megatron wrote")
    assert not mark.exists()


def test_the_evil_pickles_are_evil(tmp_path):
    """Read without a guard each of them does what it came for, but for ways that need torch's own import."""
    for way, data in evil_pickles(tmp_path / "ran").items():
        (tmp_path / "ran").unlink(missing_ok=True)
        __import__("torch.utils.collect_env")
        pickle.loads(data)
        assert (tmp_path / "ran").exists(), way


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(3)[:-1]], ids=["empty", "text", "cut"])
def test_damaged_metadata_is_refused(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        folders.check_metadata(tmp_path)
    one_line(caught, ".metadata", "cannot be read safely")


def test_missing_metadata_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        folders.check_metadata(tmp_path)
    one_line(caught, ".metadata: No such file or directory", "load a complete checkpoint folder")
