"""Every layout generates the tokens, log probabilities and routes of one process, from the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.parallel.cases import Case
from tests.helpers.parallel.rollout_worker import BUDGETED, CASES, NEXT
from tests.helpers.parallel.spawning import layouts, several_worlds, world_runner

pytestmark = several_worlds


@pytest.fixture(scope="module")
def run_world(tmp_path_factory):
    return world_runner("tests.helpers.parallel.rollout_worker", tmp_path_factory.mktemp("rollouts"))


def by_data_rank(folder: Path, case: Case) -> list[dict]:
    """What each data-parallel rank answered; the ranks of its model-parallel group must agree."""
    found: dict[int, dict] = {}
    for rank in range(case.world):
        answer = json.loads((folder / f"{case.name}.{rank}.json").read_text())
        assert found.setdefault(answer["dp_rank"], answer) == answer
    return list(found.values())


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    expected = {tuple(response["key"]): response for response in theirs}
    assert sorted(tuple(response["key"]) for response in ours) == sorted(expected)
    for response in ours:
        reference = expected[tuple(response["key"])]
        assert response["tokens"] == reference["tokens"]
        assert response["stop"] == reference["stop"]
        assert response["logprobs"] == pytest.approx(reference["logprobs"], abs=2e-5)
        assert response["routes"] == reference["routes"]


@pytest.mark.parametrize("case", layouts(CASES, slow_from=4))
def test_a_layout_generates_what_one_process_does(case: Case, run_world):
    folder = run_world(case.world)
    (reference,) = by_data_rank(folder, Case(case.model, 1))
    answers = by_data_rank(folder, case)
    assert_same([r for answer in answers for r in answer["whole"]], reference["whole"])
    assert_same([r for answer in answers for r in answer["resumed"]], reference["whole"])
    assert_same([r for answer in answers for r in answer["single"]], reference["single"])


@pytest.mark.parametrize("case", layouts(CASES, slow_from=4))
def test_a_shared_budget_stops_every_layout_at_the_same_tokens(case: Case, run_world):
    folder = run_world(case.world)
    (reference,) = by_data_rank(folder, Case(case.model, 1))
    answers = by_data_rank(folder, case)
    before = 0
    for name, budget in (("parts", BUDGETED), ("later", NEXT)):
        assert_same([r for answer in answers for r in answer[name]], reference[name])
        produced = sum(len(r["tokens"]) for r in reference[name]) - before
        assert budget.tokens <= produced < budget.tokens + budget.concurrency
        stops = [r["stop"] for r in reference[name]]
        assert "unfinished" in stops and len(set(stops)) > 1
        before = sum(len(r["tokens"]) for r in reference[name] if r["stop"] == "unfinished")
