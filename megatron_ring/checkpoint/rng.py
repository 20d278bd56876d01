"""Random-number states of every rank in one safetensors file."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_ring.errors import CheckpointError
from megatron_ring.runtime import device
from megatron_ring.runtime.session import Session

log = logging.getLogger("megatron_ring")

RNG_FILE = "rng.safetensors"


def gather_rng(session: Session) -> dict[str, torch.Tensor]:
    """Every rank's generator states on rank 0 (empty elsewhere). Collective over the world."""
    states = {**device.rng_state(), **get_cuda_rng_tracker().get_states()}
    gathered: list[dict[str, torch.Tensor] | None] | None = (
        [None] * session.world_size if session.is_main else None
    )
    torch.distributed.gather_object(states, gathered)
    if gathered is None:
        return {}
    return {
        f"{rank}.{name}": state.clone() for rank, each in enumerate(gathered) for name, state in each.items()
    }


def save_rng(states: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(states, folder / RNG_FILE)


def load_rng(folder: Path, session: Session, same_layout: bool) -> None:
    """Restore this rank's states; another layout keeps its fresh seeds and says so."""
    if not same_layout:
        if session.is_main:
            log.warning("random-number states of %s belong to another layout; starting from the seed", folder)
        return
    try:
        states = load_file(folder / RNG_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / RNG_FILE}: cannot be read ({error}); use --no-load-rng or load another checkpoint"
        ) from None
    own = {
        name.split(".", 1)[1]: s for name, s in states.items() if name.split(".", 1)[0] == str(session.rank)
    }
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: own[name] for name in tracker.get_states()})
    device.set_rng_state(own)
