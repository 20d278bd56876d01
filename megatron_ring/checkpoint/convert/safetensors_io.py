"""Hugging Face folders: safetensors files read through the page cache and written front to back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.files import MappedFile, SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_IGNORED = ".rotary_emb.inv_freq"
"""A buffer that old exports carry; it follows from the config."""


class SafetensorsFolder:
    """The safetensors files of a model folder, opened and checked: sizes, overlaps, index.

    Raises:
        CheckpointError: no weights, a file that the index names is missing, truncated or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._maps: dict[Path, MappedFile] = {}
        self._files = _weight_files(folder)
        for path in self._files:
            for name, info, offset in _read_header(path):
                if name.endswith(_IGNORED):
                    continue
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: holds {name}, which {self._places[name][0].name} holds too; remove one of the files"
                    )
                self.tensors[name] = info
                self._places[name] = (path, offset)

    def files(self) -> list[Path]:
        return self._files

    def release(self) -> None:
        # other threads may open a file meanwhile
        for mapped in tuple(self._maps.values()):
            mapped.release()

    def views(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        path, offset = self._places[name]
        if path not in self._maps:
            self._maps[path] = MappedFile(path)
        yield box, self._maps[path].tensor(offset, self.tensors[name], box)


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a Hugging Face model folder")
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: holds no *.safetensors; download or export the weights in that format"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: no weight map ({error!r}); download it again") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index}: names {name!r}, which is not a file beside it; download it again"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing although {INDEX} names it; download that shard")
    return [folder / name for name in names]


def _read_header(path: Path) -> Iterator[tuple[str, TensorInfo, int]]:
    """(name, description, byte offset in the file) of every tensor, after checking them against the file's
    size.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES or 8 + length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries: list[tuple[str, str, tuple[int, ...], int, int]] = [
            (name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: no safetensors file ({error}); download that shard again") from None
    end = max((entry[4] for entry in entries), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: has {size} bytes but its header describes {8 + length + end}: truncated or damaged; "
            "download that shard again"
        )
    for name, dtype, shape, start, stop in entries:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {dtype}; convertible are {', '.join(_DTYPES)}: dequantize the model first"
            )
        info = TensorInfo(_DTYPES[dtype], shape)
        if stop - start != info.num_bytes or start < 0:
            raise CheckpointError(
                f"{path}: {name} has {stop - start} bytes, not {info.num_bytes}; download it again"
            )
        yield name, info, 8 + length + start


class SafetensorsWriter:
    """One safetensors file whose tensors, given beforehand, arrive in order, each from its first row to its
    last.
    """

    def __init__(self, sink: SummedFile, tensors: dict[str, TensorInfo]):
        self._sink = sink
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, info in tensors.items():
            stop = start + info.num_bytes
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        # readers map tensors in place, so their bytes begin at a multiple of 8
        text += b" " * (-len(text) % 8)
        sink.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, box: Box, rows: Tensor) -> list[int]:
        """Append rows. Returns an empty list: the header has said where they lie."""
        self._sink.write(rows.contiguous().view(-1).view(torch.uint8).numpy())
        return []


def write_index(folder: Path, files: dict[str, list[str]], total_bytes: int) -> None:
    """``model.safetensors.index.json`` of a folder whose ``files`` hold the tensors named."""
    weight_map = {name: file for file, names in sorted(files.items()) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
