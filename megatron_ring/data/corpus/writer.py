"""Write Megatron's indexed datasets: the same bytes as Megatron's builder, without importing Megatron.

That import takes seconds and needs torch, and Megatron's builder keeps a Python list of all documents.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ring.data.corpus.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, manifest_path
from megatron_ring.data.files import written_whole


class CorpusWriter:
    """Writes documents; opened by :func:`write_corpus`. Memory: 4 bytes per document.

    Example: ``writer.add(np.array([5, 6, 1]))`` appends one document of three tokens.
    """

    def __init__(self, stream: BinaryIO, dtype: np.dtype) -> None:
        self._stream = stream
        self._dtype = dtype
        self._lengths = array("i")
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, token_ids: np.ndarray) -> None:
        """Append one document of at least one token.

        Raises:
            ValueError: a token id does not fit the dtype, or the document is empty.
        """
        if not len(token_ids) or token_ids.min() < 0 or token_ids.max() > np.iinfo(self._dtype).max:
            raise ValueError(f"a document must hold token ids of type {self._dtype.name}")
        self._stream.write(token_ids.astype(self._dtype).tobytes())
        self._lengths.append(len(token_ids))
        self.num_tokens += len(token_ids)

    def write_index(self, path: Path) -> None:
        """Write the .idx: each document is one sequence."""
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.zeros(self.num_documents + 1, dtype="<i8")
        np.cumsum(lengths, out=ends[1:])
        with path.open("wb") as stream:
            code = DTYPE_CODES[self._dtype]
            stream.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
            stream.write(lengths.tobytes())
            stream.write((ends[:-1] * self._dtype.itemsize).tobytes())
            stream.write(np.arange(self.num_documents + 1, dtype="<i8").tobytes())


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype in which Megatron writes token ids of this vocabulary."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


@contextmanager
def write_corpus(prefix: str | Path, *, vocab_size: int, manifest: dict[str, Any]) -> Iterator[CorpusWriter]:
    """Write ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.meta.json``: all of them, or none.

    Args:
        prefix: path without extension; older files of that name are replaced.
        vocab_size: of the tokenizer; it decides between 2 and 4 bytes per token.
        manifest: content of PREFIX.meta.json; the totals are added.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    # the .idx last: readers refuse a corpus without it
    finals = (f"{prefix}.bin", manifest_path(prefix), f"{prefix}.idx")
    with written_whole(*finals) as (bin_path, note_path, idx_path):
        with bin_path.open("wb") as stream:
            writer = CorpusWriter(stream, token_dtype(vocab_size))
            yield writer
        writer.write_index(idx_path)
        totals = {"num_documents": writer.num_documents, "num_tokens": writer.num_tokens}
        note_path.write_text(json.dumps(manifest | totals, indent=1) + "\n", encoding="utf-8")
