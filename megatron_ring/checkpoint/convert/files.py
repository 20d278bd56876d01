"""What both formats share: a tensor's description, views into files, and a file that counts and checksums what
is written.
"""

from __future__ import annotations

import mmap
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.tensor_map import Box, Shape
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import open_plain


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Example: ``TensorInfo(torch.bfloat16, (126464, 2048))``."""

    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return Box.whole(self.shape).size * self.dtype.itemsize


class Source(Protocol):
    """A checkpoint that is read box by box. Nothing is held in memory but the files' own pages."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        ...

    def views(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Read-only tensors that together hold ``box`` of ``name``, each with its place in the whole
        tensor.
        """
        ...

    def release(self) -> None:
        """Release the memory of what was read; views stay valid."""
        ...


class MappedFile:
    """A file in memory as the kernel pages it in; read-only."""

    def __init__(self, path: Path):
        try:
            self._file = open_plain(path)
            self.map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {getattr(error, 'strerror', None) or error}; copy it again"
            ) from None

    def release(self) -> None:
        """Release its pages; one that is used again is read again.

        Dropping pages early is cheaper than reclaim under memory pressure.
        """
        self.map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def will_need(self, offset: int, num_bytes: int) -> None:
        """Have these bytes read ahead: page by page, network file systems are slow."""
        start = offset - offset % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, start, offset + num_bytes - start)

    def tensor(self, offset: int, info: TensorInfo, box: Box) -> Tensor:
        """``box`` of the tensor whose bytes start at ``offset``, without a copy.

        Where the box is one run of bytes the result's storage is that run and no more: ``torch.save`` writes
        whole storages.
        """
        whole = Box.whole(info.shape)
        if not box.is_run_of(whole):
            return self._run(offset, info.dtype, whole.size).view(info.shape)[box.slices()]
        start = 0
        for place, length in zip(box.offset, info.shape, strict=True):
            start = start * length + place
        return self._run(offset + start * info.dtype.itemsize, info.dtype, box.size).view(box.shape)

    def _run(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        if not count:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            # torch warns that such a tensor must not be written to
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)


class SummedFile:
    """A binary file written front to back; keeps its length and CRC-32, and reports every write."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._on_bytes = on_bytes
        self.num_bytes = 0
        self.crc32 = 0
        self.failure: OSError | None = None
        """The error that ended the last write; torch.save raises its own error instead."""

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self.crc32 = zlib.crc32(view, self.crc32)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.failure = error
            raise
        self.num_bytes += done
        self._on_bytes(done)
        return done

    def flush(self) -> None:
        """torch.save asks for it; nothing is buffered here."""

    def settle(self) -> None:
        """Wait until what was written is on the disk, then drop it from the page cache."""
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, *, durably: bool) -> None:
        """Close, and with ``durably`` only after the bytes are on the disk."""
        if durably:
            self.settle()
        self._file.close()
