"""The endless stream of pre-training samples, and the cursor that says which come next.

The stream is a pure function of (corpus, seed, index); all that a run has to remember is the cursor.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ring.data.blend import Blend
from megatron_ring.data.corpus.corpus import CorpusSplit
from megatron_ring.data.corpus.document_samples import DocumentSamples
from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PretrainSample:
    """seq_length consecutive tokens of the shuffled document stream.

    Example, seq_length 6, documents ``[7 8 1] [9 1] [5 ...]`` (1 ends a document), attention reset at each::

        tokens           [7, 8, 1, 9, 1, 5]
        labels           [8, 1, 9, 1, 5, 6]
        loss_mask        [1, 1, 0, 1, 0, 1]   # a document's end does not predict the next document
        segment_lengths  (3, 2, 1)
    """

    tokens: np.ndarray
    """``int64[seq_length]``."""
    labels: np.ndarray
    """``int64[seq_length]``: the token after each."""
    loss_mask: np.ndarray
    """``float32[seq_length]``: 1 where the label counts."""
    segment_lengths: tuple[int, ...]
    """Tokens of each stretch within which attention stays; they sum to seq_length."""


class PretrainStream:
    """Samples of one split, by index, forever: epochs follow each other, each in a new order. Thread-safe.

    Example: ``PretrainStream(open_corpus(("corpus",), "949,50,1").train, seq_length=256, seed=1).sample(0)``.
    """

    def __init__(
        self,
        split: CorpusSplit,
        *,
        seq_length: int,
        seed: int,
        reset_at_document: bool = True,
        vocab_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            split: what to read.
            seq_length: tokens per sample.
            seed: of the order; the same at every rank.
            reset_at_document: attention ends, and no label is learned, where a document does.
            vocab_size: of the model; a token that is not below it is an error.
            num_workers: threads that read ahead (see :meth:`prefetch`).

        Raises:
            DataError: the split holds no sample of that length.
        """
        self.seq_length = seq_length
        self._reset_at_document = reset_at_document
        self._vocab_size = vocab_size
        self._split = split
        self._blend = Blend(split.weights)
        self._datasets = [
            DocumentSamples(share, seq_length=seq_length, seed=seed, place=place, split=split.name)
            for place, share in enumerate(split.shares)
        ]
        self._threads = ThreadPoolExecutor(num_workers, "corpus") if num_workers else None
        self._ahead: dict[int, Future[PretrainSample]] = {}
        self.samples_per_epoch = sum(dataset.samples_per_epoch for dataset in self._datasets)
        """Samples in one pass over every dataset; a blend passes over them at different rates."""
        self.fingerprint = f"{split.fingerprint}-{seq_length}-{seed}"
        """Equal fingerprints give equal samples: a cursor keeps it."""

    def sample(self, index: int) -> PretrainSample:
        """Sample ``index``.

        Raises:
            DataError: a token id does not fit the vocabulary.
        """
        dataset, place = self._blend.locate(index)
        tokens, ends = self._datasets[dataset].read(place)
        self._require_vocabulary(tokens, dataset)
        loss_mask = np.ones(self.seq_length, np.float32)
        segment_lengths: tuple[int, ...] = (self.seq_length,)
        if self._reset_at_document:
            ends = ends[ends <= self.seq_length]
            loss_mask[ends - 1] = 0
            lengths = np.diff(ends, prepend=0, append=self.seq_length)
            segment_lengths = tuple(int(length) for length in lengths if length)
        return PretrainSample(
            tokens=tokens[:-1], labels=tokens[1:], loss_mask=loss_mask, segment_lengths=segment_lengths
        )

    def samples(self, indices: Iterable[int]) -> list[PretrainSample]:
        """Several samples; those that were prefetched are waited for, not read again."""
        found: list[PretrainSample] = []
        for index in indices:
            future = self._ahead.pop(index, None)
            found.append(future.result() if future else self.sample(index))
        return found

    def prefetch(self, indices: Iterable[int]) -> None:
        """Have the reader threads read these samples, in place of any that an earlier call asked for in
        vain."""
        if self._threads is None:
            return
        wanted = list(indices)
        self._ahead = {i: self._ahead.get(i) or self._threads.submit(self.sample, i) for i in wanted}

    def close(self) -> None:
        """End the reader threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _require_vocabulary(self, tokens: np.ndarray, dataset: int) -> None:
        if self._vocab_size is None:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self._split.shares[dataset].corpus.prefix}.bin holds token id {low if low < 0 else high}, "
                f"the model has vocab_size={self._vocab_size}; preprocess with the run's tokenizer, or raise "
                "vocab_size"
            )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Sample indices of one global batch. Example: ``Draw(indices=(96, 12, 97), is_retry=(False, True,
    False))``."""

    indices: tuple[int, ...]
    is_retry: tuple[bool, ...]
    """Which of them were put back by :meth:`SampleCursor.requeue` and come once more."""


