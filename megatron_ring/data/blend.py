"""Which dataset each sample of a blend comes from: pure functions of the sample's index.

Invariants: among the first n samples, each dataset has more than n*weight - 1 and fewer than n*weight + 1; the
samples of each dataset are taken in order, without gaps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_ring.errors import DataError

FINEST = 100_000
"""Weights without a common denominator up to this are rounded to multiples of 1/FINEST."""


class Blend:
    """An endless schedule of datasets, in proportion to their weights.

    Example: weights 3/4 and 1/4 give the datasets ``0 0 0 1``, repeated. ``Blend(...).locate(7) == (1, 1)``: sample 7
    of the blend is sample 1 of dataset 1.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self._counts = _whole_counts(weights)
        self._dataset_of, self._index_in_period = _schedule(self._counts)

    def locate(self, index: int) -> tuple[int, int]:
        """Dataset of sample ``index``, and the sample's index within that dataset's own samples."""
        period, slot = divmod(index, len(self._dataset_of))
        dataset = int(self._dataset_of[slot])
        return dataset, period * self._counts[dataset] + int(self._index_in_period[slot])


def _whole_counts(weights: Sequence[Fraction]) -> list[int]:
    """Samples of each dataset per period of the schedule."""
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= FINEST:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * FINEST) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * FINEST)
    for i in by_remainder[: FINEST - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        share = float(shares[counts.index(0)])
        raise DataError(
            f"a blend weight is {share:.1e} of the whole, less than 1/{FINEST}; "
            "raise it or leave that dataset out"
        )
    return counts


def _schedule(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """One period of P slots: the dataset of each slot, and the index of its sample within the period.

    The invariant gives sample j of a dataset with c samples per period a release slot, floor(j*P/c), and a deadline
    before slot ceil((j+1)*P/c). Earliest-deadline-first scheduling meets all deadlines if any schedule does; one
    exists here because the shares sum to 1.
    """
    period = sum(counts)
    dataset_of = np.zeros(period, dtype=np.int32)
    index_in_period = np.zeros(period, dtype=np.int64)
    # waiting: (release slot, dataset, index); ready: (deadline, dataset, index)
    waiting = [(0, dataset, 0) for dataset in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, dataset, index = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(index + 1) * period // counts[dataset]), dataset, index))
        _, dataset, index = heapq.heappop(ready)
        dataset_of[slot], index_in_period[slot] = dataset, index
        if index + 1 < counts[dataset]:
            heapq.heappush(waiting, ((index + 1) * period // counts[dataset], dataset, index + 1))
    return dataset_of, index_in_period
