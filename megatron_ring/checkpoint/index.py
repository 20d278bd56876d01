"""``.metadata`` of a torch_dist checkpoint: which tensors it has, and in which file and at which byte their chunks are.

This is the project's only reader of that pickle. It reads plain values (:mod:`megatron_ring.checkpoint.pickles`), takes the
expected ones and checks every number. Torch and Megatron get what :mod:`megatron_ring.checkpoint.megatron_io` makes of the
result, never the file. Nothing here needs torch.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.pickles import Built, Name, Pairs, PickleError, no_collection, read_pickle
from megatron_ring.checkpoint.plain_files import is_count, is_file_name, shown
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import read_plain

_Place = tuple[str, tuple[int, ...] | None]
METADATA = ".metadata"
MAX_BYTES = 1 << 28
"""The largest models need some tens of megabytes."""
_MAX_DIMENSIONS = 64
_PRIME = (1 << 127) - 1
_BASES = [2 + secrets.randbelow(_PRIME - 3) for _ in range(_MAX_DIMENSIONS)]
_DCP = "torch.distributed.checkpoint"
_ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}
"""Bytes per element, by torch's name of the dtype."""
_ALLOWED = {
    "torch": f"Size device {' '.join(_ITEM_BYTES)}",
    "torch.serialization": "_get_layout",
    f"{_DCP}.metadata": (
        "Metadata TensorStorageMetadata ChunkStorageMetadata BytesStorageMetadata TensorProperties MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "collections": "OrderedDict",
    "pathlib": "Path PosixPath",
    "builtins": "set frozenset",
}
"""All names that ``.metadata`` may contain. None is imported or called; any other name is refused as unsafe."""
_ENUMS = (f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_DCP}.planner.WriteItemType")


@dataclass(frozen=True, slots=True)
class IndexedChunk:
    """Part of a tensor and where its bytes are: one archive of ``torch.save`` inside a file.

    Example: ``IndexedChunk((0, 0), (128, 64), "__0_0.distcp", 4096, 33792)``.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class IndexedTensor:
    """Example: ``IndexedTensor("float32", (256, 64), (IndexedChunk(...), IndexedChunk(...)))``."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[IndexedChunk, ...]


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """The contents of ``.metadata``. ``objects`` are keys of pickled objects beside the tensors, which are never read;
    ``files`` has the minimum length of each file in bytes.

    Example: ``CheckpointIndex({"output_layer.weight": IndexedTensor(...)}, ("decoder..._extra_state/shard_0_1",),
    {"__0_0.distcp": 81920})``.
    """

    tensors: dict[str, IndexedTensor]
    objects: tuple[str, ...]
    files: dict[str, int]


def read_index(folder: Path, remedy: str = "load a complete checkpoint folder") -> CheckpointIndex:
    """Read the index of ``folder``, and check that its files exist and are long enough.

    Raises:
        CheckpointError: ``.metadata`` is missing, unsafe or damaged, or a file is missing or too short.
    """
    path = folder / METADATA
    try:
        with no_collection():
            index = _checked(read_pickle(read_plain(path, MAX_BYTES), _ALLOWED, enums=_ENUMS))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {remedy}") from None
    except PickleError as error:
        raise CheckpointError(
            f"{path}: cannot be read safely ({error}); load a checkpoint that Megatron wrote"
        ) from None
    for name, size in sorted(index.files.items()):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing although {METADATA} names it; copy the whole checkpoint")
        if file.stat().st_size < size:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size:,} of at least {size:,} bytes: truncated; copy it again or load "
                "another checkpoint"
            )
    return index


def _checked(value: Any) -> CheckpointIndex:
    fields = _fields(value, "Metadata", "MCoreMetadata")
    places, files = _places(fields.get("storage_data"))
    tensors: dict[str, IndexedTensor] = {}
    objects: dict[str, None] = {}
    for key, entry in _pairs(fields.get("state_dict_metadata")):
        if not isinstance(key, str):
            raise PickleError(f"a key is {shown(key)}, not a string")
        if key in tensors or key in objects:
            raise PickleError(f"{shown(key)} is there twice")
        if _is(entry, "BytesStorageMetadata"):
            objects[key] = None
        else:
            tensors[key] = _tensor(key, entry, places)
    return CheckpointIndex(tensors, tuple(objects), files)


