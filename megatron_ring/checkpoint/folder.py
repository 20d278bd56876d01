"""Checkpoint folders: their names, making and committing one, the pointer to the latest, pruning.

A save writes into ``iter_0000010.incomplete``, which is renamed when every byte is durable. After that
``latest_checkpointed_iteration.txt`` (Megatron's name), the pointer, is replaced. A killed save leaves the old pointer.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_ring.checkpoint.checksums import Summed, write_sums
from megatron_ring.checkpoint.run_lock import must_be_mine
from megatron_ring.durable import fsync, write_durably
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import read_plain

log = logging.getLogger("megatron_ring")

TRACKER = "latest_checkpointed_iteration.txt"
CRITIC = "critic"
"""Folder beside the steps of a policy that holds its critic's steps; also the stage that those record."""
_INCOMPLETE, _REPLACED = ".incomplete", ".replaced"
_NAME = re.compile(r"iter_([0-9]{7,18})")
_ITERATION = re.compile(r"[0-9]{1,18}")


def folder_of(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def parts_of(folder: Path) -> list[Path]:
    """The folders that are loaded together with the checkpoint ``folder``: itself and, if there is one, its critic."""
    steps = (_NAME.fullmatch(place.name.removesuffix(_REPLACED)) for place in _places(folder))
    step = next((int(found[1]) for found in steps if found), None)
    critic = None if step is None else critic_of(folder, step)
    return [folder] if critic is None else [folder, critic]


def critic_of(folder: Path, iteration: int) -> Path | None:
    """The critic of step ``iteration`` beside the checkpoint ``folder``; ``None`` if there is none."""
    critic = beside(folder, f"{CRITIC}/{folder_of(Path(), iteration).name}")
    if critic is None:
        critic = beside(folder, f"{CRITIC}/{folder_of(Path(), iteration).name}{_REPLACED}")
    return critic


def beside(folder: Path, name: str) -> Path | None:
    """The folder ``name`` beside the checkpoint ``folder`` or, if that is a symbolic link, beside its target.

    Example: ``beside(Path("."), "critic")`` inside of ``runs/a/iter_0000010`` is ``runs/a/critic``.
    """
    found = (place.parent / name for place in _places(folder))
    return next((each for each in found if each.is_dir()), None)


def _places(folder: Path) -> list[Path]:
    """A path, or a link and its target, beside which to look: the one that is named like a step comes first."""
    named, real = folder.absolute(), folder.resolve()
    return [named, real] if _NAME.fullmatch(named.name.removesuffix(_REPLACED)) else [real, named]


def begin(root: Path, iteration: int, num_bytes: int) -> Path:
    """Make the folder that a save of ``num_bytes`` writes into, without what a killed save of the same step left.

    Raises:
        CheckpointError: the folder cannot be written or the disk is too small; nothing was written.
    """
    working = folder_of(root, iteration).with_name(folder_of(root, iteration).name + _INCOMPLETE)
    must_be_mine(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < num_bytes:
            raise CheckpointError(
                f"--save {root}: {free / 1e9:.2f} GB free but the checkpoint of step {iteration} needs "
                f"{num_bytes / 1e9:.2f} GB; free space or lower --keep-last-n"
            )
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"--save {root}: {error.strerror or error}; name a folder that can be written"
        ) from None
    return working


def commit(working: Path, iteration: int, sums: Mapping[str, Summed] | None = None) -> Path:
    """Make a finished save durable, rename it and move the pointer to it.

    ``sums`` are the checksums of files that were computed while they were written.
    """
    final = working.with_name(working.name.removesuffix(_INCOMPLETE))
    write_sums(working, sums or {})
    for path in working.iterdir():
        fsync(path)
    fsync(working)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    working.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    write_durably(final.parent / TRACKER, f"{iteration}\n")
    return final


def prune(root: Path, saved: int, keep_last_n: int) -> None:
    """Of the checkpoints up to step ``saved``, delete all but the last ``keep_last_n`` (0 keeps all).

    Later steps are kept and not counted: they are from an earlier run, or this run was resumed from before them. A critic's
    checkpoint is deleted together with its policy's: it is saved first, so that counting its own would delete the critic
    of a policy that is still kept.
    """
    if keep_last_n <= 0:
        return
    kept = [each for each in iterations(root) if each <= saved][-keep_last_n:]
    for folder in (root / CRITIC, root):
        for iteration in iterations(folder) if folder.is_dir() else ():
            if iteration <= saved and iteration not in kept:
                shutil.rmtree(folder_of(folder, iteration), ignore_errors=True)


def iterations(root: Path) -> list[int]:
    """Steps of the complete checkpoints under ``root``, ascending."""
    names = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def latest(root: Path) -> Path | None:
    """The checkpoint that the pointer names; ``None`` if there is none yet.

    Raises:
        CheckpointError: the pointer is damaged, names a missing folder, or is missing beside several checkpoints.
    """
    tracker = root / TRACKER
    if not os.path.lexists(tracker):
        return _only_one(root)
    try:
        text = read_plain(tracker, 1_000_000).decode("utf-8", "backslashreplace").strip()
    except OSError as error:
        raise CheckpointError(
            f"{tracker}: {error.strerror}; write a step number that exists into it"
        ) from None
    if not _ITERATION.fullmatch(text):
        raise CheckpointError(
            f"{tracker}: holds {text[:40]!r} but must hold a step number; write one that exists"
        )
    folder = folder_of(root, int(text))
    replaced = folder.with_name(folder.name + _REPLACED)
    if not folder.is_dir() and replaced.is_dir():
        # a second save of the same step was killed between its two renames
        return replaced
    if not folder.is_dir():
        there = ", ".join(map(str, iterations(root))) or "none"
        raise CheckpointError(
            f"{tracker}: names step {text}, which is not there (found: {there}); write one of those into it"
        )
    return folder


def _only_one(root: Path) -> Path | None:
    """The one complete checkpoint of a folder without a pointer: a run was killed right after its first save."""
    there = iterations(root)
    if len(there) > 1:
        raise CheckpointError(
            f"{root / TRACKER}: is missing beside checkpoints of steps {', '.join(map(str, there))}; write the step to "
            "resume from into it, or name another folder to start from the beginning"
        )
    if not there:
        return None
    log.info("%s: is missing; resuming from the only checkpoint there, step %d", root / TRACKER, there[0])
    return folder_of(root, there[0])
