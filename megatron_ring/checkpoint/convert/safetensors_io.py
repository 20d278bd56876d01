"""Hugging Face folders: safetensors files read through the page cache and written front to back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.files import MappedFile, SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.safetensors_header import DTYPES, read_header
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.plain_files import is_file_name, read_json, shown
from megatron_ring.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IGNORED = ".rotary_emb.inv_freq"
"""A buffer that old exports contain; it follows from the config."""


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
            for name, info, offset in read_header(path):
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
    weight_map = read_json(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight map; download it again")
    for name in weight_map.values():
        if not is_file_name(name):
            raise CheckpointError(
                f"{index}: names {shown(name)}, which is not a file beside it; download it again"
            )
    names = sorted(set(weight_map.values()))
    if SINGLE not in names and (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder}: holds {SINGLE} and, in {INDEX}, shards without it, of which engines read one or the other; "
            "remove the one that is not the model"
        )
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing although {INDEX} names it; download that shard")
    return [folder / name for name in names]


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
        """Append rows. Returns an empty list: the header already has their offsets."""
        self._sink.write(rows.contiguous().view(-1).view(torch.uint8).numpy())
        return []


def write_index(folder: Path, files: dict[str, list[str]], total_bytes: int) -> None:
    """``model.safetensors.index.json`` of a folder whose ``files`` hold the tensors named."""
    weight_map = {name: file for file, names in sorted(files.items()) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
