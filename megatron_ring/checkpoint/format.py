"""What one checkpoint folder holds beside its tensors: the files' names, one reader and one writer of each.

Nothing here needs torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.index import CheckpointIndex, read_index
from megatron_ring.checkpoint.plain_files import is_count, read_json, shown
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import read_plain

TRAINER_STATE = "trainer_state.json"
RUN_CONFIG = "config.toml"

CONVERTED = "converted"
"""Stage of a checkpoint that was made from a Hugging Face folder: weights, and no run to resume."""

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Contents of Megatron's ``metadata.json``."""

_MAX_ATTACHMENT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """``trainer_state.json``: what a resumed run needs beside tensors and random-number states.

    Example: ``TrainerState(iteration=100, optimizer_steps=98, layout={"world_size": 8, ...}, model={"num_layers":
    28, ...}, stage="sft", trainer={"step": 100, "stream": {...}})``.
    """

    iteration: int
    """Step that was saved; it names the folder."""
    optimizer_steps: int
    """Updates so far: fewer than steps where one was skipped."""
    layout: dict[str, Any]
    """World size and model-parallel sizes of the run that saved it."""
    model: dict[str, Any]
    """Settings that decide which tensors the model has."""
    stage: str | None
    """Stage that saved it, ``critic``, or :data:`CONVERTED`; None in checkpoints from before it was recorded."""
    trainer: dict[str, Any]
    """The stage's own state."""

    @classmethod
    def read(cls, folder: Path) -> TrainerState:
        """The trainer state of the checkpoint ``folder``.

        Raises:
            CheckpointError: the folder is no complete checkpoint of this project.
        """
        path, remedy = folder / TRAINER_STATE, "load a complete checkpoint folder (iter_NNNNNNN)"
        found = {"stage": None, **read_json(path, remedy)}
        for key, (is_valid, wanted) in _FIELDS.items():
            if key not in found:
                raise CheckpointError(f"{path}: lacks {key}; {remedy}")
            if not is_valid(found[key]):
                raise CheckpointError(
                    f"{path}: holds {shown(found[key])} for {key}, which is {wanted}; {remedy}"
                )
        return cls(**{key: found[key] for key in _FIELDS})

    def write(self, folder: Path) -> None:
        """Write it into ``folder``; :func:`~megatron_ring.checkpoint.folder.commit` makes it durable."""
        (folder / TRAINER_STATE).write_text(json.dumps(asdict(self)), encoding="utf-8")


_COUNT = (is_count, "a count")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_NAME = (lambda value: value is None or isinstance(value, str), "a name or null")
_FIELDS = {
    "iteration": _COUNT,
    "optimizer_steps": _COUNT,
    "layout": _OBJECT,
    "model": _OBJECT,
    "stage": _NAME,
    "trainer": _OBJECT,
}
"""For each field of :class:`TrainerState` what it may hold."""


def check_contents(folder: Path) -> CheckpointIndex:
    """The index of a checkpoint that may come from outside, after a check of everything in it that Megatron
    gets (see :mod:`megatron_ring.checkpoint.megatron_io`).

    Raises:
        CheckpointError: it lacks files, is of another format, or has an object where a tensor should be. Objects are
            allowed only where Megatron puts its ``_extra_state``, and are never read.
    """
    index = read_index(folder)
    for key in index.objects:
        if "_extra_state" not in key:
            raise CheckpointError(
                f"{folder / '.metadata'}: cannot be read safely ({key[:100]} is a pickled object, not a tensor); "
                "load a checkpoint that Megatron wrote"
            )
    path = folder / "metadata.json"
    found = read_json(path, "load a complete checkpoint folder")
    if {**FORMAT, **found} != FORMAT:
        raise CheckpointError(f"{path}: describes another format than torch_dist; load another checkpoint")
    return index


def read_attachment(folder: Path, name: str) -> bytes:
    """A file that one rank saved beside a checkpoint (see :meth:`Checkpointer.save`).

    Raises:
        CheckpointError: it is not there.
    """
    try:
        return read_plain(folder / name, _MAX_ATTACHMENT_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{folder / name}: {error.strerror}; load a checkpoint that this stage saved"
        ) from None
