"""Pack sequences into a grid [dp rank][microbatch] of ``capacity`` token slots each.

The shape of a microbatch is static over a run, which bounds memory; the number of microbatches follows from the
sequences. Pure and deterministic: every process builds the same grid from the same sizes. Invariants (one test each):

- every item is in exactly one microbatch, and no microbatch holds more than its capacity;
- every rank has the same number of microbatches, a multiple of ``multiple_of``, and no more than the bins of
  ``fill_bins`` require;
- the same items give the same grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.batch.bins import Bin, fill_bins

# ranks are balanced when the difference between most and least attention is at most this share of the mean
_EVEN = 1e-3
# microbatches may be swapped between ranks if their tokens differ by at most this share of the largest
_ALIKE = 1 / 64
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The rank and microbatch of every item.

    ``placements[rank][microbatch]`` are item indices; an empty microbatch is all padding. ``num_bins`` is how many
    microbatches would suffice if ranks could have different numbers of them.

    Example: items of 6, 5, 4, 3, 2 and 9 tokens, capacity 10, 2 ranks, which get 14 and 15 tokens:
    ``Grid(placements=(((5,), (3, 4)), ((0, 2), (1,))), num_bins=3, num_tokens=(6, 5, 4, 3, 2, 9), capacity=10)``.
    """

    placements: tuple[tuple[tuple[int, ...], ...], ...]
    num_bins: int
    num_tokens: tuple[int, ...]
    capacity: int

    def tokens_per_rank(self) -> list[int]:
        """Tokens of each rank, without padding."""
        return [sum(self.num_tokens[i] for bin in rank for i in bin) for rank in self.placements]

    def attention_per_rank(self) -> list[int]:
        """Sum of squared segment lengths of each rank; the cost of attention is proportional to it."""
        return [sum(self.num_tokens[i] ** 2 for bin in rank for i in bin) for rank in self.placements]

    def metrics(self) -> dict[str, float]:
        """``packing/...``.

        ``fill``: tokens / slots of the whole grid; ``bin_fill``: tokens / slots of ``num_bins`` microbatches;
        ``tokens_imbalance`` and ``attention_imbalance``: max / mean over ranks.
        """
        tokens, attention = self.tokens_per_rank(), self.attention_per_rank()
        slots = sum(len(rank) for rank in self.placements) * self.capacity
        return {
            "packing/fill": sum(tokens) / slots,
            "packing/bin_fill": sum(tokens) / max(self.num_bins * self.capacity, 1),
            "packing/tokens_imbalance": max(tokens) * len(tokens) / max(sum(tokens), 1),
            "packing/attention_imbalance": max(attention) * len(attention) / max(sum(attention), 1),
        }


