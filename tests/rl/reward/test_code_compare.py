"""Outputs and values are equal where people say so, and never where a number is merely small."""

from __future__ import annotations

import pytest

from megatron_ring.rl.reward.code.compare import read_json, same_output, same_value, write_json

LONG = "1" + "0" * 5000


@pytest.mark.parametrize(
    ("output", "expected", "equal"),
    [
        ("1 2\n", "1 2", True),
        ("1  2 \n\n", "1 2\n", True),
        ("1 2\r\n3\r\n", "1 2\n3", True),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("", "0", False),
        ("0.33333331", "0.33333333", True),
        ("0.333", "0.3333", False),
        ("0.333333", "0.333333333333", True),
        ("0.083333", "0.0833333333", True),
        ("0.08333", "0.0833333333", False),
        ("0.000012", "0.0000123", False),
        ("0.00000004", "0.000000", True),
        ("0.0000006", "0.000000", False),
        ("1e-17", "0.0", True),
        ("1e-8", "0.0", False),
        ("-0.0", "0.0", True),
        ("-0", "0.0", True),
        # 0 is equal to 0 alone
        ("0", "1.0e-9", False),
        ("0.0", "1.0e-9", False),
        ("0.000000", "1.0e-9", False),
        ("0.000000", "0.000001", False),
        ("0", "0.0000001", False),
        ("0", "1e-300", False),
        ("2e-300", "1e-300", False),
        # one of them without a point
        ("3", "3.0", True),
        ("3.0", "3", True),
        ("3.", "3", True),
        ("4", "3", False),
        ("4.0", "3", False),
        ("3.0000001", "3", False),
        ("0.00001", "1e-05", True),
        ("1E5", "100000.0", True),
        # whole numbers are exact
        ("12345679", "12345678.0", False),
        ("12345679.0", "12345678.0", False),
        ("100000000000000000001", "100000000000000000000", False),
        ("1.0000000000000001e+20", "1e+20", True),
        (LONG + "1", LONG + "1", True),
        (LONG + "1", LONG + "2", False),
        (LONG + ".0", LONG, True),
        (LONG + "1.0", LONG + "2", False),
        ("1e99999", "1.5", False),
        ("1e9999", "1.5e9999", False),
        # words
        ("007", "7", False),
        ("+7", "7", False),
        ("nan", "1.0", False),
        ("nan", "nan", True),
        ("inf", "inf", True),
        ("inf", "1.5", False),
        ("yes", "YES", False),
        ("yes", "1.0", False),
        ("1_0", "10.0", False),
        ("\u0663", "3.0", False),
        ("1.5.2", "1.5", False),
    ],
)
def test_outputs_are_compared_word_by_word(output: str, expected: str, equal: bool):
    assert same_output(output, expected) is equal


@pytest.mark.parametrize(
    ("value", "expected", "equal"),
    [
        ([1, {"a": [0.30000000000000004]}], [1, {"a": [0.3]}], True),
        ((1, 2), [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({1: "a"}, {"1": "a"}, True),
        ("1", 1, False),
        (None, [], False),
        (None, None, True),
        (0, None, False),
        (True, 1, False),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ([True], [1], False),
        (True, 1.0, False),
        (3.0, 3, True),
        (3, 3.0, True),
        (3.0000001, 3, False),
        (0, 1e-9, False),
        (0.0, 1e-300, False),
        (1e-17, 0.0, True),
        (0.1 + 0.2, 0.3, True),
        (float("nan"), float("nan"), True),
        (float("inf"), float("inf"), True),
        (float("inf"), 1.5, False),
        (12345679.0, 12345678.0, False),
    ],
)
def test_values_are_compared_deeply(value: object, expected: object, equal: bool):
    assert same_value(value, expected) is equal


def test_json_holds_integers_of_any_length():
    value = {"a": [10**5000 + 1, -(10**6000), 1.5, "x", None, True]}
    assert same_value(read_json(write_json(value)), value)
    assert not same_value(read_json(write_json([10**5000])), [10**5000 + 1])
