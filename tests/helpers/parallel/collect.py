"""Whole tensors from sharded ones, for comparison across layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def local_shards(engine: Any, *, gradients: bool) -> list[dict[str, Any]]:
    """This rank's shards of every weight (or of every gradient): key, global shape, offset, data."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_ring.model.sharding import sharding_metadata

    parameters = [p for model in engine.models for p in model.parameters() if p.requires_grad]
    weights = [p.data for p in parameters]
    if gradients:
        for parameter in parameters:
            parameter.data = parameter.main_grad.view(parameter.shape)
    else:
        engine.gather_parameters()
    metadata = sharding_metadata(engine.topology)
    state = {str(i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(engine.models)}
    apply_factories(state)
    shards = [
        dict(key=s.key, shape=s.global_shape, offset=s.global_offset, data=s.data.detach().clone())
        for s in nested_values(state)
        if isinstance(s, ShardedTensor)
    ]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return shards


def whole_tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Assemble what every rank wrote as ``<kind>.<rank>.pt``; replicas of a shard must agree."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{kind}.*.pt")):
        for shard in torch.load(path, weights_only=True):
            key, data, shape = shard["key"], shard["data"].double(), tuple(shard["shape"])
            if key not in whole:
                whole[key] = torch.zeros(shape, dtype=torch.float64)
                seen[key] = torch.zeros(shape, dtype=torch.bool)
            extra = len(shape) - data.dim()
            data = data.reshape((1,) * extra + tuple(data.shape))
            place = tuple(slice(o, o + n) for o, n in zip(shard["offset"], data.shape, strict=True))
            old = whole[key][place]
            written = seen[key][place]
            if written.any():
                scale = old[written].norm().clamp(min=1e-12)
                gap = ((old - data)[written].norm() / scale).item()
                assert gap < 1e-5, f"replicas of {key} differ by {gap:.1e}"
            whole[key][place] = data
            seen[key][place] = True
    for key, mask in seen.items():
        assert mask.all(), f"{key}: {(~mask).sum()} elements in no shard"
    return whole


def largest_gap(own: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest ``|own - reference| / |reference|`` over tensors, and its key."""
    assert own.keys() == reference.keys(), own.keys() ^ reference.keys()
    gaps = {
        key: ((own[key] - reference[key]).norm() / reference[key].norm().clamp(min=1e-9)).item()
        for key in own
    }
    worst = max(gaps, key=gaps.__getitem__)
    return gaps[worst], worst
