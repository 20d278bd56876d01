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
_MEGATRON_FILES = ("common.pt", "metadata.json")
_STATE_KEYS = ("iteration", "optimizer_steps", "layout", "model", "trainer")
_INCOMPLETE = ".incomplete"
_NAME = re.compile(r"iter_(\d{7,})")
_DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2"
_LOADABLE = {
    "torch": f"Size device {_DTYPES}",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata ChunkStorageMetadata BytesStorageMetadata TensorProperties MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "collections": "OrderedDict",
    "pathlib": "Path PosixPath",
    "builtins": "set frozenset",
}
"""All that ``.metadata`` may name. Nothing in it runs code of the pickle's choice."""


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
        state = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _STATE_KEYS if key not in state]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}; load a complete checkpoint folder (iter_NNNNNNN)") from None
    if not isinstance(state, dict) or missing:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing) or 'everything'}; load a complete checkpoint folder (iter_NNNNNNN)"
        )
    return state


class _NoForeignCode(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # the whole name: in "torch" there is an "os.system" too
        if name not in _LOADABLE.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_contents(folder: Path) -> None:
    """Refuse a checkpoint that lacks files, or whose pickled ``.metadata`` names anything but tensors' own
    classes.

    Megatron reads ``.metadata`` with plain ``pickle``, and what it calls an object rather than a tensor too; a
    checkpoint may come from outside. Objects are let stand only where Megatron puts its ``_extra_state``, which
    :meth:`Checkpointer.load` does not ask for.
    """
    check_metadata(folder)
    for name in _MEGATRON_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; load a complete checkpoint folder")
    try:
        json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'metadata.json'}: {error}; load another checkpoint") from None


def check_metadata(folder: Path) -> None:
    """The part of :func:`check_contents` that reads ``.metadata``: nothing foreign in it, no tensor cut off."""
    path = folder / ".metadata"
    ends: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            metadata = _NoForeignCode(file).load()
        entries = metadata.state_dict_metadata
        objects = [key for key, entry in entries.items() if type(entry).__name__ == "BytesStorageMetadata"]
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; load a complete checkpoint folder") from None
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read safely ({error}); load a checkpoint that Megatron wrote"
        ) from None
    for key in objects:
        if "_extra_state" not in key:
            raise CheckpointError(
                f"{path}: cannot be read safely ({key} is a pickled object, not a tensor); "
                "load a checkpoint that Megatron wrote"
            )
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < end:
            raise CheckpointError(
                f"{folder / name}: has {size:,} of at least {end:,} bytes; copy it again or load another checkpoint"
            )


def read_attachment(folder: Path, name: str) -> bytes:
    """A file that a rank's own saving put beside a checkpoint.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder / name}: {error.strerror}; load a checkpoint that this stage saved"
        ) from None
