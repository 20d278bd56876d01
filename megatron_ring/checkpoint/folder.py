"""Checkpoint folders: their names, making and committing one, the pointer to the latest, pruning.

A save writes into ``iter_0000010.incomplete`` and is renamed when every byte is durable; only then does
``latest_checkpointed_iteration.txt`` (Megatron's name) move. A killed save leaves the pointer where it was.
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
    """What goes on together from the checkpoint ``folder``: itself, and its critic of the same step if it has one."""
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
    """The folder ``name`` beside the checkpoint ``folder``; where that is a link, also beside what it names.

    Example: ``beside(Path("."), "critic")`` inside of ``runs/a/iter_0000010`` is ``runs/a/critic``.
    """
    found = (place.parent / name for place in _places(folder))
    return next((each for each in found if each.is_dir()), None)


def _places(folder: Path) -> list[Path]:
    """Where ``folder`` may have its neighbours; a link that is not called like a step has others there."""
    named, real = folder.absolute(), folder.resolve()
    return [named, real] if _NAME.fullmatch(named.name.removesuffix(_REPLACED)) else [real, named]


def begin(root: Path, iteration: int, num_bytes: int) -> Path:
    """Make the folder that a save of ``num_bytes`` writes into; removes what a killed save of the same step
    left.

    Raises:
        CheckpointError: the folder cannot be written or the disk is too small; nothing has been written then.
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
    """Make a finished save durable, give it its name and move the pointer.

    ``sums`` are those of its files that were summed when they were written.
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
    """Delete all but the ``keep_last_n`` complete checkpoints up to the one of step ``saved`` (0 keeps all).

    Later steps are of a run that was here before, or from before one went back: nothing says that they may go, and
    counted as the newest they would cost the run what it has just saved. A critic goes with its policy: it is saved
    first, and one that went by its own count would be missed by the policy before, until that is replaced too.
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
    """The checkpoint the pointer names; ``None`` when there is none yet.

    Raises:
        CheckpointError: the pointer is damaged, names a folder that is not there, or is lost beside several checkpoints.
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
        # a second save of the step was killed between two names
        return replaced
    if not folder.is_dir():
        there = ", ".join(map(str, iterations(root))) or "none"
        raise CheckpointError(
            f"{tracker}: names step {text}, which is not there (found: {there}); write one of those into it"
        )
    return folder


def _only_one(root: Path) -> Path | None:
    """The one complete checkpoint of a folder without a pointer: a run was killed right behind its first save."""
    there = iterations(root)
    if len(there) > 1:
        raise CheckpointError(
            f"{root / TRACKER}: is not there, but checkpoints are ({', '.join(map(str, there))}); write the step to go on "
            "from into it, or name another folder to start anew"
        )
    if not there:
        return None
    log.info("%s: is not there; the one checkpoint beside it is taken, step %d", root / TRACKER, there[0])
    return folder_of(root, there[0])
