"""A live engine's weights in Hugging Face's names and order, from whatever shard each rank holds.

Every rank cuts its shards into parts of Hugging Face tensors with :func:`hf_parts`; whoever receives the
parts of all ranks puts them together with :class:`Assembler`. No rank needs more than its own weights, and
nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.tensor_map import Box, Shape, TensorMap

_MTP = "mtp."


class Shard(NamedTuple):
    """A block of a Megatron tensor. ``shape`` is the whole tensor's, ``data`` may lack leading dimensions of
    size 1.

    Example: tensor-parallel rank 1 of 2 has ``Shard("output_layer.weight", (256, 64), (128, 0), data)`` with
    data [128, 64].
    """

    key: str
    shape: Shape
    offset: Shape
    data: Tensor


class Part(NamedTuple):
    """A block of a Hugging Face tensor; ``data`` shares memory with the shard it was cut from."""

    name: str
    box: Box
    data: Tensor


def shards_of(state: dict[str, Any]) -> Iterator[Shard]:
    """The shards in a sharded state dict such as ``checkpoint.state.model_state`` returns, replicas
    included.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    # factories split stacked weights (gate and up) into separate shards
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            assert value.data is not None, f"{value.key} was planned without data"
            yield Shard(value.key, tuple(value.global_shape), tuple(value.global_offset), value.data.detach())


def hf_parts(mapping: TensorMap, shards: Iterable[Shard]) -> Iterator[Part]:
    """Cut shards at the borders of the Hugging Face tensors they belong to; vocabulary padding is dropped.

    So are multi-token-prediction layers if ``mapping`` has none: rollout engines do not need them.
    """
    for shard in shards:
        ahead = len(shard.shape) - shard.data.dim()
        box = Box(shard.offset, (*(1 for _ in range(ahead)), *shard.data.shape))
        data = shard.data.reshape(box.shape)
        if shard.key.startswith(_MTP) and shard.key not in mapping.keys:
            continue
        for copy in mapping.into_keys[shard.key]:
            part = copy.within(box)
            if part is not None:
                block = data[part.target_box.relative_to(box).slices()].reshape(part.source_box.shape)
                yield Part(part.source, part.source_box, block)


class Assembler:
    """Assembles parts; returns each tensor as soon as it is complete, and does not keep it."""

    def __init__(self, mapping: TensorMap):
        self._shapes = mapping.names
        self._open: dict[str, tuple[Tensor, set[Box]]] = {}
        self._done: set[str] = set()

    def add(self, part: Part) -> Tensor | None:
        """The whole tensor if ``part`` was the last one missing; parts that came already (replicas) are
        ignored.
        """
        if part.name in self._done:
            return None
        if part.name not in self._open:
            empty = torch.empty(self._shapes[part.name], dtype=part.data.dtype, device=part.data.device)
            self._open[part.name] = (empty, set())
        whole, boxes = self._open[part.name]
        if part.box in boxes:
            return None
        whole[part.box.slices()].copy_(part.data)
        boxes.add(part.box)
        if sum(box.size for box in boxes) < whole.numel():
            return None
        del self._open[part.name]
        self._done.add(part.name)
        return whole

    def missing(self) -> list[str]:
        """Names of tensors that are not complete yet."""
        return [name for name in self._shapes if name not in self._done]
