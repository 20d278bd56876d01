"""Samples of one dataset: pieces of fixed length of the shuffled stream of its documents, epoch after epoch.

In each epoch the documents are concatenated in a new order, the stream is cut every ``seq_length`` tokens, and the
pieces are shuffled. A piece is read with one more token, the label of its last one.

Invariant: in an epoch each token is the input of exactly one sample, except for the last ``seq_length`` or fewer
tokens of the stream, which differ from epoch to epoch.
"""

from __future__ import annotations

import numpy as np

from megatron_ring.data.corpus.corpus import CorpusShare
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.errors import DataError


class DocumentSamples:
    """Random access to the samples of a share of documents. Thread-safe; a result depends on the arguments only.

    Memory: 8 bytes per document for each of at most two epochs.
    """

    def __init__(self, share: CorpusShare, *, seq_length: int, seed: int, place: int, split: str) -> None:
        """
        Args:
            share: the documents.
            seq_length: tokens per sample.
            seed: of the shuffles.
            place: index of the dataset in its blend; a dataset that is named twice gets two orders.
            split: name of the split, for messages.

        Raises:
            DataError: the documents are too few for one sample.
        """
        if not share.num_documents:
            raise DataError(
                f"{split} split of {share.corpus.prefix} is empty: none of its {share.corpus.num_documents} "
                "documents are in it; raise that part of split or add documents"
            )
        if share.num_tokens < seq_length + 1:
            raise DataError(
                f"{split} split of {share.corpus.prefix} has {share.num_tokens} tokens, a sample needs "
                f"seq_length+1={seq_length + 1}; raise that part of split, add documents or lower seq_length"
            )
        self._share = share
        self._seq_length = seq_length
        self._key = (seed, split, place)
        self._ends_of_epoch: dict[int, np.ndarray] = {}
        self.samples_per_epoch = (share.num_tokens - 1) // seq_length

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ``index``, counted over all epochs.

        Returns:
            ``int64[seq_length + 1]`` tokens, and in ascending order the positions (1 to seq_length + 1) after which a
            document ends.
        """
        epoch, place = divmod(index, self.samples_per_epoch)
        piece = Shuffle(self.samples_per_epoch, *self._key, "samples", epoch)(place)
        return self._read_stream(epoch, piece * self._seq_length, self._seq_length + 1)

    def _read_stream(self, epoch: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        ends_D = self._document_ends(epoch)
        first = int(np.searchsorted(ends_D, start, side="right"))
        last = int(np.searchsorted(ends_D, start + length, side="left"))
        documents = self._order(epoch).many(np.arange(first, last + 1)) + self._share.first_document
        offsets, tokens = self._share.corpus.offsets, self._share.corpus.tokens
        out = np.empty(length, np.int64)
        filled = 0
        # offset of the stream's position in the first document
        skip = start - (int(ends_D[first - 1]) if first else 0)
        for document in documents:
            begin = int(offsets[document]) + skip
            taken = min(int(offsets[document + 1]) - begin, length - filled)
            out[filled : filled + taken] = tokens[begin : begin + taken]
            filled, skip = filled + taken, 0
        return out, np.unique(ends_D[first : last + 1][ends_D[first : last + 1] <= start + length]) - start

    def _document_ends(self, epoch: int) -> np.ndarray:
        """End of each document in the epoch's stream, in the epoch's order."""
        ends_D = self._ends_of_epoch.get(epoch)
        if ends_D is None:
            share = self._share
            documents = self._order(epoch).many(np.arange(share.num_documents)) + share.first_document
            offsets = share.corpus.offsets
            ends_D = np.cumsum(offsets[documents + 1] - offsets[documents])
            # a batch can extend into the next epoch; older epochs are not needed again
            kept = {e: ends for e, ends in self._ends_of_epoch.items() if abs(e - epoch) <= 1}
            self._ends_of_epoch = {**dict(list(kept.items())[-1:]), epoch: ends_D}
        return ends_D

    def _order(self, epoch: int) -> Shuffle:
        return Shuffle(self._share.num_documents, *self._key, "documents", epoch)
