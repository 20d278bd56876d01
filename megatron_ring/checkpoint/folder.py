"""Checkpoint folders: names, the pointer to the latest, pruning, and the checks before anything is read.

A save writes into ``iter_0000010.incomplete`` and is renamed when every byte is durable; only then does
``latest_checkpointed_iteration.txt`` (Megatron's name) move. A killed save leaves the pointer where it was.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_ring.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
TRAINER_STATE = "trainer_state.json"
RUN_CONFIG = "config.toml"
_INCOMPLETE = ".incomplete"
_NAME = re.compile(r"iter_(\d{7,})")
_SAFE_MODULES = ("torch", "collections", "pathlib", "megatron.core.dist_checkpointing", "_codecs", "datetime")
_SAFE_BUILTINS = {"set", "frozenset", "slice", "complex", "bytearray", "getattr"}


def folder_of(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def begin(root: Path, iteration: int, num_bytes: int) -> Path:
    """Make the folder that a save of ``num_bytes`` writes into; removes what a killed save of the same step
    left.

    Raises:
        CheckpointError: the folder cannot be written or the disk is too small; nothing has been written then.
    """
    working = folder_of(root, iteration).with_name(folder_of(root, iteration).name + _INCOMPLETE)
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


def commit(working: Path, iteration: int) -> Path:
    """Make a finished save durable, give it its name and move the pointer."""
    final = working.with_name(working.name.removesuffix(_INCOMPLETE))
    for path in working.iterdir():
        _fsync(path)
    _fsync(working)
    if final.exists():
        replaced = final.with_name(final.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        working.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        working.rename(final)
    write_durably(final.parent / TRACKER, f"{iteration}\n")
    return final


def write_durably(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(root: Path, keep_last_n: int) -> None:
    """Delete all but the newest ``keep_last_n`` complete checkpoints (0 keeps all)."""
    if keep_last_n <= 0:
        return
    for iteration in iterations(root)[:-keep_last_n]:
        shutil.rmtree(folder_of(root, iteration), ignore_errors=True)


def iterations(root: Path) -> list[int]:
    """Steps of the complete checkpoints under ``root``, ascending."""
    names = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def latest(root: Path) -> Path | None:
    """The checkpoint the pointer names; ``None`` when there is none yet.

    Raises:
        CheckpointError: the pointer is damaged or names a folder that is not there.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker}: holds {text[:40]!r} but must hold a step number; write one that exists"
        )
    folder = folder_of(root, int(text))
    if not folder.is_dir():
        there = ", ".join(map(str, iterations(root))) or "none"
        raise CheckpointError(
            f"{tracker}: names step {text}, which is not there (found: {there}); write one of those into it"
        )
    return folder


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer's JSON state of one checkpoint.

    Raises:
        CheckpointError: the folder is no complete checkpoint of this project.
    """
    path = folder / TRAINER_STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; load a complete checkpoint folder (iter_NNNNNNN)") from None


class _NoForeignCode(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = module == "builtins" and name in _SAFE_BUILTINS
        known = any(module == safe or module.startswith(safe + ".") for safe in _SAFE_MODULES)
        if not plain and not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_metadata(folder: Path) -> None:
    """Refuse a checkpoint whose pickled ``.metadata`` would import anything but tensors' own classes.

    Megatron reads this file with plain ``pickle``; a checkpoint may come from outside.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            _NoForeignCode(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; load a complete checkpoint folder") from None
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read safely ({error}); load a checkpoint that Megatron wrote"
        ) from None
