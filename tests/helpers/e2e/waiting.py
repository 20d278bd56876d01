"""What a checkpoint of an RL run holds for later steps."""

from __future__ import annotations

from pathlib import Path

from megatron_ring.rl.rollout_io import note_of, rollouts_from_bytes


def waiting_samples(checkpoint: Path) -> dict[int, list[int]]:
    """Prompt -> samples that have not ended, of all data-parallel ranks."""
    notes = [note_of(path.read_bytes()) for path in checkpoint.glob("rollouts-finished-*.safetensors")]
    assert notes
    return {group["prompt"]["uid"]: group["waiting"] for groups in notes for group in groups}


def carried_places(checkpoint: Path) -> list[list[int]]:
    """[start, carried] of every carried response, of all data-parallel ranks."""
    paths = list(checkpoint.glob("rollouts-carried-*.safetensors"))
    assert paths
    carried = [rollout for path in paths for rollout in rollouts_from_bytes(path.read_bytes())]
    return [[rollout.start, rollout.carried] for rollout in carried]
