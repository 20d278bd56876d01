"""Sequences into a static grid: [dp rank][microbatch] of ``capacity`` token slots, the same shape at every step.

Pure and without chance: every process that is given the same sizes builds the same grid. Invariants (one test
each): every rank has the same number of microbatches, no microbatch holds more than its capacity, every item
lies in exactly one microbatch or in ``dropped``, the same items give the same grid, and nothing is dropped
that ``fill_bins`` can fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.bins import Bin, fill_bins, put_in_gaps
from megatron_ring.errors import ConfigError

# ranks are even when the one with most attention exceeds the one with least by this share of the mean
_EVEN = 1e-3
# microbatches that trade places differ in tokens by less than this share of the capacity
_ALIKE = 1 / 64
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Where every item goes.

    ``placements[rank][microbatch]`` are item indices; an empty microbatch is all padding. ``dropped`` are the
    items that fitted nowhere. ``num_bins`` microbatches would have sufficed if ranks did not have to have the
    same number of them.

    Example: items of 6, 5, 4, 3, 2 and 9 tokens, capacity 10, 2 ranks, 2 microbatches:
    ``Grid(placements=(((5,), (3, 4)), ((0, 2), (1,))), dropped=(), num_bins=3, num_tokens=(6, 5, 4, 3, 2, 9),
    capacity=10)``: 14 and 15 tokens.
    """

    placements: tuple[tuple[tuple[int, ...], ...], ...]
    dropped: tuple[int, ...]
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
        that held them; ``tokens_imbalance`` and ``attention_imbalance``: max / mean over ranks;
        ``dropped_sequences`` and ``dropped_tokens`` (prompts included).
        """
        tokens, attention = self.tokens_per_rank(), self.attention_per_rank()
        slots = sum(len(rank) for rank in self.placements) * self.capacity
        return {
            "packing/fill": sum(tokens) / slots,
            "packing/bin_fill": sum(tokens) / max(self.num_bins * self.capacity, 1),
            "packing/tokens_imbalance": max(tokens) * len(tokens) / max(sum(tokens), 1),
            "packing/attention_imbalance": max(attention) * len(attention) / max(sum(attention), 1),
            "packing/dropped_sequences": float(len(self.dropped)),
            "packing/dropped_tokens": float(sum(self.num_tokens[i] for i in self.dropped)),
        }


def grid_shape(
    *,
    token_budget: int,
    longest_prompt: int,
    longest_response: int,
    capacity: int,
    dp_size: int,
    reserve: float,
    multiple_of: int = 1,
    typical_response: int | None = None,
) -> int:
    """Microbatches per rank, once for the whole run, for minibatches of ``token_budget`` response tokens.

    With P = longest_prompt, r = typical_response (half of longest_response unless given), and x = capacity /
    (P + r) the sequences of that kind that a microbatch could hold,

        fit   = 1 if x >= 2, else the larger of x / 2 and 1 / x
        slots = token_budget * (1 + P / r) * (1 + reserve) / fit

    and the answer is ``slots / (capacity * dp_size)`` rounded up, then up to a multiple of ``multiple_of``
    (interleaved pipelines take microbatches in rounds of the pipeline's size).

    Phi counts response tokens, but each response brings its prompt along, so the slots depend on how many
    responses make up Phi, which is not known before they are sampled. The estimate therefore charges every
    response the longest prompt and takes responses to be typically half as long as they may be (the paper:
    12.8k of 24.6k): it is enough for responses all as short as that, and generous wherever prompts are
    shorter than the longest, which is why P should be the longest prompt that the data has and not a limit
    far above it. ``fit``: while two typical sequences share a microbatch, the many sizes there are fill it to
    98% and more; where they do not, most microbatches hold one and what short ones find room beside it.
    ``reserve`` pays for the rest: fits of few sequences, prefixes that responses of an earlier step carry
    as context, and the response that ``overshoot="response"`` lets pass Phi.

    Nothing here is a guarantee: responses of a few tokens each fit no fixed grid. What does not fit is
    dropped by :func:`pack` and counted; a run that keeps dropping wants a larger reserve.

    Example: 8 ranks, ``grid_shape(token_budget=409600, longest_prompt=512, longest_response=8192,
    capacity=16384, dp_size=8, reserve=0.05)``: 409600 * 1.125 * 1.05 / 131072 = 3.7, so 4.

    Raises:
        ConfigError: the longest prompt with the longest response does not fit into a microbatch.
    """
    longest = longest_prompt + longest_response
    if longest > capacity:
        raise ConfigError(
            f"microbatch_capacity={capacity} is less than the longest prompt and response, {longest_prompt} + "
            f"{longest_response} tokens; set it to {longest} or more"
        )
    typical = typical_response or max(longest_response // 2, 1)
    x = capacity / (longest_prompt + typical)
    fit = max(min(x / 2, 1), min(1 / x, 1))
    slots = token_budget * (1 + longest_prompt / typical) * (1 + reserve) / fit
    rounds = math.ceil(slots / (capacity * dp_size * multiple_of))
    return max(rounds, 1) * multiple_of


def pack(num_tokens: Sequence[int], *, capacity: int, dp_size: int, num_microbatches: int) -> Grid:
    """Pack items of ``num_tokens`` (prompt and response up to its stop) into the grid.

    Tokens and attention cost are evened out over ranks. Microbatch j costs about the same on every rank, since
    ranks that share experts wait for one another in each; over j, heavy and light ones alternate, so that no
    stretch of the pipeline is slower than another. If there are more items than fit, the fullest
    microbatches are kept, the rest fills their gaps largest first, and what is left over is ``dropped``.

    Raises:
        ValueError: an item is empty or larger than the capacity, or the grid has no slots.
    """
    if dp_size < 1 or num_microbatches < 1:
        raise ValueError(f"{dp_size=} and {num_microbatches=} must be positive")
    num_tokens = tuple(num_tokens)
    bins = fill_bins(num_tokens, capacity)
    bins, dropped = _keep(num_tokens, bins, capacity, dp_size * num_microbatches)
    num_bins = len(bins)
    ranks = _even_ranks(num_tokens, _level(num_tokens, bins, capacity, dp_size), dp_size)
    turns = _alternate(num_microbatches)
    placements = []
    for rank in ranks:
        # heaviest first, the same turn for the same weight on every rank
        rank = sorted(rank, key=lambda bin: -_attention(num_tokens, bin))
        rank += [[] for _ in range(num_microbatches - len(rank))]
        placements.append(tuple(tuple(sorted(rank[turn])) for turn in turns))
    return Grid(
        placements=tuple(placements),
        dropped=tuple(sorted(dropped)),
        num_bins=num_bins,
        num_tokens=num_tokens,
        capacity=capacity,
    )


def _attention(num_tokens: Sequence[int], bin: Bin) -> int:
    return sum(num_tokens[i] ** 2 for i in bin)


def _keep(num_tokens: Sequence[int], bins: list[Bin], capacity: int, limit: int) -> tuple[list[Bin], Bin]:
    """At most ``limit`` bins, and the items that they have no room for."""
    if len(bins) <= limit:
        return bins, []
    bins = sorted(bins, key=lambda bin: -sum(num_tokens[i] for i in bin))
    kept, rest = bins[:limit], [i for bin in bins[limit:] for i in bin]
    gaps = sorted((capacity - sum(num_tokens[i] for i in bin), b) for b, bin in enumerate(kept))
    return kept, put_in_gaps(num_tokens, rest, kept, gaps)


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
