"""One uniform number per token, from counters alone: the same whatever the batch, the slot or the layout.

``u = mix(stream + place * golden)`` with the mixing function of SplitMix64 (Steele, Lea, Flood 2014), where
``stream`` is the same mixture of seed, prompt and sample.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stream(seed: int, prompt_uid: int, sample: int) -> int:
    """The 64-bit number from which all random numbers of one response follow."""
    state = 0
    for word in (seed, prompt_uid, sample):
        state = int(_mix(np.array([(state + (word & _MASK) + _GOLDEN) & _MASK], np.uint64))[0])
    return state


def uniforms(streams_T: np.ndarray, places_T: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for the token at each place (from 0) of each stream (``uint64``)."""
    with np.errstate(over="ignore"):
        states_T = streams_T + (places_T.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    # the 53 bits that a float64 can hold
    return (_mix(states_T) >> np.uint64(11)) * 2.0**-53


def _mix(z_T: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z_T = (z_T ^ (z_T >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_T = (z_T ^ (z_T >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_T ^ (z_T >> np.uint64(31))
