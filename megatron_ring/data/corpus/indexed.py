"""Reader of Megatron's indexed datasets: tokens in PREFIX.bin, lengths and document ends in PREFIX.idx.

Megatron's own reader trusts the files: with a truncated .idx it reads wrong documents, with a wrong .bin wrong tokens.
Here the two files are checked against each other before the first token is used; then both are memory-mapped.

Layout of the .idx, little-endian: magic (9 bytes), version (uint64, 1), dtype code (uint8), number of
sequences S (uint64), number of document ends D+1 (uint64), lengths (int32[S], tokens), pointers (int64[S],
bytes), document ends (int64[D+1], in sequences, from 0).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ring.data.json_text import parse_json
from megatron_ring.errors import DataError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
DTYPE_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
"""Megatron's code for each token dtype."""
_REMEDY = "write it again with tools/preprocess_data.py, or copy both files again"


@dataclass(frozen=True, kw_only=True)
class IndexedCorpus:
    """The documents of one .bin/.idx pair, memory-mapped.

    Example: two documents of 3 and 2 tokens: ``tokens = [5, 6, 1, 7, 1]``, ``offsets = [0, 3, 5]``.
    """

    prefix: str
    """Path without .bin or .idx."""
    tokens: np.ndarray
    """All tokens, document after document; read-only."""
    offsets: np.ndarray
    """``int64[num_documents + 1]``: document d is ``tokens[offsets[d]:offsets[d + 1]]``."""
    manifest: dict[str, Any]
    """The preprocessing tool's notes (PREFIX.meta.json); empty for files from other tools."""

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])


def manifest_path(prefix: str | Path) -> Path:
    """The file beside .bin and .idx that names the tokenizer of a corpus."""
    return Path(f"{prefix}.meta.json")


def open_indexed(prefix: str | Path) -> IndexedCorpus:
    """Map ``PREFIX.bin`` and ``PREFIX.idx``, after checking them against each other.

    Takes 8 bytes of memory per document; tokens stay on disk until read.

    Raises:
        DataError: a file is missing, has another format, is truncated, or does not match the other one.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            hint = "; give the prefix without the ending" if str(prefix).endswith((".bin", ".idx")) else ""
            raise DataError(
                f"{path} does not exist; data_path={prefix} must be the prefix of a .bin/.idx pair from "
                f"tools/preprocess_data.py{hint}"
            )
    try:
        dtype, offsets = _read_index(idx)
        expected, actual = int(offsets[-1]) * dtype.itemsize, bin_.stat().st_size
        if expected != actual:
            raise DataError(
                f"{bin_} has {actual} bytes, but {idx.name} describes {expected} "
                f"({int(offsets[-1])} tokens of {dtype.itemsize} bytes); {_REMEDY}"
            )
        tokens = np.memmap(bin_, dtype=dtype, mode="r") if expected else np.empty(0, dtype)
    except OSError as error:
        raise DataError(
            f"cannot read {prefix}.bin/.idx: {error.strerror}; check their permissions"
        ) from error
    return IndexedCorpus(prefix=str(prefix), tokens=tokens, offsets=offsets, manifest=_read_manifest(prefix))


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Dtype of the tokens, and the token offset of each document's start and of the end."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index (it must begin with MMIDIDX); {_REMEDY}")
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated in its header ({size} bytes); {_REMEDY}")
    _, version, code, num_sequences, num_ends = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has index version {version}, only version {VERSION} is known; {_REMEDY}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_ends
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but its header describes {expected} ({num_sequences} sequences, "
            f"{num_ends} document ends); {_REMEDY}"
        )
    dtype = np.dtype(_DTYPES.get(code, "V1"))
    if dtype.kind not in "iu":
        what = f"{dtype.name} numbers" if dtype.kind == "f" else f"an unknown type (code {code})"
        raise DataError(f"{path} declares its tokens as {what}; token ids must be integers; {_REMEDY}")

    content = np.memmap(path, dtype=np.uint8, mode="r", offset=0)[HEADER.size :]
    lengths = content[: 4 * num_sequences].view("<i4")
    pointers = content[4 * num_sequences : 12 * num_sequences].view("<i8")
    ends = content[12 * num_sequences :].view("<i8")
    starts = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    if num_sequences and (lengths.min() < 0 or not np.array_equal(pointers, starts[:-1] * dtype.itemsize)):
        raise DataError(f"{path} is damaged: its lengths and byte offsets contradict each other; {_REMEDY}")
    if not num_ends or ends[0] != 0 or ends[-1] != num_sequences or np.any(np.diff(ends) < 0):
        raise DataError(
            f"{path} is damaged: its document ends do not run from 0 to {num_sequences}; {_REMEDY}"
        )
    return dtype, starts[ends]


def _read_manifest(prefix: str | Path) -> dict[str, Any]:
    path = manifest_path(prefix)
    if not path.is_file():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from None
    manifest = parse_json(content, str(path), f"{_REMEDY}, or delete it")
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is a JSON {type(manifest).__name__}, not an object; {_REMEDY}, or delete it")
    return manifest
