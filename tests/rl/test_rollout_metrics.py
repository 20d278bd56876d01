"""Means of a step by hand, and ranks that lack what others have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ring.rl.rollout_metrics import add_up, rollout_metrics, rollout_sums
from tests.helpers.rl.collecting import Alone
from tests.helpers.rl.rollouts import rollout


def test_means_by_hand():
    right, wrong, empty = rollout(0, 1, 10), rollout(0, 2, 20), rollout(1, 0, 0)
    wrong = replace(wrong, response=replace(wrong.response, stop="length"))
    found = rollout_metrics(rollout_sums([right, wrong, empty]))
    assert found == pytest.approx(
        {
            "reward": 1 / 3,
            "reward_std": (2 / 9) ** 0.5,
            "response_length": 10.0,
            "response_length_std": (500 / 3 - 100) ** 0.5,
            "cut_share": 1 / 3,
            "empty_share": 1 / 3,
            "status/correct": 1 / 3,
            "status/wrong": 2 / 3,
        }
    )


def test_several_domains_are_told_apart_whatever_their_names():
    other = rollout(1, 1, 4)
    other = replace(other, prompt=replace(other.prompt, domain="gym/chess"))
    found = rollout_metrics(rollout_sums([rollout(0, 2, 3), rollout(0, 1, 3), other]))
    assert found["reward/math"] == 0.5 and found["reward/gym/chess"] == 1.0


def test_nothing_sampled_gives_no_means():
    assert rollout_metrics(rollout_sums([])) == {}
    assert add_up({"a": 1.0}, Alone(), torch.device("cpu")) == {"a": 1.0}
