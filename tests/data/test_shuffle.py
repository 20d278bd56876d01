from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.shuffle import Shuffle


@given(size=st.integers(1, 400), key=st.integers())
def test_it_is_a_permutation(size: int, key: int):
    assert sorted(Shuffle(size, key)(i) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2**45), key=st.integers(), data=st.data())
def test_an_array_is_shuffled_as_its_elements(size: int, key: int, data: st.DataObject):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=20, max_size=30))
    shuffle = Shuffle(size, key)
    assert shuffle.many(np.array(indices)).tolist() == [shuffle(index) for index in indices]


def test_the_order_is_pinned_for_ever():
    # a resumed run reads what it has not read yet only as long as this holds
    assert [Shuffle(10, 7, "epoch", 0)(i) for i in range(10)] == [1, 8, 4, 6, 9, 7, 3, 5, 2, 0]
    assert Shuffle(10**12, 7)(123456789) == 105446804289


def test_every_element_lands_everywhere_alike():
    counts = Counter((place, Shuffle(5, key)(place)) for key in range(2000) for place in range(5))
    # binomial: mean 400, standard deviation 18
    assert len(counts) == 25 and all(abs(count - 400) < 90 for count in counts.values())


def test_keys_differ_where_their_texts_run_together():
    orders = [[Shuffle(64, *key)(i) for i in range(64)] for key in [(1, 23), (12, 3), (1, "23"), (123,)]]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("index", [-1, 5, 8, 2**70])
def test_an_index_out_of_range_is_an_error_not_a_hang(index: int):
    with pytest.raises(IndexError, match=r"is not in range\(5\)"):
        Shuffle(5, 1)(index)
    if index < 2**63:
        with pytest.raises(IndexError, match=r"is not in range\(5\)"):
            Shuffle(5, 1).many(np.array([0] * 20 + [index]))


def test_nothing_cannot_be_shuffled():
    with pytest.raises(ValueError, match="size=0"):
        Shuffle(0)
