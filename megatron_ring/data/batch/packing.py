"""Sequences into a grid: [dp rank][microbatch] of ``capacity`` token slots each.

The shape of a microbatch is static over a run, so that memory is bounded by it; how many there are follows from
what is packed. Pure and without chance: every process that is given the same sizes builds the same grid.
Invariants (one test each): every item lies in exactly one microbatch, every rank has the same number of
microbatches, a multiple of what the pipeline asks for and no more than the bins of ``fill_bins`` need, no
microbatch holds more than its capacity, and the same items give the same grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.batch.bins import Bin, fill_bins

# ranks are even when the one with most attention exceeds the one with least by this share of the mean
_EVEN = 1e-3
# microbatches that trade places differ in tokens by less than this share of the capacity
_ALIKE = 1 / 64
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Where every item goes.

    ``placements[rank][microbatch]`` are item indices; an empty microbatch is all padding. ``num_bins``
    microbatches would have sufficed if ranks did not have to have the same number of them.

    Example: items of 6, 5, 4, 3, 2 and 9 tokens, capacity 10, 2 ranks:
    ``Grid(placements=(((5,), (3, 4)), ((0, 2), (1,))), num_bins=3, num_tokens=(6, 5, 4, 3, 2, 9), capacity=10)``:
    14 and 15 tokens.
    """

    placements: tuple[tuple[tuple[int, ...], ...], ...]
    num_bins: int
    num_tokens: tuple[int, ...]
    capacity: int

    def tokens_per_rank(self) -> list[int]:
        """Tokens, padding left out, of each rank."""
        return [sum(self.num_tokens[i] for bin in rank for i in bin) for rank in self.placements]

    def attention_per_rank(self) -> list[int]:
        """Sum of squared segment lengths, to which the cost of attention is proportional, of each rank."""
        return [sum(self.num_tokens[i] ** 2 for bin in rank for i in bin) for rank in self.placements]

    def metrics(self) -> dict[str, float]:
        """``packing/...``.

        ``fill``: tokens / slots of the whole grid; ``bin_fill``: tokens / slots of the fewest microbatches
        that held them; ``tokens_imbalance`` and ``attention_imbalance``: max / mean over ranks.
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
    """Pack items of ``num_tokens`` (prompt and response up to its stop) into as few microbatches as it takes.

    Tokens and attention cost are evened out over ranks. Microbatch j costs about the same on every rank, since
    ranks that share experts wait for one another in each; over j, heavy and light ones alternate, so that no
    stretch of the pipeline is slower than another.

    Args:
        num_tokens: of each item.
        capacity: token slots of a microbatch.
        dp_size: ranks, which all get the same number of microbatches, at least one.
        multiple_of: what that number must be a multiple of: an interleaved pipeline takes microbatches in rounds of
            its size.

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
    placements = []
    for rank in ranks:
        # heaviest first, the same turn for the same weight on every rank
        rank = sorted(rank, key=lambda bin: -_attention(num_tokens, bin))
        rank += [[] for _ in range(rounds - len(rank))]
        placements.append(tuple(tuple(sorted(rank[turn])) for turn in turns))
    return Grid(placements=tuple(placements), num_bins=num_bins, num_tokens=num_tokens, capacity=capacity)


def _attention(num_tokens: Sequence[int], bin: Bin) -> int:
    return sum(num_tokens[i] ** 2 for i in bin)


def _level(num_tokens: Sequence[int], bins: list[Bin], capacity: int, dp_size: int) -> list[Bin]:
    """As many bins for each rank: the ``len(bins) % dp_size`` that no full round takes are spread over one.

    The bins with the smallest items are taken apart: they spread most evenly. Empty bins fill the round up
    in the rare case in which their items do not fit when spread.
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
    """Deal bins, a multiple of ``dp_size`` of them, to ranks of about equal attention cost.

    Heaviest first, one to each rank in a round, the heavier the less the rank has so far; then ranks trade
    bins that hold about as many tokens.
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
    """An order of ``range(count)`` in which each stretch holds large and small numbers alike: that of the
    fractions of multiples of the golden ratio, any run of which is spread evenly.

    Example: ``_alternate(5)`` is ``[0, 3, 1, 4, 2]``.
    """
    return [int(turn) for turn in np.argsort(np.argsort(np.arange(count) * _GOLDEN % 1, kind="stable"))]
