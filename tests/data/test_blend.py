from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.blend import FINEST, Blend
from megatron_ring.errors import DataError


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_weights_hold_within_one_sample_at_every_length(counts: list[int]):
    total = sum(counts)
    weights = [Fraction(count, total) for count in counts]
    blend = Blend(weights)
    given_by = [0] * len(counts)
    for n in range(3 * total):
        dataset, index = blend.locate(n)
        assert index == given_by[dataset], "samples of a dataset come in order, without gaps"
        given_by[dataset] += 1
        for count, weight in zip(given_by, weights, strict=True):
            assert abs(count - (n + 1) * weight) < 1


def test_docstring_example():
    blend = Blend([Fraction(3, 4), Fraction(1, 4)])
    assert [blend.locate(n)[0] for n in range(8)] == [0, 0, 0, 1] * 2
    assert blend.locate(7) == (1, 1)


def test_weights_without_a_small_denominator_are_rounded():
    weights = [Fraction("0.123456789"), Fraction("0.5"), Fraction("0.376543211")]
    blend = Blend(weights)
    given_by = [0, 0, 0]
    for n in range(FINEST):
        given_by[blend.locate(n)[0]] += 1
    assert given_by == [12346, 50000, 37654]


def test_a_weight_that_would_vanish_is_refused():
    with pytest.raises(DataError, match=r"a blend weight is 1.0e-07 of the whole"):
        Blend([Fraction(1, 10**7), 1 - Fraction(1, 10**7)])
