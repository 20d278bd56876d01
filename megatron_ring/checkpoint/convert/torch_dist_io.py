"""Megatron's torch_dist folders (PyTorch distributed checkpoints) without a process group.

A folder holds ``*.distcp`` files, each a row of small ``torch.save`` archives, one per chunk of a tensor, and
``.metadata``, a pickle that says where each chunk is. An archive is a zip that stores its bytes as they are, so
a box of a chunk is read in place, however large the chunk is.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ring.checkpoint.convert.archive import Window, locate
from megatron_ring.checkpoint.convert.files import MappedFile, SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.format import FORMAT
from megatron_ring.checkpoint.index import CheckpointIndex, IndexedChunk, read_index
from megatron_ring.errors import CheckpointError

EXTRA_STATE = "._extra_state/shard_0_1"
"""Suffix of the key under which Megatron keeps an object beside a linear layer's weight."""


class TorchDistFolder:
    """A checkpoint folder's tensors and where their chunks lie. Objects beside them are counted, never read.

    Raises:
        CheckpointError: ``.metadata`` is missing, unsafe or damaged, or files are missing or too short.
    """

    def __init__(self, folder: Path, index: CheckpointIndex | None = None):
        self.folder = folder
        self.index = index or read_index(folder)
        self.objects = self.index.objects
        self.tensors = {
            key: TensorInfo(getattr(torch, tensor.dtype), tensor.shape)
            for key, tensor in self.index.tensors.items()
        }
        self._maps: dict[str, MappedFile] = {}
        self._starts: dict[tuple[str, int], int] = {}

    def files(self) -> list[Path]:
        names = {chunk.file for tensor in self.index.tensors.values() for chunk in tensor.chunks}
        return [self.folder / name for name in sorted(names)]

    def release(self) -> None:
        # other threads may open a file meanwhile
        for mapped in tuple(self._maps.values()):
            mapped.release()

    def views(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        found = 0
        for chunk in self.index.tensors[name].chunks:
            whole = Box(chunk.offset, chunk.shape)
            part = whole.intersect(box)
            if part is not None:
                found += part.size
                yield part, self.view(name, chunk, part.relative_to(whole))
        if found != box.size:
            raise CheckpointError(f"{self.folder}: {name} has no chunk for some of {box}; save it again")

    def view(self, name: str, chunk: IndexedChunk, box: Box, *, at_once: bool = False) -> Tensor:
        """``box`` of one chunk of ``name``, counted from the chunk's own corner; read-only.

        ``at_once``: most of the chunk's bytes will be read soon.
        """
        info = TensorInfo(self.tensors[name].dtype, chunk.shape)
        mapped, start = self._locate(name, chunk, info)
        if at_once and info.num_bytes:
            mapped.will_need(start, info.num_bytes)
        return mapped.tensor(start, info, box)

    def _locate(self, name: str, chunk: IndexedChunk, wanted: TensorInfo) -> tuple[MappedFile, int]:
        """The file that holds ``chunk`` and the byte where its numbers start."""
        if chunk.file not in self._maps:
            self._maps[chunk.file] = MappedFile(self.folder / chunk.file)
        mapped, place = self._maps[chunk.file], (chunk.file, chunk.start)
        if place in self._starts:
            return mapped, self._starts[place]
        origin = f"{self.folder / chunk.file}: the chunk of {name} at byte {chunk.start}"
        try:
            start, info, stride = locate(Window(mapped.map, chunk.start, chunk.length))
        except Exception as error:  # zipfile raises a dozen kinds for bytes that are no archive
            raise CheckpointError(f"{origin} cannot be read ({error}); copy it again") from None
        # a dimension of size 1 may have any stride
        packed = torch.empty(wanted.shape, device="meta").stride()
        if info != wanted or any(
            s != p for s, p, n in zip(stride, packed, wanted.shape, strict=True) if n > 1
        ):
            raise CheckpointError(
                f"{origin} is {info}, strides {stride}, not a packed {wanted}; save it again"
            )
        self._starts[place] = chunk.start + start
        return mapped, chunk.start + start


class TorchDistWriter:
    """One ``.distcp`` file; returns each chunk's place for :func:`write_metadata`."""

    def __init__(self, sink: SummedFile, tensors: dict[str, TensorInfo]):
        self._sink = sink

    def write(self, name: str, box: Box, rows: Tensor) -> list[int]:
        """Append a chunk; (byte offset, length)."""
        return self._append(rows.reshape(box.shape))

    def write_empty_object(self) -> list[int]:
        """Append what Megatron's own linear layers keep as their extra state."""
        return self._append([None])

    def _append(self, value: object) -> list[int]:
        start = self._sink.num_bytes
        computes = torch.serialization.get_crc32_options()
        # the file has a checksum as a whole
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, cast("IO[bytes]", self._sink))
        except RuntimeError as error:
            raise self._sink.failure or error from None
        finally:
            torch.serialization.set_crc32_options(computes)
        return [start, self._sink.num_bytes - start]


def write_metadata(
    folder: Path,
    tensors: dict[str, TensorInfo],
    places: Iterable[tuple[str, str, Box | None, int, int]],
    common: dict[str, Any],
) -> None:
    """Write what makes ``*.distcp`` files a checkpoint: ``.metadata``, ``metadata.json`` and ``common.pt``.

    ``places``: (file, key, box, byte offset, length) of every chunk; box ``None`` is an object.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    objects: dict[str, BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, filesystem._StorageInfo] = {}
    for file, key, box, offset, length in places:
        if box is None:
            objects[key] = BytesStorageMetadata()
            index = MetadataIndex(key)
        else:
            index = MetadataIndex(key, torch.Size(box.offset), len(chunks[key]))
            chunks[key].append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
        storage[index] = filesystem._StorageInfo(file, offset, length)
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks[key])
        for key, info in tensors.items()
    }
    metadata = Metadata({**entries, **objects}, storage_data=storage, storage_meta=StorageMeta())
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    (folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    # torch.save hides errors of the disk; serialised in memory it is a few hundred bytes
    data = io.BytesIO()
    torch.save(common, data)
    (folder / "common.pt").write_bytes(data.getvalue())
