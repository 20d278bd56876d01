"""One tensor's ``torch.save`` archive inside a larger file: where its numbers are, without loading it.

An archive is a zip that stores its bytes as they are. Its pickle is read by our own reader
(:mod:`megatron_ring.checkpoint.pickles`); torch's never sees it.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch

from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.pickles import Built, Name, PickleError, Stored, read_pickle
from megatron_ring.checkpoint.plain_files import is_count

_MAX_READ_BYTES = 1 << 20
"""The directory and the pickle of a single tensor are a few hundred bytes each."""
_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
_NEW_DTYPES = ("float8_e4m3fn", "float8_e5m2")
"""Dtypes that are newer than typed storages: saved as untyped bytes with the dtype beside them."""
_ALLOWED = {
    "torch._utils": "_rebuild_tensor_v2 _rebuild_tensor_v3",
    "torch": f"{' '.join(_STORAGES)} {' '.join(_NEW_DTYPES)}",
    "torch.storage": "UntypedStorage",
    "collections": "OrderedDict",
}


class Window(io.RawIOBase):
    """Part of a mapped file, presented to zipfile as a file. Refuses reads that no archive of a tensor
    needs."""

    def __init__(self, data: Any, start: int, length: int):
        self._data, self._start, self.length, self._at = data, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_READ_BYTES:
            raise ValueError("its directory is too large for one tensor")
        start = self._start + self._at
        self._at += size
        return self._data[start : start + size]


def locate(file: Window) -> tuple[int, TensorInfo, tuple[int, ...]]:
    """(byte where the numbers start, description, strides) of the one tensor in an archive.

    Raises:
        ValueError: it holds something else, or is damaged. So do zipfile's own errors.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "data.pkl" not in entries or "data/0" not in entries:
        raise ValueError("it holds no tensor")
    pickled, data = entries["data.pkl"], entries["data/0"]
    if pickled.compress_type or data.compress_type:
        raise ValueError("it is compressed")
    # not read through zipfile: torch can leave the checksums out, and zipfile insists on them
    file.seek(_start(file, pickled))
    dtype, offset, shape, stride = _tensor(
        read_pickle(file.read(pickled.file_size), _ALLOWED, stored=True, max_opcodes=10_000)
    )
    info, start = TensorInfo(dtype, shape), _start(file, data)
    if offset * dtype.itemsize + info.num_bytes > data.file_size or start + data.file_size > file.length:
        raise ValueError("its storage is too short")
    return start + offset * dtype.itemsize, info, stride


def _start(file: Window, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: the local header's name and extra field may differ in length from the
    directory's.
    """
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    return (
        entry.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


def _tensor(value: Any) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """What ``_rebuild_tensor_v2`` (storage, offset, shape, strides, ...) would have made."""
    if not isinstance(value, Built) or value.of.module != "torch._utils" or len(value.args) < 4:
        raise PickleError("it is no tensor")
    storage, offset, shape, stride = value.args[:4]
    whole = (
        is_count(offset)
        and type(shape) is tuple
        and type(stride) is tuple
        and all(map(is_count, (*shape, *stride)))
    )
    if not whole or len(shape) != len(stride):
        raise PickleError("it has no valid shape")
    return _dtype(storage, value), offset, shape, stride


def _dtype(storage: Any, call: Built) -> torch.dtype:
    key = storage.key if isinstance(storage, Stored) else None
    kind = key[1] if type(key) is tuple and len(key) == 5 and key[0] == "storage" and key[2] == "0" else None
    if isinstance(kind, Name) and kind.name in _STORAGES and call.of.name == "_rebuild_tensor_v2":
        return _STORAGES[kind.name]
    new = call.args[6] if call.of.name == "_rebuild_tensor_v3" and len(call.args) > 6 else None
    if isinstance(kind, Name) and isinstance(new, Name) and new.name in _NEW_DTYPES:
        return getattr(torch, new.name)
    raise PickleError("it has no valid storage")
