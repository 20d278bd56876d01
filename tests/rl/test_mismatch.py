"""Weights of pi_train_old / pi_rollout."""

from __future__ import annotations

import pytest
import torch

from megatron_ring.config.rl import ObjectiveConfig, mismatch_bounds
from megatron_ring.rl.mismatch import CORRECTIONS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("icepop", [0, 0.5, 1.2, 5.0, 0, 0]),
        ("tis", [0.4, 0.5, 1.2, 5.0, 5.0, 5.0]),
        ("mis", [0, 0.5, 1.2, 5.0, 0, 0]),
        ("mask", [0, 1, 1, 1, 0, 0]),
    ],
)
def test_weights_by_hand_bounds_included(name, expected):
    k_T = torch.tensor([0.4, 0.5, 1.2, 5.0, 5.01, float("inf")])
    torch.testing.assert_close(CORRECTIONS[name](k_T, 0.5, 5.0), torch.tensor(expected, dtype=torch.float32))


def test_masked_importance_sampling_keeps_the_ratio():
    k_T = torch.tensor([0.4, 1.2, 1.9, 6.0])
    config = ObjectiveConfig(mismatch_correction="mis")
    kept_T = CORRECTIONS["mis"](k_T, *mismatch_bounds(config))
    assert kept_T.tolist() == pytest.approx([0, 1.2, 1.9, 0])


def test_each_method_has_bounds_of_its_own():
    found = {
        name: mismatch_bounds(ObjectiveConfig(mismatch_correction=name))
        for name in ("icepop", "tis", "mis", "mask")
    }
    assert found == {"icepop": (0.5, 5.0), "tis": (0.0, 2.0), "mis": (0.5, 2.0), "mask": (0.5, 5.0)}
    own = ObjectiveConfig(mismatch_correction="icepop", mismatch_low=0.9, mismatch_high=1.1)
    assert mismatch_bounds(own) == (0.9, 1.1)
