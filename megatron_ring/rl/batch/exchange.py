"""Move rollouts to the rank that trains on them. Tensor and pipeline ranks of one data-parallel
rank hold the same rollouts, so each exchanges with its peers in the data-parallel group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_ring.rl.rollout_io import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.rl.types import Rollout, RolloutMeta
from megatron_ring.runtime.collectives import to_tensor


def exchange_rollouts(
    own: Sequence[Rollout],
    metas: Sequence[RolloutMeta],
    wanted: Sequence[Sequence[int]],
    rank: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[int, Rollout]:
    """Collective over ``group``: the rollouts that this rank trains on, by their index in ``metas``.

    Args:
        own: this rank's rollouts; the ``local_index`` of its metas points into them.
        wanted: per rank, the indices that it trains on; the same on every rank.
    """
    parcels = [
        [_for_training(own[metas[index].local_index]) for index in of_rank if metas[index].rank == rank]
        for of_rank in wanted
    ]
    found: dict[int, Rollout] = {}
    for source, rollouts in enumerate(send_rollouts(parcels, group, device)):
        # every sender goes through the same list in the same order
        indices = [index for index in wanted[rank] if metas[index].rank == source]
        found.update(zip(indices, rollouts, strict=True))
    return found


def _for_training(rollout: Rollout) -> Rollout:
    """The rollout without what only verifiers need: a code problem's tests can be larger than its responses."""
    return replace(rollout, prompt=replace(rollout.prompt, text="", reference={}))


def send_rollouts(
    rollouts_of: Sequence[Sequence[Rollout]], group: dist.ProcessGroup, device: torch.device
) -> list[list[Rollout]]:
    """Collective over ``group``: ``rollouts_of[r]`` goes to rank r; returns what came from each rank.

    Moves only what is asked for: 16 bytes a token plus the prompt, and routes if they were recorded.
    """
    if group.size() == 1:
        return [list(rollouts_of[0])]
    parcels = [rollouts_to_bytes(rollouts) for rollouts in rollouts_of]
    sent = torch.tensor([len(parcel) for parcel in parcels], device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    out = torch.empty(int(received.sum()), dtype=torch.uint8, device=device)
    flat = torch.cat([to_tensor(parcel, device) for parcel in parcels])
    dist.all_to_all_single(out, flat, received.tolist(), sent.tolist(), group=group)
    pieces = out.cpu().split(received.tolist())
    return [rollouts_from_bytes(piece.numpy().tobytes()) for piece in pieces]