def pack(num_tokens: Sequence[int], *, capacity: int, dp_size: int, multiple_of: int = 1) -> Grid:
    """Pack items (prompt and response up to its stop) into as few microbatches as possible.

    Tokens and attention cost are balanced over ranks. Microbatch j costs about the same on every rank, because ranks
    that share experts wait for each other in every microbatch. Along j, expensive and cheap microbatches alternate, so
    that the pipeline's load is steady.

    Args:
        num_tokens: tokens of each item.
        capacity: token slots of a microbatch.
        dp_size: number of ranks; each gets the same number of microbatches, at least one.
        multiple_of: the number of microbatches per rank is a multiple of this (the pipeline's size for an interleaved
            schedule).

    Raises:
        ValueError: an item is empty or larger than the capacity, or there are no ranks.
    """
    if dp_size < 1 or multiple_of < 1:
        raise ValueError(f"{dp_size=} and {multiple_of=} must be positive")
    num_tokens = tuple(num_tokens)
    bins = fill_bins(num_tokens, capacity)
    num_bins = len(bins)
    ranks = _even_ranks(num_tokens, _level(num_tokens, bins, capacity, dp_size), dp_size)
    rounds = -(-max(len(ranks[0]), 1) // multiple_of) * multiple_of
    turns = _alternate(rounds)
    placements: list[tuple[tuple[int, ...], ...]] = []
    for rank in ranks:
        # sorted by cost, so that microbatch j has a similar cost on every rank
        rank = sorted(rank, key=lambda bin: -_attention(num_tokens, bin))
        rank += [[] for _ in range(rounds - len(rank))]
        placements.append(tuple(tuple(sorted(rank[turn])) for turn in turns))
    return Grid(placements=tuple(placements), num_bins=num_bins, num_tokens=num_tokens, capacity=capacity)


def _attention(num_tokens: Sequence[int], bin: Bin) -> int:
    return sum(num_tokens[i] ** 2 for i in bin)


def _level(num_tokens: Sequence[int], bins: list[Bin], capacity: int, dp_size: int) -> list[Bin]:
    """Make the number of bins a multiple of ``dp_size``: the items of the ``len(bins) % dp_size`` cheapest bins are
    spread over ``dp_size`` bins. If they do not fit when spread, empty bins are added instead (rare).
    """
    over = len(bins) % dp_size
    if not over:
        return bins
    bins = sorted(bins, key=lambda bin: -_attention(num_tokens, bin))
    whole, parts = bins[: len(bins) - over], bins[len(bins) - over :]
    spread: list[Bin] = [[] for _ in range(dp_size)]
    used = [0] * dp_size
    for item in sorted((i for bin in parts for i in bin), key=lambda i: (-num_tokens[i], i)):
        emptiest = min(range(dp_size), key=used.__getitem__)
        spread[emptiest].append(item)
        used[emptiest] += num_tokens[item]
    if max(used) > capacity:
        spread = parts + [[] for _ in range(dp_size - over)]
    return whole + spread


def _even_ranks(num_tokens: Sequence[int], bins: list[Bin], dp_size: int) -> list[list[Bin]]:
    """Distribute bins (a multiple of ``dp_size``) over ranks so that attention costs are about equal.

    In each round every rank gets one of the most expensive bins left; the rank with the lowest load gets the most
    expensive. Then ranks swap bins with about equal numbers of tokens.
    """
    cost = np.array([_attention(num_tokens, bin) for bin in bins], dtype=np.float64)
    tokens = np.array([sum(num_tokens[i] for i in bin) for bin in bins], dtype=np.float64)
    rounds = np.argsort(-cost, kind="stable").reshape(-1, dp_size)
    load = np.zeros(dp_size)
    dealt_RD = np.empty_like(rounds)
    for turn, round in enumerate(rounds):
        order = np.argsort(load, kind="stable")
        dealt_RD[turn, order] = round
        load[order] += cost[round]
    for _ in range(8 * dp_size):
        most, least = int(load.argmax()), int(load.argmin())
        if not len(rounds) or load[most] - load[least] <= _EVEN * load.mean():
            break
        mine_R, theirs_R = dealt_RD[:, most], dealt_RD[:, least]
        gain_RR = cost[mine_R][:, None] - cost[theirs_R]
        alike_RR = abs(tokens[mine_R][:, None] - tokens[theirs_R]) <= _ALIKE * tokens.max()
        off_RR = np.where(alike_RR, abs(gain_RR - (load[most] - load[least]) / 2), np.inf)
        mine, theirs = np.unravel_index(off_RR.argmin(), off_RR.shape)
        gain = gain_RR[mine, theirs]
        if not alike_RR[mine, theirs] or not 0 < gain < load[most] - load[least]:
            break
        dealt_RD[mine, most], dealt_RD[theirs, least] = dealt_RD[theirs, least], dealt_RD[mine, most]
        load[most] -= gain
        load[least] += gain
    return [[bins[b] for b in column] for column in dealt_RD.T.tolist()]


def _alternate(count: int) -> list[int]:
    """An order of ``range(count)`` in which any run of neighbours mixes large and small numbers: the ranks of the
    fractional parts of multiples of the golden ratio, a low-discrepancy sequence.

    Example: ``_alternate(5)`` is ``[0, 3, 1, 4, 2]``.
    """
    return [int(turn) for turn in np.argsort(np.argsort(np.arange(count) * _GOLDEN % 1, kind="stable"))]
