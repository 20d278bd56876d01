"""The invariants of ``megatron_ring.data.batch.bins``, each on random sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.batch.bins import best_fit, best_fit_decreasing, fill_bins
from megatron_ring.data.conversations import MAX_OPEN

CAPACITY = 100
SIZES = st.one_of(
    st.lists(st.integers(1, CAPACITY), max_size=60),
    # sizes around a half and a third, where best-fit-decreasing is at its worst
    st.lists(st.sampled_from([20, 26, 33, 34, 40, 49, 50, 51, 67]), max_size=60),
)


@given(sizes=SIZES)
def test_every_item_lies_in_exactly_one_bin(sizes: list[int]):
    assert sorted(i for bin in fill_bins(sizes, CAPACITY) for i in bin) == list(range(len(sizes)))


@given(sizes=SIZES)
def test_no_bin_holds_more_than_its_capacity_or_nothing(sizes: list[int]):
    assert all(0 < sum(sizes[i] for i in bin) <= CAPACITY for bin in fill_bins(sizes, CAPACITY))


@given(sizes=SIZES)
def test_there_are_never_more_bins_than_best_fit_decreasing_needs(sizes: list[int]):
    found, simple = len(fill_bins(sizes, CAPACITY)), len(best_fit_decreasing(sizes, CAPACITY))
    assert -(-sum(sizes) // CAPACITY) <= found <= simple


@given(sizes=SIZES)
def test_best_fit_decreasing_chooses_the_fullest_bin_with_room(sizes: list[int]):
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        free = [CAPACITY - sum(sizes[i] for i in bin) for bin in bins]
        room = [(space, b) for b, space in enumerate(free) if space >= sizes[item]]
        if room:
            bins[min(room)[1]].append(item)
        else:
            bins.append([item])
    assert best_fit_decreasing(sizes, CAPACITY) == bins


def test_gaps_are_filled_by_pairs_where_single_items_leave_space():
    # best-fit-decreasing pairs 40 with 40 and needs a fourth bin
    sizes = [40, 40, 40, 30, 30, 30, 30, 30, 30]
    assert len(best_fit_decreasing(sizes, 100)) == 4 and len(fill_bins(sizes, 100)) == 3


def test_bins_are_full_to_99_6_percent_at_the_papers_scale():
    rng = np.random.default_rng(5)
    responses = np.exp(rng.normal(np.log(12_800) - 0.45**2 / 2, 0.45, 8192)).astype(int).clip(1, 24_576)
    sizes = (responses + rng.integers(80, 401, 8192)).tolist()
    bins = fill_bins(sizes, 32_768)
    assert sum(sizes) / (len(bins) * 32_768) >= 0.996
    assert len(bins) < len(best_fit_decreasing(sizes, 32_768))


@pytest.mark.parametrize("sizes", [[101], [0], [5, -1]])
def test_impossible_sizes_are_refused(sizes: list[int]):
    with pytest.raises(ValueError, match="item sizes must be 1 to 100"):
        fill_bins(sizes, 100)


def test_nothing_needs_no_bins():
    assert fill_bins([], 100) == []


def test_best_fits_docstring_example():
    assert best_fit([3, 4, 2, 1], 5, order=[0, 1, 2, 3]) == [[0, 2], [1, 3]]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_one_open_bin_is_next_fit_in_the_given_order(sizes: list[int]):
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        if not bins or sum(sizes[i] for i in bins[-1]) + size > 20:
            bins.append([])
        bins[-1].append(item)
    assert best_fit(sizes, 20, range(len(sizes)), max_open=1) == bins


@given(st.lists(st.integers(1, 20), min_size=1, max_size=300), st.randoms())
def test_every_conversation_has_one_place_and_no_microbatch_overflows(slots: list[int], chance):
    order = list(range(len(slots)))
    chance.shuffle(order)
    groups = best_fit(slots, 20, order, MAX_OPEN)
    assert sorted(index for group in groups for index in group) == list(range(len(slots)))
    assert all(0 < sum(slots[i] for i in group) <= 20 for group in groups)


def test_packing_is_dense_also_when_many_microbatches_are_open():
    chance = np.random.default_rng(1)
    slots = chance.integers(30, 100, 5000).tolist()
    groups = best_fit(slots, 128, range(5000), MAX_OPEN)
    assert len(groups) > 10 * MAX_OPEN
    assert sum(slots) / (128 * len(groups)) > 0.9
    short = best_fit([40] * 5000, 4096, range(5000), MAX_OPEN)
    assert len(short) == -(-5000 // (4096 // 40))
