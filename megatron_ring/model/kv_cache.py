"""The KV cache of generation, and how one forward pass writes and reads it.

Legend: S slots (sequences that are decoded at the same time), L positions, T tokens of a pass, G key/value heads
of this tensor rank, C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_MULTIPLE = 64
"""The number of positions is a multiple of this."""


class KvCache:
    """Keys and values [S + 1, L, G, C] of every layer of this rank; it grows when more slots or positions are needed.

    Padding tokens write to the last row, which no other token reads.

    Example: ``KvCache({1: (2, 32), 2: (2, 32)}, torch.float32, torch.device("cpu"))`` for two layers with 2
    heads of 32 channels.
    """

    def __init__(self, layers: Mapping[int, tuple[int, int]], dtype: torch.dtype, device: torch.device):
        self.num_slots = 0
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.rotary_2LR: Tensor | None = None
        for layer, (heads, channels) in layers.items():
            self.keys[layer] = torch.empty(1, 0, heads, channels, dtype=dtype, device=device)
            self.values[layer] = torch.empty(1, 0, heads, channels, dtype=dtype, device=device)

    @property
    def scratch(self) -> int:
        """The row that padding writes to."""
        return self.num_slots

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for ``num_slots`` slots of ``length`` positions; cached values are kept."""
        if num_slots <= self.num_slots and length <= self.length:
            return
        if length > self.length:
            # at least a third more than before, so that growing token by token copies each value only a few times
            length = max(length, self.length + self.length // 3)
            length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        num_slots, length = max(num_slots, self.num_slots), max(length, self.length)
        for store in (self.keys, self.values):
            for layer, old in store.items():
                # zeros, since attention multiplies values past a sequence's end by a weight of 0
                new = old.new_zeros(num_slots + 1, length, *old.shape[2:])
                new[: self.num_slots, : self.length] = old[: self.num_slots]
                store[layer] = new
        self.num_slots, self.length = num_slots, length

    def release(self) -> None:
        """Free the memory."""
        for store in (self.keys, self.values):
            for layer, old in store.items():
                store[layer] = old.new_empty(1, 0, *old.shape[2:])
        self.num_slots = self.length = 0
        self.rotary_2LR = None

    def rotary(self, positions_T: Tensor, table: Callable[[Tensor], Tensor]) -> Tensor:
        """``table(positions_T)`` [2, T, R/2], from a table of all positions that is computed once."""
        if self.rotary_2LR is None or self.rotary_2LR.shape[1] < self.length:
            self.rotary_2LR = table(torch.arange(self.length, device=positions_T.device))
        return self.rotary_2LR[:, positions_T]


@dataclass(kw_only=True)
class CacheView:
    """Where one pass writes in the cache, and whether it attends over the cache (``decoding``) or its own segments.

    ``slots_T`` and ``positions_T`` (int64) are every token's slot and position. ``rows_R``, if given, are the indices of
    the tokens whose logits are needed.

    Example, one step of three sequences that are 4, 9 and 7 tokens long: ``CacheView(cache=cache,
    slots_T=tensor([0, 1, 5]), positions_T=tensor([4, 9, 7]), decoding=True)``.
    """

    cache: KvCache
    slots_T: Tensor
    positions_T: Tensor
    decoding: bool
    rows_R: Tensor | None = None

    def write(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Store the keys and values of ``layer`` for the tokens of this pass."""
        flat_T = self.slots_T * self.cache.length + self.positions_T
        for store, x_TGC in ((self.cache.keys, k_TGC), (self.cache.values, v_TGC)):
            store[layer].flatten(0, 1).index_copy_(0, flat_T, x_TGC)


def cache_shape(layers: Sequence) -> dict[int, tuple[int, int]]:
    """Layer number -> key/value heads and channels, of Megatron's transformer ``layers``."""
    return {
        layer.layer_number: (
            layer.self_attention.num_query_groups_per_partition,
            layer.self_attention.hidden_size_per_attention_head,
        )
        for layer in layers
    }
