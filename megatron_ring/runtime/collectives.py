"""Collectives on small values, sent as JSON: nothing that arrives is unpickled."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Collective over ``group``: the JSON-able ``value`` of every rank, in rank order."""
    if group.size() == 1:
        return [value]
    own = to_tensor(json.dumps(value).encode(), device)
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
    """Collective over ``group``: the JSON-able ``value`` of its rank ``source``."""
    if group.size() == 1:
        return value
    return json.loads(broadcast_bytes(json.dumps(value).encode(), source, group, device))


def broadcast_bytes(data: bytes, source: int, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """Collective over ``group``: the ``data`` of its rank number ``source``."""
    if group.size() == 1:
        return data
    is_source = group.rank() == source
    length = torch.tensor([len(data) if is_source else 0], device=device)
    dist.broadcast(length, group=group, group_src=source)
    row = to_tensor(data, device) if is_source else torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(row, group=group, group_src=source)
    return row.cpu().numpy().tobytes()


def to_tensor(data: bytes, device: torch.device) -> Tensor:
    """``data`` as uint8 on ``device``."""
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).to(device)
