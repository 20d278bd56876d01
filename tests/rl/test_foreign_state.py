"""A checkpoint's trainer state and rollouts may be anybody's edit: odd values are named, not met later."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from megatron_ring.data.corpus.pretrain_stream import SampleCursor
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.rollout_io import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.train.schedule import SpikeRule
from tests.helpers.rl.rollouts import rollout

ODD = [None, "x", [], {}, -1, 1.5, 10**30, True]


@pytest.mark.parametrize("key", ["consumed_samples", "next_fresh", "num_requeued", "seed", "put_back"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_cursor_takes_counts_only(key, value):
    state = SampleCursor(seed=1).state_dict()
    if key == "put_back":
        value = [value] if not isinstance(value, list) else [[1, 2]]
    with pytest.raises((ValueError, TypeError)):
        SampleCursor(seed=1).load_state_dict({**state, key: value})


@pytest.mark.parametrize("value", [None, "x", 3, ["x"], [None], {"a": 1}], ids=repr)
def test_losses_are_numbers(value):
    with pytest.raises(ValueError, match="losses"):
        SpikeRule(factor=2.0, window=4, retry_lr_factor=0.5).load_state_dict({"losses": value})


def damaged(**entry: object) -> bytes:
    arrays = load(rollouts_to_bytes([rollout(1, 0, 3)]))
    entries = json.loads(arrays["entries"].tobytes())
    for key, value in entry.items():
        where, _, name = key.rpartition("__")
        target = entries[0]["prompt"] if where else entries[0]
        target[name] = value
    return save({**arrays, "entries": np.frombuffer(json.dumps(entries).encode(), np.uint8)})


@pytest.mark.parametrize(
    "key",
    [
        "length",
        "sample",
        "score",
        "status",
        "stop",
        "has",
        "arrival",
        "prompt__uid",
        "prompt__tokens",
        "prompt",
    ],
)
@pytest.mark.parametrize("value", [None, {}, -1, [["x"]], 10**30], ids=repr)
def test_odd_rollouts_are_one_line(key, value):
    assert len(rollouts_from_bytes(damaged())) == 1
    if key == "score" and value in (-1, 10**30):
        return
    with pytest.raises(CheckpointError, match="saved rollouts cannot be read"):
        rollouts_from_bytes(damaged(**{key: value}))


@pytest.mark.parametrize("entries", [b"null", b"3", b"[3]", b"[" * 5000, b"\xff"])
def test_entries_that_are_no_list_are_one_line(entries):
    arrays = load(rollouts_to_bytes([]))
    with pytest.raises(CheckpointError, match="saved rollouts cannot be read"):
        rollouts_from_bytes(save({**arrays, "entries": np.frombuffer(entries, np.uint8)}))
