"""One uniform number per token, from counters alone: the same whatever the batch, the slot or the layout.

``u = mix(stream + place * golden)`` with the mixing function of SplitMix64 (Steele, Lea, Flood 2014), where
``stream`` is the same mixture of seed, prompt and sample.
"""

from __future__ import annotations

import numpy as np

from megatron_ring.data.shuffle import mix64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stream(seed: int, prompt_uid: int, sample: int) -> int:
    """The 64-bit number from which all random numbers of one response follow."""
    state = 0
    for word in (seed, prompt_uid, sample):
        state = mix64(state + (word & _MASK) + _GOLDEN)
    return state


def uniforms(streams_T: np.ndarray, places_T: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for the token at each place (from 0) of each stream (``uint64``)."""
    with np.errstate(over="ignore"):
        states_T = streams_T + (places_T.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    # the 53 bits that a float64 can hold
    return (mix64(states_T) >> np.uint64(11)) * 2.0**-53
