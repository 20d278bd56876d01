"""The endless stream of pre-training samples, and the cursor of a run in it.

The stream is a pure function of (corpus, seed, index); the cursor is the only state of a run.
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
        loss_mask        [1, 1, 0, 1, 0, 1]   # no loss where the label belongs to the next document
        segment_lengths  (3, 2, 1)
    """

    tokens: np.ndarray
    """``int64[seq_length]``."""
    labels: np.ndarray
    """``int64[seq_length]``: the token after each."""
    loss_mask: np.ndarray
    """``float32[seq_length]``: 1 where the label carries loss."""
    segment_lengths: tuple[int, ...]
    """Lengths of the attention segments; they sum to seq_length."""


class PretrainStream:
    """Samples of one split by index, over endless epochs, each in a new order. Thread-safe.

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
            split: the documents to read.
            seq_length: tokens per sample.
            seed: of the shuffles; the same on every rank.
            reset_at_document: attention stays within a document, and a document's last token carries no loss.
            vocab_size: of the model; a token id that is not below it is an error.
            num_workers: threads that read ahead (see :meth:`prefetch`).

        Raises:
            DataError: the split has too few tokens for one sample.
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
        """Sum of the samples per epoch of each dataset; a blend reads its datasets at different rates."""
        self.fingerprint = f"{split.fingerprint}-{seq_length}-{seed}"
        """Equal fingerprints give equal samples; the cursor's state contains it."""

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
        """Several samples; prefetched ones are awaited, not read again."""
        found: list[PretrainSample] = []
        for index in indices:
            future = self._ahead.pop(index, None)
            found.append(future.result() if future else self.sample(index))
        return found

    def prefetch(self, indices: Iterable[int]) -> None:
        """Let the reader threads read these samples. Samples of earlier calls that were not taken are dropped."""
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
                f"{self._split.shares[dataset].corpus.prefix}.bin contains token id {low if low < 0 else high}, "
                f"the model has vocab_size={self._vocab_size}; preprocess with the run's tokenizer, or raise "
                "vocab_size"
            )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Sample indices of one global batch. Example: ``Draw(indices=(96, 12, 97), is_retry=(False, True, False))``."""

    indices: tuple[int, ...]
    is_retry: tuple[bool, ...]
    """Which of them were requeued by :meth:`SampleCursor.requeue` and are drawn again."""


class SampleCursor:
    """Draws the samples of a stream in order, except for requeued ones, which are drawn again later.

    With n samples per rank and step, data-parallel rank r reads ``take(dp * n).indices[r * n : (r + 1) * n]``. Every
    rank has a copy of the cursor and moves it in the same way.

    Invariant: a requeued sample is drawn once more for each time it was requeued; all others once, in order.
    """

    def __init__(self, *, seed: int, fingerprint: str = "") -> None:
        """
        Args:
            seed: of the random positions of requeued samples.
            fingerprint: of the stream; a state saved for another stream is refused.
        """
        self._seed = seed
        self._fingerprint = fingerprint
        self.consumed_samples = 0
        """Samples drawn so far, requeued ones included."""
        self._next_fresh = 0
        self._num_requeued = 0
        # heap of (consumed_samples from which it is due, requeue counter, sample index)
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
        """What :meth:`take` would return, without moving the cursor."""
        ahead = SampleCursor(seed=self._seed, fingerprint=self._fingerprint)
        ahead.load_state_dict(self.state_dict())
        return ahead.take(num_samples)

    def requeue(self, indices: Sequence[int], *, within: int) -> None:
        """Schedule samples to be drawn again, each at a random position among the next ``within`` draws.

        Used by the spike rule of the Ling report: the data of a step that was skipped for a loss spike is tried again
        later.
        """
        for index in indices:
            delay = Shuffle(max(within, 1), self._seed, "requeue", self._num_requeued)(0)
            heapq.heappush(self._put_back, (self.consumed_samples + delay, self._num_requeued, index))
            self._num_requeued += 1

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as numbers, strings and lists."""
        return {
            "consumed_samples": self.consumed_samples,
            "next_fresh": self._next_fresh,
            "num_requeued": self._num_requeued,
            "put_back": [list(entry) for entry in sorted(self._put_back)],
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            DataError: the state belongs to another stream; samples would be read twice or never.
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
