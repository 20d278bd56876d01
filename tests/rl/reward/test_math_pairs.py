"""Pairs of a reference and an answer, right and wrong, each with the reason: one verdict for every pair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.rl.reward.mathematics.text import Unreadable, plain
from megatron_ring.rl.reward.mathematics.verifier import check_reference, verify_math
from tests.helpers.reward.judging import problem

PAIRS = [
    json.loads(line) for line in Path(__file__).with_name("math_pairs.jsonl").read_text("utf-8").splitlines()
]


def _score(reference: str, answer: str) -> float:
    return verify_math(problem("math", answer=reference), rf"Thus \boxed{{{answer}}}.").score


def test_the_table_has_right_and_wrong_pairs_enough():
    counts = Counter(pair["right"] for pair in PAIRS)
    assert counts[True] > 200
    assert counts[False] > 100
    assert all(pair["why"] for pair in PAIRS)


def test_every_pair_has_its_verdict():
    differing = [p for p in PAIRS if _score(p["reference"], p["answer"]) != float(p["right"])]
    assert not differing, "\n".join(map(str, differing))


def test_every_reference_of_a_pair_can_be_judged():
    refused = {p["reference"]: check_reference(p["reference"]) for p in PAIRS}
    assert not {reference: why for reference, why in refused.items() if why}


def test_every_readable_answer_is_equal_to_itself_written_otherwise():
    for pair in PAIRS:
        if check_reference(pair["reference"]) is None:
            for answer in (f" {pair['reference']} ", f"${pair['reference']}$"):
                assert _score(pair["reference"], answer) == 1.0, answer


ALPHABET = [*"0123456789xyzei+-*/^_=<>(){}[]|,.;:!%$'\" ~&", "\\", *"½√²₁π×·−≤∞∪°５。，…∅甲é\u200b\u2009"]
ALPHABET += [
    r"\frac",
    r"\left",
    r"\right",
    r"\text{",
    r"\boxed{",
    r"\,",
    r"\!",
    r"\(",
    r"\)",
    r"\\",
    r"\sqrt",
    "...",
    "**",
]


@given(st.lists(st.sampled_from(ALPHABET), max_size=24).map("".join))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_normalising_twice_is_normalising_once(text: str):
    try:
        once = plain(text)
    except Unreadable:
        return
    assert plain(once) == once


@given(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=24).map("".join))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_every_text_has_a_verdict_and_nothing_is_raised(text: str):
    result = verify_math(problem("math", answer=r"\sqrt{2}x"), rf"\boxed{{{text}}}")
    assert result.status in ("correct", "wrong", "parse_error")


@given(st.fractions(), st.fractions())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_fractions_are_equal_exactly_when_their_numbers_are(a, b):
    for one, other in ((a, b), (a, a), (a, a + (b - b.numerator) / 10**40)):
        written = rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
        assert _score(f"{one.numerator}/{one.denominator}", written) == float(one == other)


@pytest.mark.parametrize("exponent", [1, 17, 18, 60, 300, 4000])
def test_values_are_told_apart_at_every_size(exponent: int):
    for sign in ("", "-"):
        tiny, other = rf"3\times 10^{{{sign}{exponent}}}", rf"3.000001\times 10^{{{sign}{exponent}}}"
        assert _score(tiny, other) == 0.0
        assert _score(tiny, rf"30\times 10^{{{sign}{exponent}-1}}") == 1.0
    assert _score(r"\sqrt{2}", rf"\sqrt{{2}}+10^{{-{min(exponent, 450)}}}") == 0.0
