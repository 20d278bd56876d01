"""Weights of pi_train_old / pi_rollout."""

from __future__ import annotations

import pytest
import torch

from megatron_ring.rl.mismatch import CORRECTIONS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("icepop", [0, 0.5, 1.2, 5.0, 0, 0]),
        ("tis", [0.4, 0.5, 1.2, 5.0, 5.0, 5.0]),
        ("mis", [0, 1, 1, 1, 0, 0]),
    ],
)
def test_weights_by_hand_bounds_included(name, expected):
    k_T = torch.tensor([0.4, 0.5, 1.2, 5.0, 5.01, float("inf")])
    torch.testing.assert_close(CORRECTIONS[name](k_T, 0.5, 5.0), torch.tensor(expected, dtype=torch.float32))
