"""The reference policy: the run's initial weights, kept on the host and swapped in to score.

One copy of this rank's share of the weights in the model's own precision, made only if a setting needs it.
Buffers are included: an expert bias moves with training and decides routes. A resumed run makes it from the
checkpoint that the run started from, before it loads its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.build import RingModel
from megatron_ring.rl.batch.microbatch import RLMicrobatch


class Scoring(Protocol):
    """What scores with a model's weights: the engine."""

    models: list[RingModel]

    def gather_parameters(self) -> None: ...

    def score(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> list[tuple[Tensor, Tensor]]: ...


class ReferencePolicy:
    """Frozen weights beside the engine's, which are trained."""

    def __init__(self, engine: Scoring):
        """Copies the engine's weights as they are now. Collective over data-parallel ranks."""
        self.engine = engine
        engine.gather_parameters()
        self._weights = {name: _on_host(value) for name, value in _live(engine)}

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch], temperature: float = 1.0) -> list[Tensor]:
        """log p [T] of every label under the reference, per microbatch; empty except on the last stage.

        Collective over the world. Routes that the microbatches carry are the policy's: the reference chooses
        its own.
        """
        free = [replace(m, routes_LTK=None) if isinstance(m, RLMicrobatch) else m for m in microbatches]
        with self.in_place():
            return [logp_T for logp_T, _ in self.engine.score(free, temperature)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine's model has the reference's weights inside the block and its own, bit for bit, after.

        Collective over data-parallel ranks. Main parameters and optimizer state are not touched, so nothing may
        be updated inside. The policy's weights wait on the host meanwhile: twice the weights, one direction
        each, cross the bus, and the device holds one copy throughout.
        """
        self.engine.gather_parameters()
        policy = {name: _on_host(value) for name, value in _live(self.engine)}
        try:
            self._put(self._weights)
            yield
        finally:
            self._put(policy)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in _live(self.engine):
            value.copy_(weights[name], non_blocking=True)


def _live(engine: Scoring) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of this rank, by chunk and name."""
    for chunk, model in enumerate(engine.models):
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                yield f"{chunk}.{name}", value


def _on_host(value: Tensor) -> Tensor:
    """A contiguous copy. With a device it is pinned and asynchronous: only work that is queued later may read
    it.
    """
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type != "cpu")
    return copy.copy_(value.detach(), non_blocking=True)
