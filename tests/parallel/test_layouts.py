"""Every layout computes what one process computes: loss, every gradient, weights after three optimizer steps.

All start from one checkpoint of the single process, so this also proves that checkpoints load at every
layout. One spawn per world size runs all its layouts.
"""

from __future__ import annotations

import json

import pytest

from tests.helpers.parallel.cases import CASES, Case
from tests.helpers.parallel.collect import largest_gap, whole_tensors
from tests.helpers.parallel.spawning import layouts, several_worlds, single_process, world_runner

pytestmark = several_worlds


@pytest.fixture(scope="module")
def run_world(tmp_path_factory):
    return world_runner("tests.helpers.parallel.worker", tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("case", layouts(CASES, slow_from=4))
def test_layout_computes_what_one_process_computes(case: Case, run_world):
    folder = run_world(case.world)
    own = json.loads((folder / case.name / "summary.json").read_text())
    ref = json.loads((folder / case.model / "summary.json").read_text())
    assert own["losses"][0] == pytest.approx(ref["losses"][0], rel=1e-5)
    assert own["norms"][0] == pytest.approx(ref["norms"][0], rel=1e-5)
    for name in ("balance", "z", "violation"):
        assert own[name] == pytest.approx(ref[name], rel=1e-5, abs=1e-9), name
    if case.has_whole_gradients:
        gap, key = largest_gap(
            whole_tensors(folder / case.name, "grads"), single_process(folder, case.model, "grads")
        )
        assert gap < 1e-5, f"gradient of {key} differs by {gap:.1e}"
    gap, key = largest_gap(
        whole_tensors(folder / case.name, "weights"), single_process(folder, case.model, "weights")
    )
    assert gap < 1e-4, f"{key} differs by {gap:.1e} after three steps"
    assert own["evaluation"] == pytest.approx(ref["evaluation"], rel=1e-4)
    assert len(own["sample"]) == 3 and own["sample"] == ref["sample"]
