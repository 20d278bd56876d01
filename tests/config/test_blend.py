"""Blends: weights are exact, and what is none is one line."""

from fractions import Fraction

import pytest

from megatron_ring.config.blend import parse_blend
from megatron_ring.errors import ConfigError


def test_a_blend_is_weights_and_sources_in_order():
    assert parse_blend("data_path", ("a",), "prefix") == [(1, "a")]
    words = ("0.1", "a", "2e-1", "b")
    assert parse_blend("data_path", words, "prefix") == [(Fraction(1, 10), "a"), (Fraction(1, 5), "b")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "data_path is empty; name a prefix, or weight prefix weight prefix"),
        (("1", "a", "2"), "data_path has 3 words, but a blend is pairs; write weight prefix weight prefix"),
        (("a", "b"), "data_path weight a must be a positive number; write weight prefix weight prefix"),
        (("1/0", "b"), "data_path weight 1/0 must be a positive number; write weight prefix weight prefix"),
        (
            ("1", "a", "-2", "b"),
            "data_path weight -2 must be a positive number; write weight prefix weight prefix",
        ),
        (
            ("nan", "a", "2", "b"),
            "data_path weight nan must be a positive number; write weight prefix weight prefix",
        ),
        (
            ("1e999999999", "a"),
            "data_path weight 1e999999999 must be a positive number; write weight prefix weight prefix",
        ),
    ],
)
def test_what_is_no_blend_is_one_line(words, line):
    with pytest.raises(ConfigError) as caught:
        parse_blend("data_path", words, "prefix")
    assert str(caught.value) == line
