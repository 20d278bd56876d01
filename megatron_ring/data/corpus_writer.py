"""Writer of Megatron's indexed datasets, through Megatron's own builder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ring.data.files import written_whole
from megatron_ring.data.indexed import manifest_path


class CorpusWriter:
    """Collects documents; made by :func:`write_corpus`.

    Example: ``writer.add(np.array([5, 6, 1]))`` appends one document of three tokens.
    """

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.num_documents = 0
        self.num_tokens = 0

    def add(self, token_ids: np.ndarray) -> None:
        """Append one document of at least one token."""
        self._builder.add_document(token_ids, [len(token_ids)])
        self.num_documents += 1
        self.num_tokens += len(token_ids)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Narrowest type that Megatron writes token ids of a vocabulary in."""
    return np.uint16 if vocab_size < 65500 else np.int32


@contextmanager
def write_corpus(prefix: str | Path, *, vocab_size: int, manifest: dict[str, Any]) -> Iterator[CorpusWriter]:
    """Write ``PREFIX.bin``, ``PREFIX.idx`` and a note of how they were made; all of them, or none.

    Args:
        prefix: path without ending; older files of that name are replaced.
        vocab_size: of the tokenizer; decides between 2 and 4 bytes per token.
        manifest: what to note; the totals are added.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    with warnings.catch_warnings():
        # megatron.core warns when it finds no Transformer Engine; nothing here would use it
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    # the .idx last: without it a reader says "missing", whatever else is there
    finals = (f"{prefix}.bin", manifest_path(prefix), f"{prefix}.idx")
    with written_whole(*finals) as (bin_path, note_path, idx_path):
        builder = IndexedDatasetBuilder(str(bin_path), dtype=token_dtype(vocab_size))
        writer = CorpusWriter(builder)
        try:
            yield writer
            builder.finalize(str(idx_path))
        finally:
            builder.data_file.close()
        totals = {"num_documents": writer.num_documents, "num_tokens": writer.num_tokens}
        note_path.write_text(json.dumps(manifest | totals, indent=1) + "\n", encoding="utf-8")
