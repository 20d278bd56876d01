"""The equation of a step's tokens, and that a wrong one is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ring.rl.ledger import Ledger

EXAMPLE = Ledger(
    generated=12, carried_in=3, trained=10, cut=2, carried=0, wasted=3, excluded=0, stale=0, masked=0
)


def test_the_example_is_in_balance():
    assert EXAMPLE.sampled == 15
    EXAMPLE.check(1, None)
    EXAMPLE.check(1, 3)
    assert EXAMPLE.metrics()["c3po/sampled"] == 15 and EXAMPLE.metrics()["c3po/trained"] == 10


@pytest.mark.parametrize(
    "name", ["generated", "carried_in", "trained", "cut", "carried", "wasted", "excluded", "stale", "masked"]
)
def test_a_token_that_is_lost_or_counted_twice_ends_the_run(name):
    for by in (-1, 1):
        with pytest.raises(AssertionError, match=r"step 7: .* tokens sampled"):
            replace(EXAMPLE, **{name: getattr(EXAMPLE, name) + by}).check(7, None)


def test_what_one_step_leaves_the_next_one_finds():
    with pytest.raises(AssertionError, match="step 7: 4 tokens were left by the step before, 3 found"):
        EXAMPLE.check(7, 4)


def test_places_that_cancel_out_are_found_too():
    with pytest.raises(AssertionError):
        replace(EXAMPLE, cut=-1, wasted=6).check(7, None)
