"""Corpora in memory."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_ring.data.corpus.corpus import CorpusShare, CorpusSplit
from megatron_ring.data.corpus.indexed import IndexedCorpus


def share_of(*documents: Sequence[int]) -> CorpusShare:
    """Documents in memory, as one indexed dataset."""
    lengths = [len(document) for document in documents]
    corpus = IndexedCorpus(
        prefix="in-memory",
        tokens=np.array([token for document in documents for token in document], dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        manifest={},
    )
    return CorpusShare(corpus=corpus, first_document=0, end_document=len(documents))


def split_of(*shares: CorpusShare, weights: Sequence[Fraction] | None = None) -> CorpusSplit:
    return CorpusSplit(
        name="train", shares=shares, weights=tuple(weights or [Fraction(1, len(shares))] * len(shares))
    )
