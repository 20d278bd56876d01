"""What may be asked, and the random numbers that answers follow from."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RolloutError
from megatron_ring.rl.rollout.counter_rng import stream, uniforms
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, SamplingParams
from megatron_ring.rl.rollout.scheduler import Scheduler


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_response_length": 0}]
)
def test_a_value_out_of_its_range_is_named(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(RolloutError, match=f"{name}={value}"):
        SamplingParams(**{"max_response_length": 4, **bad})


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"concurrency": 0}])
def test_a_budget_of_nothing_is_refused(bad):
    name = next(iter(bad))
    with pytest.raises(RolloutError, match=f"^a rollout budget's {name}=0 must be at least 1$"):
        RolloutBudget(**{"tokens": 5, "concurrency": 2, **bad})


def test_an_empty_prompt_is_refused():
    prompt = Prompt(uid=41, domain="", text="", tokens=(), reference={})
    with pytest.raises(RolloutError, match="prompt 41 has no tokens"):
        Scheduler(
            [Request(prompt=prompt, sample=0)],
            SamplingParams(max_response_length=4),
            num_slots=1,
            version=0,
            prefill_tokens=8,
        )


def test_random_numbers_are_splitmix64():
    """Its first output for seed 0 is 0xE220A8397B1DCDAF (Vigna's reference implementation)."""
    first = uniforms(np.zeros(1, np.uint64), np.zeros(1, np.int64))[0]
    assert first == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_random_numbers_are_even_and_of_their_own():
    streams = np.array([stream(7, uid, sample) for uid in range(40) for sample in range(25)], np.uint64)
    assert len(set(streams.tolist())) == 1000
    numbers = np.stack([uniforms(streams, np.full(1000, place)) for place in range(64)])
    assert numbers.min() >= 0 and numbers.max() < 1
    shares = np.histogram(numbers, bins=16, range=(0, 1))[0] / numbers.size
    assert np.abs(shares - 1 / 16).max() < 0.004
    neighbours = np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]
    across = np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02 and abs(across) < 0.02


def test_a_stream_follows_from_seed_prompt_and_sample():
    words = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 5, 2)]
    assert len({stream(*w) for w in words}) == len(words)
    assert stream(3, 4, 5) == stream(3, 4, 5)
