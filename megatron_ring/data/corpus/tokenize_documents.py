"""Tokenise documents in one process or several; results come in the order of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.corpus.documents import Record, record_text
from megatron_ring.data.corpus.writer import token_dtype
from megatron_ring.data.processes import map_in_processes, open_tokenizer
from megatron_ring.data.text.tokenizer import TokenizerType

_BATCH_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """How documents are tokenised. Example: ``TokenizeConfig(tokenizer_model="tok.model")``."""

    tokenizer_type: TokenizerType = "sentencepiece"
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    """End each document with the end-of-sequence token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedBatch:
    """Some documents, in order. Example, documents of 3 and 2 tokens: ``tokens=[5, 6, 1, 7, 1], lengths=(3, 2)``."""

    tokens: np.ndarray
    lengths: tuple[int, ...]
    num_bytes: int
    """Bytes of input, skipped records included."""
    num_skipped: int
    """Records without text: empty ones, and files in folders that are not UTF-8 text."""

    def documents(self) -> list[np.ndarray]:
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if self.lengths else []


def tokenize_documents(
    records: Iterable[Record], config: TokenizeConfig, *, workers: int = 1
) -> Iterator[TokenizedBatch]:
    """Tokenise records in ``workers`` processes; the result does not depend on their number.

    At most a few batches per worker are in memory, whatever the length of the input.

    Raises:
        DataError: a record or the tokenizer cannot be read, or a worker was killed.
    """
    yield from map_in_processes(_Tokenise(config), _batches(records), workers if workers > 1 else 0)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Tokenise:
    """Tokenises records; it is pickled to worker processes."""

    config: TokenizeConfig

    def __call__(self, records: Sequence[Record]) -> TokenizedBatch:
        config = self.config
        tokenizer = open_tokenizer(config.tokenizer_type, config.tokenizer_model)
        token_ids: list[int] = []
        lengths: list[int] = []
        num_skipped = 0
        for record in records:
            text = record_text(record, config.json_keys)
            ids = tokenizer.encode_document(text) if text else []
            if not ids:
                num_skipped += 1
                continue
            token_ids += ids
            if config.append_eod:
                token_ids.append(tokenizer.eos_id)
            lengths.append(len(ids) + config.append_eod)
        return TokenizedBatch(
            tokens=np.array(token_ids, dtype=token_dtype(tokenizer.vocab_size)),
            lengths=tuple(lengths),
            num_bytes=sum(len(record.raw) for record in records),
            num_skipped=num_skipped,
        )
