"""Ranges stand on the fields: they say what fits, are in --help, and are checked at both of their ends."""

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping, load_config
from megatron_ring.config.ranges import Above, AtLeast, AtMost, Between, ZeroOrAbove
from megatron_ring.config.settings import Setting, settings, value_problems
from megatron_ring.errors import ConfigError

NUMBERS = [s for s in settings().values() if s.kind in (int, float) or s.item in (int, float)]
FREE = {
    "context_parallel_size": "only 1 is supported, which a rule says",
}
"""Numbers without a range, and why."""


@pytest.mark.parametrize(
    ("allowed", "words", "fits", "does_not"),
    [
        (AtLeast(1), "at least 1", (1, 2.5), (0, -1)),
        (AtLeast(0, below=1), "from 0 to below 1", (0, 0.99), (-0.1, 1)),
        (Above(0), "positive", (1e-9, 3), (0, -1)),
        (Above(1), "above 1", (1.1,), (1,)),
        (Above(0, at_most=1), "above 0 and at most 1", (0.1, 1), (0, 1.1)),
        (AtMost(4), "at most 4", (4, -9), (5,)),
        (Between(0, 1), "from 0 to 1", (0, 1), (-0.1, 1.1)),
        (ZeroOrAbove(1), "0 (off) or above 1", (0, 1.1), (1, 0.5, -1)),
    ],
)
def test_a_range_holds_what_its_words_say(allowed, words, fits, does_not):
    assert allowed.words == words
    assert all(allowed.holds(value) for value in fits)
    assert not any(allowed.holds(value) for value in (*does_not, math.nan))


def test_every_number_has_a_range():
    assert {s.name for s in NUMBERS if not s.ranges} == set(FREE)


ENDS = ("least", "below", "low", "high", "at_most", "most")


def outside(setting: Setting) -> list[Any]:
    """Values just beyond each end of the setting's ranges."""
    found: list[Any] = []
    for allowed in setting.ranges:
        for end in (getattr(allowed, name, math.inf) for name in ENDS):
            steps = (end - 1, end, end + 1) if math.isfinite(end) else ()
            found += [value for value in steps if not allowed.holds(value)]
    return found


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
def test_what_is_outside_of_a_range_is_one_line_and_the_default_is_inside(setting: Setting):
    number = setting.item if setting.kind is tuple else setting.kind
    for value in outside(setting):
        wrong = number(value)
        given = (wrong,) * (setting.length or 1) if setting.kind is tuple else wrong
        with pytest.raises(ConfigError) as caught:
            validate(config_from_mapping({setting.name: given}), 1)
        line = str(caught.value)
        assert (
            line.startswith(f"{setting.name}=") and " must be " in line and "; " in line and "\n" not in line
        )
    section = getattr(load_config([]), setting.section)
    assert list(value_problems(section)) == []
    if setting.optional:
        assert list(value_problems(replace(section, **{setting.name: None}))) == []


@pytest.mark.parametrize("setting", [s for s in NUMBERS if int in (s.kind, s.item)], ids=lambda s: s.name)
def test_an_integer_that_no_float_holds_is_one_line(setting: Setting):
    huge = 10**400
    given = (huge,) * (setting.length or 1) if setting.kind is tuple else huge
    with pytest.raises(ConfigError, match=f"^{setting.name}=.* must be .*; [^\n]*$"):
        validate(config_from_mapping({setting.name: given}), 1)


def test_help_shows_ranges():
    assert settings()["lr"].help == "Highest learning rate. (positive; default: 0.0003)"
    assert settings()["stop_token_ids"].help.endswith("(at least 0; default: empty)")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--stop-token-ids 3 -1", "stop_token_ids=3 -1: -1 must be at least 0; set --stop-token-ids"),
        (
            "--rampup-batch-size 4 0 9",
            "rampup_batch_size=4 0 9: 0 must be at least 1; set --rampup-batch-size",
        ),
        ("--num-experts -1", "num_experts=-1 must be at least 0; 0 turns it off"),
        ("--rotary-percent 1.5", "rotary_percent=1.5 must be above 0 and at most 1; 1 rotates whole heads"),
        ("--adam-beta1 1", "adam_beta1=1.0 must be from 0 to below 1; try 0.9"),
        ("--lr-decay-iters 0", "lr_decay_iters=0 must be at least 1; drop it to decay over train_iters"),
        ("--seed -1", "seed=-1 must be from 0 to below 9223372036854775808; try 1234"),
        ("--temperature inf", "temperature=inf must be finite; set --temperature"),
        ("--eps-clip nan", "eps_clip=nan must be finite; set --eps-clip"),
    ],
)
def test_a_value_outside_is_one_exact_line(flags: str, line: str):
    with pytest.raises(ConfigError) as caught:
        validate(load_config(flags.split()), 1)
    assert str(caught.value) == line
