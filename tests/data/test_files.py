import errno
import os
from pathlib import Path

import pytest

from megatron_ring.data.files import written_whole
from megatron_ring.errors import DataError


def test_files_appear_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "new" / "a.txt"
    with written_whole(target) as (temporary,):
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a", tmp_path / "b") as (a, _):
        a.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_one_line(tmp_path: Path):
    with pytest.raises(DataError) as caught, written_whole(tmp_path / "a") as (a,):
        a.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == (
        f"cannot write {tmp_path}/a: No space left on device; the folder must be writable and have room, "
        "choose another or free some"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"cannot write .*file/a: (Not a directory|File exists)"),
        written_whole(tmp_path / "file" / "a"),
    ):
        pytest.fail("the block ran")


def test_a_folder_in_the_way_is_one_line(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="Is a folder"), written_whole(tmp_path / "a"):
        pytest.fail("the block ran")


def test_a_kill_between_renames_never_leaves_an_old_index_over_new_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, index = tmp_path / "c.bin", tmp_path / "c.idx"
    data.write_text("old")
    index.write_text("old")
    rename = Path.replace

    def die_after_data(path: Path, target: Path) -> Path:
        if target == index:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", die_after_data)
    with pytest.raises(KeyboardInterrupt), written_whole(data, index) as paths:
        for path in paths:
            path.write_text("new")
    assert data.read_text() == "new" and not index.exists()
