"""The reference policy: the weights of the run's start, kept on the host and swapped in to score.

One copy of this rank's share of the weights in the model's own precision, none where nothing asks for it. On
disk it is one safetensors file per rank and layout inside a folder of its own, written once: a resumed run
starts from later weights, so the start's have to come from there. Buffers belong to it: an expert bias moves
with training and decides routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ring.data.microbatch import Microbatch
from megatron_ring.errors import CheckpointError
from megatron_ring.model.build import RingModel
from megatron_ring.rl.batch import RLMicrobatch
from megatron_ring.runtime.session import Session


class Scoring(Protocol):
    """What scores with a model's weights: the engine."""

    models: list[RingModel]
    session: Session

    def gather_parameters(self) -> None: ...

    def score(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> list[tuple[Tensor, Tensor]]: ...


class ReferencePolicy:
    """Weights that do not learn, beside an engine's that do."""

    def __init__(self, engine: Scoring):
        """Copies the engine's weights as they are now. Collective over data-parallel ranks."""
        self.engine = engine
        engine.gather_parameters()
        self._weights = {name: _on_host(value) for name, value in _live(engine)}

    @torch.no_grad()
    def score(self, microbatches: Sequence[Microbatch], temperature: float = 1.0) -> list[Tensor]:
        """log p [T] of every label under the reference, per microbatch; empty except on the last stage.

        Collective over the world. Routes that the microbatches carry are the policy's: the reference is a
        policy of its own and routes by itself.
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
            value.copy_(weights[name])

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's copy."""
        return sum(value.numel() * value.element_size() for value in self._weights.values())

    def save(self, folder: Path) -> None:
        """Write this rank's copy into ``folder``; every rank of the world calls it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        path = self._file(folder)
        working = path.with_suffix(".working")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self._weights, working)
            working.replace(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: the reference policy cannot be written ({error}); free some disk, or set "
                "--kl-loss-coef 0"
            ) from error

    def load(self, folder: Path) -> None:
        """Take the weights that :meth:`save` wrote at the same layout.

        Raises:
            CheckpointError: there are none for this layout, or they are another model's.
        """
        path = self._file(folder)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no reference policy for this layout; resume with the layout that the run started "
                "with, or set --kl-loss-coef 0"
            )
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); restore it, or start the run anew"
            ) from error
        mine = {name: (value.shape, value.dtype) for name, value in self._weights.items()}
        if {name: (value.shape, value.dtype) for name, value in weights.items()} != mine:
            raise CheckpointError(
                f"{path}: the reference policy of another model; name this run's own folder"
            )
        self._weights = weights

    def _file(self, folder: Path) -> Path:
        session = self.engine.session
        t = session.topology
        layout = f"tp{t.tp_size}-pp{t.pp_size}-vpp{t.vpp_size}-ep{t.ep_size}-etp{t.etp_size}"
        return folder / f"{layout}-rank{session.rank}-of-{session.world_size}.safetensors"


def _live(engine: Scoring) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of this rank, by chunk and name."""
    for chunk, model in enumerate(engine.models):
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                yield f"{chunk}.{name}", value


def _on_host(value: Tensor) -> Tensor:
    """A contiguous copy, pinned where there is a device to copy back to."""
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type != "cpu")
    return copy.copy_(value.detach())
