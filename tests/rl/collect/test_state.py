"""What waits for a later step goes on at any number of ranks, and a part that is missing is one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from megatron_ring.errors import CheckpointError
from megatron_ring.rl.collect.state import RolloutState
from megatron_ring.rl.types import Rollout
from tests.helpers.rl.collecting import Stream, session
from tests.helpers.rl.rollouts import rollout


def filled(rank: int, ranks: int) -> RolloutState:
    """One rank's carried responses to prompts 0 to 5."""
    state = RolloutState(Stream(), group_size=3)
    topology = session(ranks, rank).topology
    state.carried = [
        replace(rollout(uid, 0, 6 + uid), start=uid % 3, carried=uid)
        for uid in range(6)
        if topology.owns(uid)
    ]
    state.steps_without_signal, state.tokens_left = 2, 57
    return state


def told(carried: list[Rollout]) -> list:
    return sorted((r.response.key, r.response.tokens_R.tolist(), r.start, r.carried) for r in carried)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_every_carried_response_goes_on_on_the_rank_that_owns_it(before, after):
    saved = [filled(rank, before) for rank in range(before)]
    files = {name: data for rank, state in enumerate(saved) for name, data in state.files(rank).items()}
    resumed = []
    for rank in range(after):
        state, topology = RolloutState(Stream(), group_size=3), session(after, rank).topology
        state.load_state_dict(saved[0].state_dict(before), files.__getitem__, topology)
        assert all(topology.owns(r.prompt.uid) for r in state.carried)
        assert (state.steps_without_signal, state.tokens_left) == (2, 57)
        resumed += state.carried
    assert told(resumed) == told([rollout for state in saved for rollout in state.carried])


def test_a_checkpoint_that_keeps_places_beside_the_rollouts_is_read():
    """Written before a rollout knew where it goes on."""
    state = filled(0, 1)
    files = state.files(0)
    arrays = load(files["rollouts-carried-0.safetensors"])
    entries = json.loads(arrays["entries"].tobytes())
    places = [[entry.pop("start"), entry.pop("carried")] for entry in entries]
    assert places[5] == [2, 5]
    for name, value in (("entries", entries), ("note", places)):
        arrays[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    old = files | {"rollouts-carried-0.safetensors": save(arrays)}
    resumed = RolloutState(Stream(), group_size=3)
    resumed.load_state_dict(state.state_dict(1), old.__getitem__, session().topology)
    assert told(resumed.carried) == told(state.carried)


def test_a_state_that_lacks_a_part_is_refused():
    state, files = filled(0, 1), filled(0, 1).files(0)
    for name in ("prompts", "steps_without_signal", "tokens_left", "ranks"):
        lacking = {key: value for key, value in state.state_dict(1).items() if key != name}
        with pytest.raises(KeyError, match=name):
            RolloutState(Stream(), 3).load_state_dict(lacking, files.__getitem__, session().topology)
    for odd in (-1, "2", None, 1.5):
        with pytest.raises(ValueError, match="ranks"):
            RolloutState(Stream(), 3).load_state_dict(
                state.state_dict(1) | {"ranks": odd}, files.__getitem__, session().topology
            )
    for name in files:
        damaged = files | {name: files[name][:-4]}
        with pytest.raises(CheckpointError, match=f"^{name}: saved rollouts cannot be read"):
            RolloutState(Stream(), 3).load_state_dict(
                state.state_dict(1), damaged.__getitem__, session().topology
            )


def test_log_p_that_no_engine_knew_is_refused_where_a_setting_needs_it():
    state = filled(0, 1)
    state.require_logprobs("old_logprobs=rollout")
    response = state.carried[2].response
    unknown = replace(response, logprobs_R=np.full(response.length, np.nan))
    state.carried[2] = replace(state.carried[2], response=unknown)
    with pytest.raises(CheckpointError, match=r"^old_logprobs=rollout needs log p of every token, and"):
        state.require_logprobs("old_logprobs=rollout")