def _places(value: Any) -> tuple[dict[_Place, tuple[str, int, int]], dict[str, int]]:
    """(key, offset) -> (file, first byte, bytes), and the bytes that each file needs."""
    places: dict[_Place, tuple[str, int, int]] = {}
    files: dict[str, int] = {}
    for key, entry in _pairs(value):
        where, info = _fields(key, "MetadataIndex"), _fields(entry, "_StorageInfo")
        name, offset = where.get("fqn"), where.get("offset")
        if not isinstance(name, str):
            raise PickleError(f"a place has {shown(name)} for a key")
        at = (name, None if offset is None else _sizes(offset, name))
        if at in places:
            raise PickleError(f"{shown(name)} has two places for one chunk")
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not is_file_name(file):
            raise PickleError(f"{shown(name)} lies in {shown(file)}, which is no file of the folder")
        if not is_count(start) or not is_count(length):
            raise PickleError(f"{shown(name)} lies at no place of {shown(file)}")
        if info.get("transform_descriptors") is not None:
            raise PickleError(f"{shown(name)} was transformed when it was written")
        places[at] = (file, start, length)
        files[file] = max(files.get(file, 0), start + length)
    return places, files


def _tensor(key: str, entry: Any, places: dict[_Place, tuple[str, int, int]]) -> IndexedTensor:
    fields = _fields(entry, "TensorStorageMetadata")
    shape, dtype, parts = (
        _sizes(fields.get("size"), key),
        _dtype(fields.get("properties"), key),
        fields.get("chunks"),
    )
    if type(parts) is not list:
        raise PickleError(f"{shown(key)} has no list of chunks")
    chunks: list[IndexedChunk] = []
    for part in parts:
        values = _fields(part, "ChunkStorageMetadata")
        offset, sizes = _sizes(values.get("offsets"), key), _sizes(values.get("sizes"), key)
        if not len(offset) == len(sizes) == len(shape) or any(
            o + s > n for o, s, n in zip(offset, sizes, shape, strict=True)
        ):
            raise PickleError(f"a chunk of {shown(key)} lies outside it")
        place = places.get((key, offset))
        if place is None:
            raise PickleError(f"chunk {list(offset)} of {shown(key)} is nowhere")
        if math.prod(sizes) * _ITEM_BYTES[dtype] > place[2]:
            raise PickleError(f"chunk {list(offset)} of {shown(key)} has too few bytes for its shape")
        chunks.append(IndexedChunk(offset, sizes, *place))
    if not _covers([(chunk.offset, chunk.shape) for chunk in chunks], shape):
        raise PickleError(f"the chunks of {shown(key)} are not the whole of it")
    return IndexedTensor(dtype, shape, tuple(chunks))


def _covers(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Is every element of ``shape`` in exactly one of ``boxes``, which are inside of it?

    Counting elements is not enough: some may be in two boxes and as many in none. So the element (i, j, ...) gets the
    weight a^i b^j ... modulo a prime, with secret a, b, ...: if the sums of weights are equal, every element is covered
    once (except with a probability below 2^-50). The sum over a box is a product of geometric series, so its cost does
    not depend on the box's size.
    """
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    if len(boxes) < 2:
        return True
    power = lru_cache(maxsize=None)(lambda axis, i: pow(_BASES[axis], i, _PRIME))

    def weight(offset: tuple[int, ...], sizes: tuple[int, ...]) -> int:
        total = 1
        for axis, (start, size) in enumerate(zip(offset, sizes, strict=True)):
            total = total * (power(axis, start + size) - power(axis, start)) % _PRIME
        return total

    return sum(weight(*box) for box in boxes) % _PRIME == weight((0,) * len(shape), shape)


def _dtype(properties: Any, key: str) -> str:
    state = properties.state if _is(properties, "TensorProperties") else None
    name = state[0] if type(state) is tuple and state else _state(state).get("dtype")
    if not isinstance(name, Name) or name.module != "torch" or name.name not in _ITEM_BYTES:
        raise PickleError(f"{shown(key)} has no dtype that is known")
    return name.name


def _sizes(value: Any, key: str) -> tuple[int, ...]:
    """The sizes in a ``torch.Size``, a tuple or a list."""
    called = isinstance(value, Built) and str(value.of) == "torch.Size" and len(value.args) == 1
    sizes: Any = value.args[0] if called else value
    if type(sizes) not in (tuple, list) or len(sizes) > _MAX_DIMENSIONS or not all(map(is_count, sizes)):
        raise PickleError(f"{shown(key)} has a size that is none")
    return tuple(sizes)


def _is(value: Any, *names: str) -> bool:
    """Is it an object of a class of torch or Megatron with one of these names?"""
    return (
        isinstance(value, Built)
        and value.of.name in names
        and value.of.module.startswith((_DCP, "megatron.core."))
        and not value.args
    )


def _fields(value: Any, *names: str) -> dict[str, Any]:
    if not _is(value, *names):
        raise PickleError(f"it holds no {names[0]} where one belongs")
    return _state(value.state)


def _state(value: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, item in _pairs(value):
        if not isinstance(name, str) or name in state:
            raise PickleError("an object's fields have no names, or one twice")
        state[name] = item
    return state


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        raise PickleError("it lacks a dict where one belongs")
    return value.pairs
