"""A shuffle that is computed, not stored: any element in O(1), the same on every machine and with every numpy."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np

_ROUNDS = 8
# up to this many, Python integers are faster than numpy calls
_FEW = 12
_MASK = (1 << 64) - 1
# an int, or an array of uint64: the arithmetic is the same
_Word = TypeVar("_Word", int, np.ndarray)


class Shuffle:
    """A pseudorandom permutation of ``range(size)``, keyed by integers and strings.

    A Feistel network permutes the next power of two; a result outside ``range(size)`` is permuted again until it is
    inside (cycle walking, at most 2 passes on average). Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002.

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
        self._round_keys = [int(word) for word in np.frombuffer(digest, dtype="<u8")]

    def __call__(self, index: int) -> int:
        """Element ``index`` of the permutation.

        Raises:
            IndexError: ``index`` is not in ``range(size)``; cycle walking from there might not end.
        """
        self._require(index, index)
        value = self._pass(index)
        while value >= self.size:
            value = self._pass(value)
        return value

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The permutation at each of ``indices``, as ``int64``. Raises IndexError as for a single one."""
        if len(indices) <= _FEW:
            return np.array([self(int(index)) for index in indices], dtype=np.int64)
        self._require(int(indices.min()), int(indices.max()))
        out = self._pass(indices.astype(np.uint64))
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            out[outside] = self._pass(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64)

    def _require(self, low: int, high: int) -> None:
        if low < 0 or high >= self.size:
            raise IndexError(f"index {low if low < 0 else high} is not in range({self.size})")

    def _pass(self, value: _Word) -> _Word:
        low_bits, high_bits = self._low_bits, self._high_bits
        low, high = value & ((1 << low_bits) - 1), value >> low_bits
        # the halves, which may differ in width, are swapped in each round
        for key in self._round_keys:
            low, high = high ^ (mix64(low + key) & ((1 << high_bits) - 1)), low
            low_bits, high_bits = high_bits, low_bits
        return (high << low_bits) | low


def mix64(value: _Word) -> _Word:
    """SplitMix64's output function, modulo 2**64 (Steele, Lea, Flood 2014): each output bit depends on every input bit."""
    value = value & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
