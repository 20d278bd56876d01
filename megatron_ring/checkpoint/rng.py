"""Random-number states of every rank in one safetensors file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import SafetensorError
from safetensors.torch import load, save

from megatron_ring.errors import CheckpointError
from megatron_ring.plain import read_plain
from megatron_ring.runtime import device
from megatron_ring.runtime.session import Session

log = logging.getLogger("megatron_ring")

RNG_FILE = "rng.safetensors"
_MAX_BYTES = 1 << 32
"""The states of one rank take about ten kilobytes."""


def gather_rng(session: Session) -> dict[str, torch.Tensor]:
    """Every rank's generator states on rank 0 (empty elsewhere). Collective over the world."""
    tracker: Any = get_cuda_rng_tracker()
    states = {**device.rng_state(), **tracker.get_states()}
    gathered: list[dict[str, torch.Tensor]] | None = (
        [{} for _ in range(session.world_size)] if session.is_save_rank else None
    )
    torch.distributed.gather_object(states, gathered)
    if gathered is None:
        return {}
    return {
        f"{rank}.{name}": state.clone() for rank, each in enumerate(gathered) for name, state in each.items()
    }


def save_rng(states: dict[str, torch.Tensor], folder: Path) -> None:
    # not safetensors' save_file, which makes files that only their owner can read
    (folder / RNG_FILE).write_bytes(save(states))


def load_rng(folder: Path, session: Session, same_layout: bool) -> None:
    """Restore this rank's states. With another layout the initial seeds stay, with a warning.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks a state of this rank.
    """
    if not same_layout:
        if session.is_save_rank:
            log.warning("random-number states of %s belong to another layout; starting from the seed", folder)
        return
    path, remedy = folder / RNG_FILE, "use --no-load-rng or load another checkpoint"
    try:
        states = load(read_plain(path, _MAX_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {remedy}") from None
    tracker: Any = get_cuda_rng_tracker()
    named = tracker.get_states()
    own: dict[str, torch.Tensor] = {}
    for name, now in {**device.rng_state(), **named}.items():
        state = states.get(f"{session.rank}.{name}")
        if state is None or (state.dtype, state.shape) != (now.dtype, now.shape):
            raise CheckpointError(f"{path}: holds no state of {name} for rank {session.rank}; {remedy}")
        own[name] = state
    try:
        for state in own.values():
            if state.shape == torch.get_rng_state().shape:
                # Megatron's tracker does not check a state: a damaged one would fail at a later step
                torch.Generator().set_state(state)
        device.set_rng_state(own)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {remedy}") from None
    tracker.set_states({name: own[name] for name in named})
