"""Bin packing: fill as few bins as possible with items that cannot be split.

Pure and deterministic. Invariants (one test each): every item is in exactly one bin, no bin holds more than its
capacity, and there are never more bins than best-fit-decreasing needs (at most 11/9 of the optimum plus 6/9).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

Bin = list[int]
"""Indices of the items in a bin."""

# (how many companions to try, slack in 1/512 of the capacity that ends the search)
_GREEDS = ((4, 1), (4, 4), (64, 4), (16, 0))
_REPACKINGS = 40
# a bin is repacked when more than this share of it is empty
_LOOSE = 1 / 256


def fill_bins(sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Group items into bins.

    Best-fit-decreasing combines the largest items that fit, whatever gap they leave. Here a gap is also filled with
    the pair of items whose sum comes closest to it. The best of several such packings is then improved: bins with
    free space are repacked together with some full ones, as long as this saves a bin or collects the free space in
    fewer bins.

    Example: ``fill_bins([6, 5, 4, 3, 2], 10)`` is ``[[0, 2], [1, 3, 4]]``.

    Raises:
        ValueError: an item is empty or larger than the capacity.
    """
    if any(not 0 < size <= capacity for size in sizes):
        raise ValueError(f"item sizes must be 1 to {capacity}, got {min(sizes)} to {max(sizes)}")
    bins = best_fit_decreasing(sizes, capacity)
    fewest = -(-sum(sizes) // capacity)
    for companions, tolerance in _GREEDS:
        if len(bins) == fewest:
            return bins
        bins = min(
            bins,
            _fill_gaps(sizes, range(len(sizes)), capacity, companions, capacity * tolerance // 512),
            key=len,
        )
    return _repack(sizes, capacity, bins, fewest)


def best_fit(
    sizes: Sequence[int], capacity: int, order: Iterable[int], max_open: int | None = None
) -> list[Bin]:
    """In ``order``, put each item into the fullest open bin that has room for it, else into a new one.

    A bin is closed when it is full. With ``max_open``, the fullest bin is closed before one more than that many
    would be open. Bins are returned in the order in which they were closed; those still open come last, oldest first.

    Example: ``best_fit([3, 4, 2, 1], 5, order=[0, 1, 2, 3])`` is ``[[0, 2], [1, 3]]``.
    """
    bins: list[Bin] = []
    closed: list[int] = []
    # (free capacity, index of the bin), the fullest first
    open_: list[tuple[int, int]] = []
    for item in order:
        size = sizes[item]
        at = bisect_left(open_, (size, -1))
        if at < len(open_):
            free, where = open_.pop(at)
        else:
            if len(open_) == max_open:
                closed.append(open_.pop(0)[1])
            free, where = capacity, len(bins)
            bins.append([])
        bins[where].append(item)
        if free == size:
            closed.append(where)
        else:
            insort(open_, (free - size, where))
    return [bins[where] for where in closed + sorted(where for _, where in open_)]


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[Bin]:
    """Best fit, largest item first; bins in the order in which they were opened. O(n log n) comparisons."""

    def rank(item: int) -> tuple[int, int]:
        return -sizes[item], item

    bins = best_fit(sizes, capacity, sorted(range(len(sizes)), key=rank))
    return sorted(bins, key=lambda bin: rank(bin[0]))


def _fill_gaps(
    sizes: Sequence[int], items: Sequence[int], capacity: int, companions: int, tolerance: int
) -> list[Bin]:
    """Start each bin with the largest remaining item; fill its gap with the best single item or pair, repeatedly."""
    order = sorted(items, key=lambda i: (sizes[i], i))
    left = [sizes[i] for i in order]
    bins: list[Bin] = []
    while left:
        gap = capacity - left.pop()
        bins.append([order.pop()])
        while left and left[0] <= gap:
            for at in _companions(left, gap, companions, tolerance):
                gap -= left.pop(at)
                bins[-1].append(order.pop(at))
    return bins


def _companions(left: list[int], gap: int, companions: int, tolerance: int) -> tuple[int, ...]:
    """Indices in the ascending list ``left``, larger first, of the one or two items that fill ``gap`` best.

    For the larger item of a pair, ``companions`` sizes between half the gap and the whole gap are tried, largest first,
    which keeps small items for later bins. The search ends when at most ``tolerance`` of the gap stays free.
    """
    end = bisect_right(left, gap)
    best, slack = (end - 1,), gap - left[end - 1]
    low = max(bisect_left(left, gap // 2, 0, end), 1)
    for larger in range(end - 1, low - 1, -max((end - low) // companions, 1)):
        if slack <= tolerance:
            break
        room = gap - left[larger]
        smaller = bisect_right(left, room, 0, larger) - 1
        if smaller >= 0 and room - left[smaller] < slack:
            best, slack = (larger, smaller), room - left[smaller]
    return best


def _repack(sizes: Sequence[int], capacity: int, bins: list[Bin], fewest: int) -> list[Bin]:
    """Repack bins with free space, together with half as many full bins, while that improves the packing."""
    loose_from = max(int(capacity * _LOOSE), 1)
    slack = [capacity - sum(sizes[i] for i in bin) for bin in bins]
    for turn in range(_REPACKINGS):
        if len(bins) == fewest:
            break
        full = [b for b, free in enumerate(slack) if free < loose_from]
        opened = [b for b, free in enumerate(slack) if free >= loose_from]
        # a different choice of full bins in every turn
        step = max(2 * len(full) // max(len(opened), 1), 1)
        opened += full[turn * 7 % step :: step]
        items = [i for b in opened for i in bins[b]]
        new = _fill_gaps(sizes, items, capacity, 64, capacity * 4 ** (turn % 4) // 8192)
        new_slack = [capacity - sum(sizes[i] for i in bin) for bin in new]
        # fewer bins are better; with equally many, free space collected in few bins is better
        before = (len(opened), -sum(slack[b] ** 2 for b in opened))
        if (len(new), -sum(free**2 for free in new_slack)) < before:
            kept = sorted(set(range(len(bins))) - set(opened))
            bins = [bins[b] for b in kept] + new
            slack = [slack[b] for b in kept] + new_slack
    return bins
