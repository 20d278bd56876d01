"""Rollouts between processes: who knows what of whom, and who trains on what.

Every function is collective over the group in its first line. Tensor and pipeline ranks of one data-parallel
rank hold the same rollouts, so each exchanges with its peers in the data-parallel group only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ring.rl.serialise import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.rl.types import Rollout


def gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Collective over ``group``: what every rank said, in the order of ranks. For small things."""
    if group.size() == 1:
        return [value]
    own = _to_tensor(json.dumps(value).encode(), device)
    lengths = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    rows = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(rows, padded, group=group)
    rows = rows.view(group.size(), longest).cpu().numpy()
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths.tolist(), strict=True)]


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Collective over ``group``: what its rank number ``source`` says."""
    if group.size() == 1:
        return value
    is_source = group.rank() == source
    data = json.dumps(value).encode() if is_source else b""
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, group=group, group_src=source)
    row = (
        _to_tensor(data, device) if is_source else torch.empty(int(length), dtype=torch.uint8, device=device)
    )
    dist.broadcast(row, group=group, group_src=source)
    return json.loads(row.cpu().numpy().tobytes())


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
    flat = torch.cat([_to_tensor(parcel, device) for parcel in parcels])
    dist.all_to_all_single(out, flat, received.tolist(), sent.tolist(), group=group)
    pieces = out.cpu().split(received.tolist())
    return [rollouts_from_bytes(piece.numpy().tobytes()) for piece in pieces]


def _to_tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).to(device)
