"""safetensors files from outside: what the format forbids is refused in a line, whatever it is."""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.convert.safetensors_header import read_header
from megatron_ring.checkpoint.convert.safetensors_io import INDEX, SafetensorsFolder
from megatron_ring.errors import CheckpointError


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *parts: str) -> None:
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    for part in parts:
        assert part in line, line


def entry(start: int, stop: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def with_header(header: Any, num_bytes: int = 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * num_bytes


def test_what_the_package_wrote_is_read(tmp_path):
    tensors = {"b": torch.ones(2, 3), "a": torch.zeros(5, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found = {name: info for name, info, _ in read_header(tmp_path / "x")}
    assert found == {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.tensors == found


TWO = {"a": entry(0, 16), "b": entry(16, 32)}
BAD: dict[str, tuple[bytes, str]] = {
    "overlapping": (
        with_header({"a": entry(0, 16), "b": entry(8, 24)}, 24),
        "'b' overlaps the tensor before it",
    ),
    "the same bytes twice": (with_header({"a": entry(0, 16), "b": entry(0, 16)}, 16), "overlaps"),
    "a hole": (
        with_header({"a": entry(0, 16), "b": entry(20, 36)}, 36),
        "'b' begins after a hole of 4 bytes",
    ),
    "a hole at the start": (with_header({"a": entry(16, 32)}), "'a' begins after a hole of 16 bytes"),
    "bytes behind the last": (with_header(TWO, 40), "truncated or damaged"),
    "bytes missing": (with_header(TWO, 31), "truncated or damaged"),
    "a key twice": (
        with_header(
            b'{"a":'
            + json.dumps(entry(0, 16)).encode()
            + b',"a":'
            + json.dumps(entry(16, 32)).encode()
            + b"}"
        ),
        "the key 'a' is there twice",
    ),
    "a field twice": (
        with_header(b'{"a":{"dtype":"F32","shape":[4],"shape":[2],"data_offsets":[0,16]}}', 16),
        "the key 'shape' is there twice",
    ),
    "a negative size": (with_header({"a": entry(0, 16, [-4])}, 16), "no shape of integers"),
    "two negative sizes": (with_header({"a": entry(0, 16, [-2, -2])}, 16), "no shape of integers"),
    "a fraction": (with_header({"a": entry(0, 16, [4.0])}, 16), "no shape of integers"),
    "true": (with_header({"a": entry(0, 4, [True])}, 4), "no shape of integers"),
    "text for a size": (with_header({"a": entry(0, 16, ["4"])}, 16), "no shape of integers"),
    "an object for a shape": (with_header({"a": entry(0, 16, {"4": 4})}, 16), "no shape of integers"),
    "a size of 2**62": (
        with_header({"a": entry(0, 16, [1 << 62])}, 16),
        "has 16 bytes, not 18,446,744,073,709,551,616",
    ),
    "a size of 2**64": (with_header({"a": entry(0, 16, [1 << 64, 0])}, 16), "no shape of integers"),
    "a product that wraps round": (
        with_header({"a": entry(0, 16, [1 << 62, 1 << 62, 4])}, 16),
        "has 16 bytes, not",
    ),
    "a thousand dimensions": (with_header({"a": entry(0, 4, [1] * 1000)}, 4), "no shape of integers"),
    "backwards": (with_header({"a": entry(16, 0)}, 16), "no data_offsets"),
    "before the start": (with_header({"a": entry(-16, 0)}, 16), "no data_offsets"),
    "an offset of true": (with_header({"a": entry(False, 16)}, 16), "no data_offsets"),
    "an offset of 2**64": (with_header({"a": entry(0, 1 << 64)}, 16), "no data_offsets"),
    "three offsets": (
        with_header({"a": {**entry(0, 16), "data_offsets": [0, 8, 16]}}, 16),
        "no data_offsets",
    ),
    "another number of bytes": (with_header({"a": entry(0, 16, [4], "F64")}, 16), "has 16 bytes, not 32"),
    "a dtype that is a list": (with_header({"a": entry(0, 16, [4], [])}, 16), "has no dtype"),
    "an unknown dtype": (with_header({"a": entry(0, 16, [4], "Q4_0")}, 16), "has dtype Q4_0"),
    "no shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16), "no shape of integers"),
    "an entry that is a number": (with_header({"a": 3}, 0), "'a' is 3, not an object"),
    "notes that are a list": (with_header({"__metadata__": []}, 0), "no object of strings"),
    "notes of numbers": (with_header({"__metadata__": {"n": 1}}, 0), "no object of strings"),
    "a list": (with_header([], 0), "holds a list"),
    "nested 100,000 deep": (with_header(b"[" * 100_000, 0), "nested too deeply"),
    "objects nested 100,000 deep": (with_header(b'{"a":' * 100_000, 0), "nested too deeply"),
    "not UTF-8": (with_header(b'{"\xff": 1}', 0), "no safetensors file"),
    "a number of 5,000 digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}", 0), "no safetensors file"),
    "an empty file": (b"", "no safetensors file"),
    "seven bytes": (b"\0" * 7, "no safetensors file"),
    "a header longer than the file": (
        struct.pack("<Q", 1000) + b"{}",
        "header of 1,000 bytes in a file of 10",
    ),
    "a header of 2**63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "in a file of 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_format_forbids_is_refused(case, tmp_path):
    data, reason = BAD[case]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    one_line(caught, f"{tmp_path / 'x'}: ", reason)


def test_a_header_over_the_formats_limit_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 33)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x")
    one_line(caught, "header of 100,000,001 bytes")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_a_shard_that_is_no_file_is_refused_without_waiting(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    one_line(caught, str(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds a list"),
        ("3", "must hold a JSON object"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "no weight map"),
        ('{"weight_map": []}', "no weight map"),
        ('{"weight_map": {}}', "no weight map"),
        ('{"weight_map": "x"}', "no weight map"),
        ('{"weight_map": {"a": 3}}', "names 3, which is not a file beside it"),
        ('{"weight_map": {"a": ["x"]}}', "names a list, which is not"),
        ('{"weight_map": {"a": null}}', "names None, which is not"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a file beside it"),
        ('{"weight_map": {"a": ".."}}', "not a file beside it"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "not a file beside it"),
        ('{"weight_map": {"a": "x.safetensors"}}', "missing although"),
        ('{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}', "the key 'weight_map' is there twice"),
    ],
)
def test_an_index_that_is_none_is_refused(text, reason, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    one_line(caught, reason)


def test_a_pipe_for_an_index_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    one_line(caught, INDEX, "is no plain file")


def test_a_shard_may_be_a_link(tmp_path):
    """As in the cache of the Hugging Face hub."""
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "blobs/1")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs/1")
    assert list(SafetensorsFolder(tmp_path).tensors) == ["a"]
    shutil.rmtree(tmp_path / "blobs")


def test_names_without_end_stay_one_short_line(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(with_header({"n\n" * 5000: entry(0, 16, [-1])}, 16))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    one_line(caught, "no shape of integers")
