"""Two processes tell each other things, and each rollout arrives where it is to be trained on, bit for bit."""

from __future__ import annotations

import json

import pytest

from tests.helpers.parallel.spawning import several_worlds, spawn
from tests.helpers.parallel.watching import assert_ended_well
from tests.helpers.rl.exchange_cases import as_json, parcel, words

pytestmark = several_worlds


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("exchange")
    assert_ended_well(spawn(2, "tests.helpers.rl.exchange_worker", str(folder)))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_everyone_hears_everyone_in_the_order_of_ranks(found):
    for heard in found:
        assert heard["gathered"] == [words(0), words(1)]
        assert heard["nothing"] == [None, None]


def test_one_speaks_for_all(found):
    for heard in found:
        assert heard["first"] == words(0) and heard["last"] == words(1)


def test_rollouts_arrive_where_they_were_sent(found):
    for rank, heard in enumerate(found):
        for source in range(2):
            assert heard["rollouts"][source] == [as_json(rollout) for rollout in parcel(source, rank)]
        assert heard["empty"] == [0, 0]
    assert found[0]["routes"] == [2] and found[1]["routes"] == []


def test_one_rank_speaks_to_an_engine_and_the_others_hear_the_same(found):
    first, second = (heard["relayed"] for heard in found)
    assert first == second and {row[-1] for row in first} == {"eos", "unfinished"}
    assert all(version == 4 for row in first for version in row[4])
    assert {heard["relayed_error"] for heard in found} == {"the server went away; start it again"}


def test_an_engine_that_gives_the_ranks_of_a_group_different_responses_is_refused(found):
    first, second = (heard["checked"] for heard in found)
    assert first == second, "every rank ends"
    assert first.pop("nothing") == "6"
    line = "rollout_engine=own:Spoilt gave other responses, or another order, on other ranks of one model-parallel group; "
    assert len(first) == 3 and all(said.startswith(line) for said in first.values())
