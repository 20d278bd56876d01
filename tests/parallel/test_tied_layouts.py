"""Tied embeddings stay one weight where a pipeline has a copy of it, in fp32 and in bf16: both copies begin and end equal
bit for bit, the gradient norm counts the weight once, and a checkpoint resumes where there is no copy.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.spawning import several_worlds, spawn
from tests.helpers.parallel.tied_worker import CASES, WORLD, name_of
from tests.helpers.parallel.watching import assert_ended_well

pytestmark = [several_worlds, pytest.mark.slow]
RELATIVE = {False: 1e-5, True: 2e-2}
"""How near two layouts are, by bf16."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tied")
    assert_ended_well(spawn(WORLD, "tests.helpers.parallel.tied_worker", str(WORLD), str(folder)))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_copies_are_one_weight(case: Case, bf16: bool, results: dict[str, Any]):
    found, whole = results[name_of(case, bf16)], results[name_of(Case(case.model, 1), bf16)]
    assert found["starts_equal"] and found["ends_equal"]
    for (loss, norm), (its_loss, its_norm) in zip(found["steps"], whole, strict=True):
        assert loss == pytest.approx(its_loss, rel=RELATIVE[bf16])
        assert norm == pytest.approx(its_norm, rel=RELATIVE[bf16])
    assert found["steps"][-1][0] < 0.99 * found["steps"][0][0], "nothing was learnt"
    ((loss, norm),), ((its_loss, its_norm),) = found["next"], found["resumed"]
    assert its_loss == pytest.approx(loss, rel=RELATIVE[bf16])
    assert its_norm == pytest.approx(norm, rel=RELATIVE[bf16])
