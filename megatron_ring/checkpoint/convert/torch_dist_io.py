"""Megatron's torch_dist folders (PyTorch distributed checkpoints) without a process group.

A folder holds ``*.distcp`` files, each a row of small ``torch.save`` archives, one per chunk of a tensor, and
``.metadata``, a pickle of where each chunk lies. An archive is a zip that stores its bytes as they are, so a
box of a chunk is read in place, however large the chunk is.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ring.checkpoint.convert.files import MappedFile, SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.errors import CheckpointError

EXTRA_STATE = "._extra_state/shard_0_1"
"""What follows a linear layer's key where Megatron keeps an object beside its weight."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
_LOADABLE: dict[str, Any] = {
    **{
        f"{dcp.__name__}.{n}": v for n, v in vars(dcp).items() if getattr(v, "__module__", "") == dcp.__name__
    },
    **{
        f"{planner.__name__}.{n}": getattr(planner, n)
        for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    f"{filesystem.__name__}._StorageInfo": filesystem._StorageInfo,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch.Size": torch.Size,
    "collections.OrderedDict": dict,
    "pathlib.PosixPath": PurePosixPath,
    **{f"torch.{n}": getattr(torch, n) for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)},
}
"""All that a checkpoint's pickles may name. Nothing in it runs code of the pickle's choice."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _LOADABLE:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _LOADABLE[f"{module}.{name}"]


class _Archive(pickle.Unpickler):
    """The pickle of a saved tensor, read as (dtype, storage offset, shape, strides) instead of a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, shape, stride, *_: (dtype, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return {
            "BFloat16Storage": torch.bfloat16,
            "HalfStorage": torch.float16,
            "FloatStorage": torch.float32,
            "DoubleStorage": torch.float64,
        }[pid[1]]


@dataclass(frozen=True, slots=True)
class _Chunk:
    box: Box
    file: str
    offset: int
    length: int


class TorchDistFolder:
    """A checkpoint folder's tensors and where their chunks lie. Objects beside them are counted, never read.

    Raises:
        CheckpointError: ``.metadata`` is missing, unsafe or damaged, or files are missing or too short.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._maps: dict[str, MappedFile] = {}
        self._starts: dict[tuple[str, int], int] = {}
        metadata = _read_metadata(folder)
        self.objects = [
            k for k, v in metadata.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)
        ]
        places = {(i.fqn, i.offset and tuple(i.offset)): info for i, info in metadata.storage_data.items()}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self.tensors[key] = TensorInfo(entry.properties.dtype, tuple(entry.size))
            self._chunks[key] = []
            for chunk in entry.chunks:
                info = places.get((key, tuple(chunk.offsets)))
                if info is None:
                    raise CheckpointError(
                        f"{folder}: chunk {tuple(chunk.offsets)} of {key} is nowhere; save it again"
                    )
                box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
                self._chunks[key].append(_Chunk(box, info.relative_path, info.offset, info.length))
        # objects are not read, but a file that ends in the middle of one is damaged
        self._check_files(metadata.storage_data.values())

    def files(self) -> list[Path]:
        return [
            self.folder / name
            for name in sorted({c.file for chunks in self._chunks.values() for c in chunks})
        ]

    def release(self) -> None:
        # other threads may open a file meanwhile
        for mapped in tuple(self._maps.values()):
            mapped.release()

    def views(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        found = 0
        for chunk in self._chunks[name]:
            part = chunk.box.intersect(box)
            if part is not None:
                found += part.size
                info = TensorInfo(self.tensors[name].dtype, chunk.box.shape)
                mapped, start = self._locate(name, chunk, info)
                yield part, mapped.tensor(start, info, part.relative_to(chunk.box))
        if found != box.size:
            raise CheckpointError(f"{self.folder}: {name} has no chunk for some of {box}; save it again")

    def _check_files(self, places: Iterable[Any]) -> None:
        needed: dict[str, int] = {}
        for place in places:
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        for name, size in sorted(needed.items()):
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(
                    f"{path}: missing although .metadata names it; copy the whole checkpoint"
                )
            if path.stat().st_size < size:
                raise CheckpointError(
                    f"{path}: has {path.stat().st_size} bytes but .metadata describes {size}: truncated; copy it again"
                )

    def _locate(self, name: str, chunk: _Chunk, wanted: TensorInfo) -> tuple[MappedFile, int]:
        """The file that holds ``chunk`` and the byte where its numbers start."""
        if chunk.file not in self._maps:
            self._maps[chunk.file] = MappedFile(self.folder / chunk.file)
        mapped, place = self._maps[chunk.file], (chunk.file, chunk.offset)
        if place in self._starts:
            return mapped, self._starts[place]
        origin = f"{self.folder / chunk.file}: the chunk of {name} at byte {chunk.offset}"
        try:
            start, info, stride = _locate(_Slice(mapped.map, chunk.offset, chunk.length))
        except (
            zipfile.BadZipFile,
            pickle.UnpicklingError,
            StopIteration,
            KeyError,
            ValueError,
            EOFError,
        ) as error:
            raise CheckpointError(f"{origin} cannot be read ({error}); copy it again") from None
        # a dimension of size 1 may have any stride
        packed = torch.empty(wanted.shape, device="meta").stride()
        if info != wanted or any(
            s != p for s, p, n in zip(stride, packed, wanted.shape, strict=True) if n > 1
        ):
            raise CheckpointError(
                f"{origin} is {info}, strides {stride}, not a packed {wanted}; save it again"
            )
        self._starts[place] = chunk.offset + start
        return mapped, chunk.offset + start


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _Restricted(file).load()
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise ValueError("it holds no checkpoint metadata")
        return metadata
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; name a torch_dist checkpoint folder") from None
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read safely ({error}); name a checkpoint that Megatron wrote"
        ) from None


class _Slice(io.RawIOBase):
    """Part of a mapped file as a file of its own, for zipfile."""

    def __init__(self, data: Any, start: int, length: int):
        self._data, self._start, self._length, self._at = data, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        start = self._start + self._at
        self._at += size
        return self._data[start : start + size]


def _locate(file: _Slice) -> tuple[int, TensorInfo, tuple[int, ...]]:
    """(byte where the numbers start, description, strides) of the one tensor in a ``torch.save`` archive."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.split("/", 1)[1]: entry for entry in archive.infolist()}
    pickled, data = entries["data.pkl"], entries["data/0"]
    if pickled.compress_type or data.compress_type:
        raise ValueError("it is compressed")
    # not read through zipfile: torch can leave the checksums out, and zipfile insists on them
    file.seek(_start(file, pickled))
    dtype, offset, shape, stride = _Archive(io.BytesIO(file.read(pickled.file_size))).load()
    info = TensorInfo(dtype, shape)
    if offset * dtype.itemsize + info.num_bytes > data.file_size:
        raise ValueError("its storage is too short")
    return _start(file, data) + offset * dtype.itemsize, info, stride


def _start(file: _Slice, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: its local header has a name and an extra field of lengths of their
    own.
    """
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    return (
        entry.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


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
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    # torch.save hides what a disk says; in memory it is a few hundred bytes
    data = io.BytesIO()
    torch.save(common, data)
    (folder / "common.pt").write_bytes(data.getvalue())
