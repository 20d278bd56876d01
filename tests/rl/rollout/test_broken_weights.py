"""Weights that are not finite on one rank end generation on every rank."""

from __future__ import annotations

import json
import re

from tests.helpers.parallel.spawning import several_worlds, spawn
from tests.helpers.parallel.watching import assert_ended_well
from tests.helpers.rl.broken_worker import CASES


@several_worlds
def test_every_rank_says_that_the_weights_are_broken(tmp_path):
    assert_ended_well(spawn(2, "tests.helpers.rl.broken_worker", str(tmp_path)))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 2 * len(CASES)
    for line in first.values():
        assert re.match(r"logits of \d+ sequences are not finite at policy version 7; .*lower --lr$", line)
