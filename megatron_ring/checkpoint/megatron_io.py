"""Megatron's sharded save and load, with our own safe reader and with checksums computed while files are written.

Megatron would read ``.metadata`` with plain ``pickle``, and ``common.pt`` and every chunk with ``torch.load``. Here it gets
the index of our own reader (:mod:`megatron_ring.checkpoint.index`), and chunks are read in place. Of ``common.pt``, whose
contents are not needed, only the zip directory is checked. So a file that is replaced between a check and its use cannot
run code either.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as upstream
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_ring.checkpoint.checksums import Summed
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.checkpoint.index import CheckpointIndex
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import open_plain


def load_sharded(wanted: dict[str, Any], folder: Path, index: CheckpointIndex) -> dict[str, Any]:
    """``wanted`` with its shards replaced by the tensors of the checkpoint ``folder``. Collective over the world.

    Raises Megatron's own errors if tensors are missing or of another shape; if a file cannot be read, an error of torch
    that contains a CheckpointError.
    """
    loaded: Any = dist_checkpointing.load(
        wanted,
        str(folder),
        sharded_strategy=_LoadTensors(TorchDistFolder(folder, index)),
        common_strategy=_NoCommon(),
    )
    return loaded


def check_common(folder: Path) -> None:
    """Check that ``common.pt`` is complete; nothing in it is used.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / "common.pt"
    try:
        with open_plain(path) as file, zipfile.ZipFile(file):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; load a complete checkpoint folder") from None
    except Exception as error:  # zipfile raises a dozen kinds for bytes that are no archive
        raise CheckpointError(f"{path}: {error}; copy it again or load another checkpoint") from None


class _NoCommon(LoadCommonStrategy):
    """Common state is what is not sharded; our checkpoints have none."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> dict[str, Any]:
        raise CheckpointError(f"{checkpoint_dir}: objects are not read from checkpoints")

    def load_sharded_metadata(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass


class _LoadTensors(upstream.TorchDistLoadShardedStrategy):
    """Upstream's strategy with our reader."""

    def __init__(self, source: TorchDistFolder):
        super().__init__()
        self._source = source

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        # strategies/torch.py:760 (0.16.1) calls a function of its module to make the reader, and takes no other
        reader = mock.patch.object(upstream, "_get_filesystem_reader", lambda *_, **__: _Reader(self._source))
        with reader:
            return super().load(sharded_state_dict, checkpoint_dir)


class _Reader(FileSystemReader):
    """Torch's reader of a folder, but without unpickling: metadata is made from the index, chunks are read in place."""

    def __init__(self, source: TorchDistFolder):
        super().__init__(source.folder)
        self._source = source
        self._chunks = {
            MetadataIndex(key, chunk.offset): chunk
            for key, tensor in source.index.tensors.items()
            for chunk in tensor.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor.dtype)),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks],
            )
            for key, tensor in self._source.index.tensors.items()
        }
        places = {index: _StorageInfo(c.file, c.start, c.length) for index, c in self._chunks.items()}
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise CheckpointError(f"{self.path}: {item.storage_index.fqn} is an object, not a tensor")
            index = item.storage_index
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._source.view(index.fqn, self._chunks[index], box, at_once=True))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class SaveSummed(upstream.TorchDistSaveShardedStrategy):
    """Upstream's strategy, which also computes checksums: after a save, :attr:`sums` has those of all files on rank 0.

    The writing processes compute them and return them together with the chunks' places, so no file is read again.
    """

    def __init__(self, ckpt_format: str) -> None:
        super().__init__(ckpt_format, 1)
        self.sums: dict[str, Summed] = {}

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        finish = writer.finish

        def finish_and_sum(metadata: Metadata, results: list[list[WriteResult]]) -> None:
            self.sums, plain = _take_sums(results)
            finish(metadata, plain)

        writer.transforms = _Summing()
        writer.finish = finish_and_sum
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class _Summing(_StorageWriterTransforms):
    """Torch's hook for written data: the descriptor of each chunk becomes the CRC of its file up to the chunk's end."""

    def __init__(self) -> None:
        super().__init__()
        self._crc32 = 0

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        if raw_stream.tell() == 0:
            self._crc32 = 0
        descriptors: list[str] = []
        return _SummedStream(self, raw_stream, descriptors), descriptors

    def add(self, data: Any) -> str:
        self._crc32 = zlib.crc32(data, self._crc32)
        return f"{self._crc32:08x}"


class _SummedStream(io.RawIOBase):
    """The stream to which one chunk is written."""

    def __init__(self, summing: _Summing, stream: Any, descriptors: list[str]):
        self._summing, self._stream, self._descriptors = summing, stream, descriptors

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._descriptors[:] = [self._summing.add(data)]
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The file stays open for the next chunk."""


def _take_sums(results: list[list[WriteResult]]) -> tuple[dict[str, Summed], list[list[WriteResult]]]:
    """Length and checksum of every file, and the results without our descriptors."""
    sums: dict[str, Summed] = {}
    plain: list[list[WriteResult]] = []
    for of_rank in results:
        plain.append([])
        for result in of_rank:
            place = result.storage_data
            end = place.offset + place.length
            if end > sums.get(place.relative_path, Summed(-1, "")).num_bytes:
                sums[place.relative_path] = Summed(end, place.transform_descriptors[0])
            place = dataclasses.replace(place, transform_descriptors=None)
            plain[-1].append(dataclasses.replace(result, storage_data=place))
    return sums, plain
