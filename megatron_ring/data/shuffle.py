"""A shuffle that is computed, not stored: any element of it in O(1), the same on every machine and numpy version."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8


class Shuffle:
    """A pseudorandom permutation of ``range(size)``, keyed by whole numbers and names.

    A Feistel network permutes the next power of two; what falls outside ``size`` is sent through again until it falls
    inside (at most 2 passes on average). Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.

    Example: ``[Shuffle(4, 7, "epoch", 0)(i) for i in range(4)]`` is some order of 0, 1, 2, 3.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be positive")
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, index: int) -> int:
        """Where element ``index`` of the permutation points to."""
        return int(self.many(np.array([index]))[0])

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The permutation at each of ``indices``, as ``int64``."""
        out = self._pass(np.asarray(indices).astype(np.uint64))
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            out[outside] = self._pass(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64)

    def _pass(self, value: np.ndarray) -> np.ndarray:
        low_bits, high_bits = self._low_bits, self._high_bits
        low = value & np.uint64((1 << low_bits) - 1)
        high = value >> np.uint64(low_bits)
        # halves of unequal width trade places each round, and their widths with them
        for key in self._round_keys:
            mixed = _mix(low + key) & np.uint64((1 << high_bits) - 1)
            low, high = high ^ mixed, low
            low_bits, high_bits = high_bits, low_bits
        return (high << np.uint64(low_bits)) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
