"""The header of a safetensors file: read, and checked against the format and the file.

The rules are the format's own (https://huggingface.co/docs/safetensors): each key once, shapes of integers, and
the tensors' bytes one after another from the header's end to the file's, with no overlap and no hole.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.plain_files import is_count, parse_json_object, shown
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import open_plain

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_BYTES = 100_000_000
"""The format's own limit."""
_MAX_DIMENSIONS = 64
_REMEDY = "download that shard again"


def read_header(path: Path) -> list[tuple[str, TensorInfo, int]]:
    """(name, description, byte offset in the file) of every tensor.

    Raises:
        CheckpointError: the file is no safetensors file, damaged, truncated, or of a dtype that is not
        converted.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            if length > MAX_BYTES or 8 + length > size:
                raise ValueError(f"header of {length:,} bytes in a file of {size:,}")
            header = parse_json_object(file.read(length))
        _check_notes(header.pop("__metadata__", {}))
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda e: e[3:])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {_REMEDY}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: no safetensors file ({error}); {_REMEDY}") from None
    return _placed(path, entries, 8 + length, size)


def _placed(
    path: Path, entries: list[tuple[str, str, tuple[int, ...], int, int]], first: int, size: int
) -> list[tuple[str, TensorInfo, int]]:
    """Every tensor with its offset; offsets are checked against dtypes, each other and the file."""
    placed: list[tuple[str, TensorInfo, int]] = []
    end = 0
    for name, dtype, shape, start, stop in entries:
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {shown(name)[1:-1]} has dtype {dtype[:20]}; convertible are {', '.join(DTYPES)}: "
                "dequantize the model first"
            )
        info = TensorInfo(DTYPES[dtype], shape)
        if stop - start != info.num_bytes:
            raise CheckpointError(
                f"{path}: {shown(name)} has {stop - start:,} bytes, not {info.num_bytes:,}; {_REMEDY}"
            )
        if start != end:
            what = (
                "overlaps the tensor before it"
                if start < end
                else f"begins after a hole of {start - end:,} bytes"
            )
            raise CheckpointError(f"{path}: {shown(name)} {what}; {_REMEDY}")
        end = stop
        placed.append((name, info, first + start))
    if first + end != size:
        raise CheckpointError(
            f"{path}: has {size:,} bytes but its header describes {first + end:,}: truncated or damaged; {_REMEDY}"
        )
    return placed


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, dtype, shape, first byte, byte after the last), each checked for its type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{shown(name)} is {shown(entry)}, not an object")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"{shown(name)} has no dtype")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"{shown(name)} has no shape of integers from 0 on")
    if not isinstance(place, list) or len(place) != 2 or not all(map(is_count, place)) or place[0] > place[1]:
        raise ValueError(f"{shown(name)} has no data_offsets [first, last] of integers from 0 on")
    return name, dtype, tuple(shape), place[0], place[1]


def _check_notes(notes: Any) -> None:
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ValueError("its __metadata__ is no object of strings")
