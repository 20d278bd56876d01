"""A checksum per file, made as the bytes go out, and compared by who asks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import checksums
from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.checkpoint.format import RUN_CONFIG
from megatron_ring.errors import CheckpointError
from tests.helpers.checkpoint.checkpoints import NAME, SMALL, TRAINER, checkpointer, state_of
from tests.helpers.checkpoint.convert_cases import ROOT, Silent
from tests.helpers.paths import python_path

TOOL = ROOT / "tools/verify_checkpoint.py"


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def saved(request, tmp_path_factory) -> tuple[Path, list[torch.Tensor], list[str]]:
    """A saved checkpoint, its state, and the files that were read again for their sums."""
    root = tmp_path_factory.mktemp("sums") / "run"
    read: list[str] = []
    whole = checksums.sum_file
    with (
        pytest.MonkeyPatch.context() as patch,
        checkpointer(save=str(root), async_save=request.param) as writer,
    ):
        patch.setattr(checksums, "sum_file", lambda path: read.append(path.name) or whole(path))
        writer.save(3, TRAINER, {"own.bin": b"a rank's own"})
        writer.finish()
        return root, state_of(writer.engine), read


@pytest.fixture
def root(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def flip(path: Path, bits: int = 8) -> None:
    """Turn over ``bits`` bits in the middle of a file."""
    data = bytearray(path.read_bytes())
    for n in range(bits):
        data[len(data) // 2 + n * (len(data) // 32)] ^= 1 << n
    path.write_bytes(data)


def loaded(root: Path, **settings) -> list[torch.Tensor]:
    with checkpointer(seed=2, load=str(root), **settings) as reader:
        assert reader.load(root) == TRAINER
        return state_of(reader.engine)


def fails(root: Path) -> str:
    with checkpointer(seed=2, verify_checkpoint_integrity=True) as reader:
        before = state_of(reader.engine)
        with pytest.raises(CheckpointError) as caught:
            reader.load(root)
        assert all(map(torch.equal, before, state_of(reader.engine)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_file_is_listed_and_no_large_one_was_read_for_it(saved):
    root, state, read = saved
    folder = root / NAME
    sums = checksums.read_sums(folder)
    assert sums.keys() == {path.name for path in folder.iterdir()} - {checksums.SUMS}
    assert {".metadata", "own.bin", "rng.safetensors", "__0_0.distcp", "__0_1.distcp"} <= sums.keys()
    assert all(checksums.sum_file(folder / name) == each for name, each in sums.items())
    assert not [name for name in read if name.endswith(".distcp") or name == "own.bin"]
    assert all(map(torch.equal, loaded(root, verify_checkpoint_integrity=True), state))


def test_flipped_bits_are_found_by_who_asks(root, saved):
    path = root / NAME / "__0_0.distcp"
    flip(path)
    assert not all(map(torch.equal, loaded(root), saved[1])), "they load when nobody asks"
    line = fails(root)
    assert "__0_0.distcp has CRC-32" in line and "copy it again or load an earlier checkpoint" in line


@pytest.mark.parametrize("name", ["config.toml", "own.bin", "rng.safetensors"])
def test_any_file_counts(root, name):
    flip(root / NAME / name, 1)
    assert f"{name} has CRC-32" in fails(root)
    (root / NAME / name).unlink()
    assert f"{name} missing" in fails(root)


def test_a_checkpoint_without_checksums_loads_when_nobody_asks(root, saved):
    (root / NAME / checksums.SUMS).unlink()
    assert all(map(torch.equal, loaded(root), saved[1]))
    line = fails(root)
    assert "no checksums.json to compare with" in line and "leaves --verify-checkpoint-integrity out" in line


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files": []}',
        '{"files": {"../x": {"bytes": 1, "crc32": "00000000"}}}',
        '{"files": {"x": {"bytes": -1, "crc32": "00000000"}}}',
        '{"files": {"x": {"bytes": 1, "crc32": 0}}}',
        '{"files": {"x": 3}}',
    ],
)
def test_a_damaged_list_is_one_line(root, text):
    (root / NAME / checksums.SUMS).write_text(text)
    assert "checksums.json: " in fails(root)


@pytest.mark.parametrize(
    "name", [".metadata", "__0_0.distcp", "common.pt", "rng.safetensors", "trainer_state.json"]
)
def test_a_file_that_is_loaded_and_not_listed_is_no_clean_checkpoint(root, name):
    path = root / NAME / checksums.SUMS
    listed = json.loads(path.read_text())
    del listed["files"][name]
    path.write_text(json.dumps(listed))
    assert f"checksums.json: has no checksum of {name}, which a load may read" in fails(root)


def test_an_empty_list_and_a_file_that_was_added_are_no_clean_checkpoint(root):
    (root / NAME / "__1_0.distcp").write_bytes(b"x")
    assert "has no checksum of __1_0.distcp" in fails(root)
    (root / NAME / checksums.SUMS).write_text('{"files": {}}')
    done = verify(root)
    assert done.returncode == 2 and "has no checksum of .metadata, __0_0.distcp" in done.stderr, done


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": python_path()}
    words = [sys.executable, "-X", "importtime", str(TOOL), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    lines = done.stderr.splitlines()
    assert not [line for line in lines if line.endswith(" torch")], "it needs no torch"
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time"))
    return done


def test_the_tool_names_every_file_and_its_state(root):
    done = verify(root)
    assert done.returncode == 0 and "9 of 9 files are as written" in done.stdout, done
    flip(root / NAME / "__0_1.distcp")
    (root / NAME / "own.bin").unlink()
    (root / NAME / "stranger").write_text("x")
    done = verify(root / NAME)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "ok       __0_0.distcp" in lines and "missing  own.bin" in lines
    assert any(line.startswith("bad      __0_1.distcp: has CRC-32 ") for line in lines)
    assert "unknown  stranger: no checksum was written for it" in lines
    (root / NAME / checksums.SUMS).unlink()
    done = verify(root)
    assert done.returncode == 2 and done.stderr.count("\n") == 0, done
    assert done.stderr.startswith("error: ") and "no checksums.json to compare with" in done.stderr


def test_a_policys_critic_is_summed_with_it(root, tmp_path):
    critic = Path(shutil.copytree(root, root / folders.CRITIC)) / NAME
    assert verify(root).stdout.count("9 of 9 files are as written") == 2
    flip(critic / "__0_0.distcp")
    for asked in (root, root / NAME):
        done = verify(asked)
        assert done.returncode == 1 and f"{critic}: 8 of 9 files are as written" in done.stdout, done


def test_a_critic_that_is_gone_is_missed(root):
    """Its policy alone is a run that cannot go on."""
    text = (root / NAME / RUN_CONFIG).read_text()
    assert "\ncritic = false\n" in text
    (root / NAME / RUN_CONFIG).write_text(text.replace("\ncritic = false\n", "\ncritic = true\n"))
    checksums.write_sums(root / NAME, {})
    done = verify(root)
    gone = root / folders.CRITIC / NAME
    assert done.returncode == 1 and f"missing  {gone}: the policy's run has a critic" in done.stdout, done
    shutil.copytree(root / NAME, gone)
    assert [verify(asked).returncode for asked in (root, gone)] == [0, 0]


def test_a_converted_checkpoint_has_them_too(hf, tmp_path, monkeypatch):
    read: list[str] = []
    whole = checksums.sum_file
    monkeypatch.setattr(checksums, "sum_file", lambda path: read.append(path.name) or whole(path))
    folder = hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    sums = checksums.read_sums(folder)
    assert sums.keys() == {path.name for path in folder.iterdir()} - {checksums.SUMS}
    assert read and not [name for name in read if name.endswith(".distcp")]
    assert all(wrong == "" for _, wrong in checksums.compare(folder, sums))
    flip(sorted(folder.glob("*.distcp"))[0], 1)
    assert sum(bool(wrong) for _, wrong in checksums.compare(folder, sums)) == 1


def test_an_export_has_them_for_every_file_and_hands_on_none(hf, tmp_path):
    folder = hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    out = megatron_to_hf(folder, tmp_path / "out", SMALL, Silent())
    assert checksums.read_sums(out).keys() == {path.name for path in out.iterdir()} - {checksums.SUMS}
    assert verify(out).returncode == 0
    again = hf_to_megatron(out, tmp_path / "again", SMALL, Silent())
    assert not (again.parent / "hf" / checksums.SUMS).exists()
    flip(out / "config.json", 1)
    shutil.copyfile(next(out.glob("*.safetensors")), out / "left_behind.safetensors")
    done = verify(out)
    assert done.returncode == 2 and "no checksum of left_behind.safetensors" in done.stderr, done
    (out / "left_behind.safetensors").unlink()
    done = verify(out)
    assert done.returncode == 1 and "bad      config.json: has CRC-32 " in done.stdout, done


def test_ranks_share_the_files(tmp_path):
    for name, size in (("a", 10), ("b", 30), ("c", 20)):
        (tmp_path / name).write_bytes(b"x" * size)
    checksums.write_sums(tmp_path, {})
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    found = [checksums.check_share(tmp_path, rank, 2) for rank in range(2)]
    assert found == ["b has 0 of 30 bytes; a has 0 of 10 bytes", "c has 0 of 20 bytes"]
    assert json.loads((tmp_path / checksums.SUMS).read_text())["files"]["a"]["bytes"] == 10