class SampleCursor:
    """Which samples of a stream come next: in order, but for those put back to come again later.

    Rank r of a data-parallel group that takes n samples per step reads ``take(dp * n).indices[r * n : (r + 1)
    * n]``; every rank moves its own copy of the cursor alike.

    Invariant: a sample put back is drawn once more; all others are drawn once, in order. Nothing is lost.
    """

    def __init__(self, *, seed: int, fingerprint: str = "") -> None:
        """
        Args:
            seed: of the places that samples put back go to.
            fingerprint: the stream's; a state saved for another stream is refused.
        """
        self._seed = seed
        self._fingerprint = fingerprint
        self.consumed_samples = 0
        """Samples drawn so far, repeated ones included."""
        self._next_fresh = 0
        self._num_requeued = 0
        # (number of samples drawn before it is due, order of putting back, sample index), as a heap
        self._put_back: list[tuple[int, int, int]] = []

    def take(self, num_samples: int) -> Draw:
        """Draw the next samples."""
        indices: list[int] = []
        is_retry: list[bool] = []
        for _ in range(num_samples):
            retry = bool(self._put_back) and self._put_back[0][0] <= self.consumed_samples
            if retry:
                indices.append(heapq.heappop(self._put_back)[2])
            else:
                indices.append(self._next_fresh)
                self._next_fresh += 1
            is_retry.append(retry)
            self.consumed_samples += 1
        return Draw(indices=tuple(indices), is_retry=tuple(is_retry))

    def peek(self, num_samples: int) -> Draw:
        """What :meth:`take` would draw, without drawing it."""
        ahead = SampleCursor(seed=self._seed, fingerprint=self._fingerprint)
        ahead.load_state_dict(self.state_dict())
        return ahead.take(num_samples)

    def requeue(self, indices: Sequence[int], *, within: int) -> None:
        """Put samples back, each at a random place among the next ``within`` draws.

        For the rule of the Ling report: when a loss spike makes a step be skipped, its data is tried again
            later.
        """
        for index in indices:
            place = Shuffle(max(within, 1), self._seed, "requeue", self._num_requeued)(0)
            heapq.heappush(self._put_back, (self.consumed_samples + place, self._num_requeued, index))
            self._num_requeued += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as numbers, strings and lists."""
        return {
            "consumed_samples": self.consumed_samples,
            "next_fresh": self._next_fresh,
            "num_requeued": self._num_requeued,
            "put_back": [list(entry) for entry in sorted(self._put_back)],
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            DataError: the state belongs to another stream: its samples would be read twice or never.
        """
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"the checkpoint was reading other data (fingerprint {state['fingerprint']}, now "
                f"{self._fingerprint}); keep data_path, split, seq_length and seed, or start from its "
                "weights alone with --finetune"
            )
        self._seed = count_in(state, "seed")
        self.consumed_samples = count_in(state, "consumed_samples")
        self._next_fresh = count_in(state, "next_fresh")
        self._num_requeued = count_in(state, "num_requeued")
        entries = [counts_in(state, "put_back", entry) for entry in state["put_back"]]
        self._put_back = [(due, order, index) for due, order, index in entries]
