"""A C3PO step is the same at every layout and packing: loss, metrics, every gradient, with and without replay;
so are a critic's step and its values, and the reference policy leaves no trace.

One spawn per world size runs all its layouts, as in ``test_layouts``.
"""

from __future__ import annotations

import json

import pytest

from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.collect import largest_gap, whole_tensors
from tests.helpers.parallel.policy_worker import CASES
from tests.helpers.parallel.spawning import layouts, several_worlds, single_process, world_runner

pytestmark = several_worlds


@pytest.fixture(scope="module")
def run_world(tmp_path_factory):
    return world_runner("tests.helpers.parallel.policy_worker", tmp_path_factory.mktemp("rl-parity"))


@pytest.mark.parametrize("case", layouts(CASES, slow_from=4))
def test_a_policy_step_is_the_same_at_every_layout(case: Case, run_world):
    folder = run_world(case.world)
    own = json.loads((folder / case.name / "summary.json").read_text())
    ref = json.loads((folder / case.model / "summary.json").read_text())
    assert ref["replayed"]["flips0"] > 0.2 and ref["replayed"]["missing"] > 0
    for kind in ("plain", "replayed"):
        assert own[kind] == pytest.approx(ref[kind], rel=2e-5, abs=1e-7), kind
        gap, key = largest_gap(
            whole_tensors(folder / case.name, kind), single_process(folder, case.model, kind)
        )
        assert gap < 1e-5, f"{kind}: gradient of {key} differs by {gap:.1e}"
    assert own["critic"] == pytest.approx(ref["critic"], rel=2e-5)
    gap, key = largest_gap(
        whole_tensors(folder / case.name, "critic"), single_process(folder, case.model, "critic")
    )
    assert gap < 1e-5, f"critic: gradient of {key} differs by {gap:.1e}"
    assert own["reference_leaves_no_trace"] == 1
    assert own["own_flips"] == 0, "every stage and tensor rank replays what it recorded"
    assert own["own"] == {name: own["plain"][name] for name in ("loss", "grad_norm")}
