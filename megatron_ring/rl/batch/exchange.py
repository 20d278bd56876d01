"""Move rollouts to the rank that trains on them. Tensor and pipeline ranks of one data-parallel
rank hold the same rollouts, so each exchanges with its peers in the data-parallel group only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ring.rl.rollout_io import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.collectives import to_tensor


def send_rollouts(
    rollouts_of: Sequence[Sequence[Rollout]], group: dist.ProcessGroup, device: torch.device
) -> list[list[Rollout]]:
    """Collective over ``group``: ``rollouts_of[r]`` goes to rank r; returns what came from each rank.

    Moves only what is asked for: 16 bytes a token plus the prompt, and the routes where they are kept.
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
