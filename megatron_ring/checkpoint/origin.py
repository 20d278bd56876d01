"""Which weights belong to a run: what it began from, so that a resume makes the same reference, and its critic.

Nothing here needs torch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.checksums import MANIFEST, SUMS, sum_file
from megatron_ring.checkpoint.folder import CRITIC, critic_of, folder_of
from megatron_ring.checkpoint.format import TRAINER_STATE, TrainerState
from megatron_ring.checkpoint.plain_files import read_json, shown
from megatron_ring.errors import CheckpointError

log = logging.getLogger("megatron_ring")


def origin_of(folder: Path | None, seed: int) -> dict[str, Any]:
    """A record of a run's first weights: those of the checkpoint ``folder``, or random ones of ``seed``.

    Example: ``{"folder": "/runs/sft/iter_0000100", "step": 100, "crc32": "9ae0daaf"}``; ``{"seed": 1234}``.
    """
    if folder is None:
        return {"seed": seed}
    path = folder / SUMS if (folder / SUMS).exists() else folder / ".metadata"
    step = TrainerState.read(folder).iteration
    found = {"folder": str(folder.absolute()), "step": step, "crc32": sum_file(path).crc32}
    if (folder / MANIFEST).exists():
        # a repadded checkpoint has the weights of its source
        found["written_from"] = str(read_json(folder / MANIFEST, "write it again").get("source"))
    return found


def must_be_same(saved: Any, now: dict[str, Any], loaded: Path | None) -> None:
    """Refuse to resume with another reference policy than the run has had so far.

    Other files of the same step give a warning if they are in the same folder or were repadded from it.
    Elsewhere they count as another model, since every converted checkpoint is of step 0. ``saved`` is null in
    older checkpoints.

    Raises:
        CheckpointError: the run began from other weights than the command names now.
    """
    if saved is None:
        return
    if not isinstance(saved, dict) or not ("folder" in saved or "seed" in saved):
        raise CheckpointError(f"{loaded}: holds {shown(saved)} for began_from; load an earlier checkpoint")
    is_another = any(saved.get(name) != now.get(name) for name in ("step", "seed"))
    rewritten = saved.get("folder") in (now.get("folder"), now.get("written_from"))
    if is_another or (saved.get("crc32") != now.get("crc32") and not rewritten):
        remedy = "start it without --pretrained-checkpoint and with that --seed"
        if "folder" in saved:
            remedy = f"name them with --pretrained-checkpoint {str(saved['folder'])[:300]}"
        raise CheckpointError(
            f"{loaded}: the reference is what the run began from, {_said(saved)}, but this command names "
            f"{_said(now)}; {remedy}, or set --kl-loss-coef 0"
        )
    if saved.get("crc32") != now.get("crc32"):
        log.warning(
            "%s: the run began from %s, and %s holds other files of that step: the reference differs "
            "unless the same weights were written again",
            loaded,
            _said(saved),
            now["folder"],
        )


def critic_folder(policy: Path, iteration: int) -> Path:
    """The critic's checkpoint that belongs to the policy's checkpoint ``policy`` of step ``iteration``.

    Raises:
        CheckpointError: there is none, and a new critic does not fit a policy that is trained already.
    """
    folder = critic_of(policy, iteration) or folder_of(policy.parent / CRITIC, iteration)
    if not (folder / TRAINER_STATE).exists():
        raise CheckpointError(
            f"{folder}: holds no critic for the policy of step {iteration}; drop --critic, or start from the policy's "
            "weights with --pretrained-checkpoint and another --save"
        )
    return folder


def _said(origin: dict[str, Any]) -> str:
    if "folder" in origin:
        return f"step {shown(origin.get('step'))} of {Path(str(origin['folder'])[:300]).parent!s}"
    return f"random weights of seed {shown(origin.get('seed'))}"
