"""Conversions that are stopped, run out of disk, or are damaged: resumed, and never taken as finished."""

import dataclasses
import errno
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ring.checkpoint.convert import files, stream, to_megatron
from megatron_ring.checkpoint.convert.folders import check_manifest
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.errors import CheckpointError
from tests.helpers.checkpoint.checkpoints import SMALL
from tests.helpers.checkpoint.convert_cases import (
    ODD,
    TOOL,
    Silent,
    assert_same,
    read_hf,
    read_megatron,
    run_tool,
    write_hf,
)
from tests.helpers.paths import python_path


def test_an_interrupted_conversion_goes_on_where_it_stopped(hf: dict[str, Path], tmp_path: Path, monkeypatch):
    target, working = tmp_path / "m", tmp_path / "m/iter_0000000.incomplete"
    room = [150_000]

    class SmallDisk(io.FileIO):
        def write(self, data) -> int:
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode, buffering=0: SmallDisk(path, mode), raising=False)
    with pytest.raises(
        CheckpointError, match="No space left on device; solve that, then run the same command"
    ):
        hf_to_megatron(hf["v1"], target, SMALL, Silent())
    assert working.is_dir() and not (target / "iter_0000000").exists()
    assert (
        not (target / "latest_checkpointed_iteration.txt").exists() and not (working / ".metadata").exists()
    )
    finished = {p.name: p.stat().st_mtime_ns for p in working.glob("*.distcp")}
    assert len(finished) > 2
    room[0] = 10_000_000
    reporter = Silent()
    folder = hf_to_megatron(hf["v1"], target, SMALL, reporter)
    assert any(line.startswith(f"resuming: {len(finished)} of") for line in reporter.lines)
    assert all((folder / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert_same(
        read_megatron(folder), read_megatron(hf_to_megatron(hf["v1"], tmp_path / "whole", SMALL, Silent()))
    )


def test_another_plan_starts_afresh(hf: dict[str, Path], tmp_path: Path):
    working = tmp_path / "h.incomplete"
    hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    shutil.copytree(tmp_path / "m/iter_0000000", working)
    reporter = Silent()
    back = megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, reporter)
    assert any("starting over" in line for line in reporter.lines)
    assert not list(back.glob("*.distcp"))
    assert_same(read_hf(back), read_hf(hf["v1"]))


def test_a_terminated_conversion_never_looks_finished(tmp_path: Path):
    model = dataclasses.replace(ODD["v1"], num_layers=40, num_experts=48)
    source = write_hf(model, tmp_path / "hf", max_file_bytes=1_000_000)
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    words = ["hf-to-megatron", str(source), str(tmp_path / "m"), "--max-file-gb", "1e-5"]
    process = subprocess.Popen(
        [*TOOL, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    working = tmp_path / "m/iter_0000000.incomplete"
    deadline = time.monotonic() + 300
    while not list(working.glob("*.distcp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "m").iterdir() if p.is_dir()] == ["iter_0000000.incomplete"]
    done = run_tool(*words, "--verify")
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr


def test_a_full_disk_is_refused_before_the_first_byte(hf: dict[str, Path], tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CheckpointError, match=r"0\.00 GB free but the conversion writes"):
        hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_after_the_weights_is_one_line_and_resumed(
    hf: dict[str, Path], tmp_path: Path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(to_megatron, "write_manifest", fail)
        hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, Silent())
    reporter = Silent()
    hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, reporter)
    assert any(line.startswith("resuming: ") for line in reporter.lines)


def test_memory_is_given_back_while_a_file_is_written(hf: dict[str, Path], tmp_path: Path, monkeypatch):
    """At every few bytes: what was read is read again wherever it is looked at later."""
    released = []
    monkeypatch.setattr(stream, "SETTLE_BYTES", 3000)
    monkeypatch.setattr(files.MappedFile, "release", _counted(files.MappedFile.release, released))
    hf_to_megatron(hf["v2_mtp"], tmp_path / "m", dataclasses.replace(SMALL, max_file_bytes=10**9), Silent())
    assert len(released) > 20
    assert_same(
        read_hf(megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, Silent())), read_hf(hf["v2_mtp"])
    )


def test_memory_is_given_back_while_another_thread_opens_a_file(tmp_path: Path, monkeypatch):
    tensors = {name: torch.arange(6.0) for name in "abc"}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    source = SafetensorsFolder(tmp_path)

    def look(name: str) -> torch.Tensor:
        return next(iter(source.views(name, Box((0,), (6,)))))[1]

    monkeypatch.setattr(files.MappedFile, "release", lambda _: look("b"))
    look("a")
    source.release()
    assert all(torch.equal(look(name), tensor) for name, tensor in tensors.items())


def _counted(method, calls: list):
    def counted(self):
        calls.append(self)
        return method(self)

    return counted


def test_the_manifest_notices_a_flipped_bit(hf: dict[str, Path], tmp_path: Path):
    folder = hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, Silent())
    assert run_tool("check", tmp_path / "m").returncode == 0
    path = sorted(folder.glob("*.distcp"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has CRC-32"):
        check_manifest(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing; copy it again"):
        check_manifest(folder)


def test_verify_notices_a_flipped_bit(hf: dict[str, Path], tmp_path: Path, monkeypatch):
    written = stream.written

    def damage(*arguments):
        notes = written(*arguments)
        path = sorted(arguments[1].glob("*.distcp"))[1]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return notes

    monkeypatch.setattr(stream, "written", damage)
    with pytest.raises(CheckpointError, match=r"elements of .* differ from"):
        hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, Silent())
    assert not (tmp_path / "m/iter_0000000").exists()
    monkeypatch.undo()
    reporter = Silent()
    hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, reporter)
    assert any("starting over" in line for line in reporter.lines)
