"""A checksum of every file of a checkpoint, written with it and checked on request.

``checksums.json`` lists each file's length and CRC-32. The CRC of a large file is computed while it is written. A CRC
detects damage by disks, copies and memory; it is no signature against an attacker. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_ring.checkpoint.plain_files import is_count, is_file_name, read_json, shown
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import open_plain

SUMS = "checksums.json"
MANIFEST = "conversion.json"
"""Manifest of a conversion; it lists the large files in the same form."""
_LOADED = (".distcp", ".pt", ".safetensors")
_ALWAYS_LOADED = (".metadata", "metadata.json", "trainer_state.json")
"""Files that a load may read: each of them needs a checksum."""
_READ_BYTES = 1 << 22
_REMEDY = "copy it again, or leave the checksums out"


class Summed(NamedTuple):
    """Example: ``Summed(num_bytes=81920, crc32="9ae0daaf")``."""

    num_bytes: int
    crc32: str


def sum_bytes(data: bytes) -> Summed:
    return Summed(len(data), f"{zlib.crc32(data):08x}")


def sum_file(path: Path) -> Summed:
    """Length and CRC of a file. Raises OSError if it cannot be read."""
    crc32 = num_bytes = 0
    with open_plain(path) as file:
        while block := file.read(_READ_BYTES):
            crc32 = zlib.crc32(block, crc32)
            num_bytes += len(block)
    return Summed(num_bytes, f"{crc32:08x}")


def write_sums(folder: Path, known: Mapping[str, Summed]) -> None:
    """Write ``checksums.json`` for the files of ``folder``. Files that are not in ``known`` are small, and are read."""
    known = {**(read_sums(folder, MANIFEST) if (folder / MANIFEST).exists() else {}), **known}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    sums = {name: known.get(name) or sum_file(folder / name) for name in names}
    listed = {name: {"bytes": each.num_bytes, "crc32": each.crc32} for name, each in sums.items()}
    (folder / SUMS).write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")


def read_sums(folder: Path, name: str = SUMS) -> dict[str, Summed]:
    """The entries of ``checksums.json`` or of a conversion's ``conversion.json``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / name
    entries = read_json(path, _REMEDY).get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: lists no files; {_REMEDY}")
    sums: dict[str, Summed] = {}
    for file, entry in entries.items():
        size, crc32 = (entry.get("bytes"), entry.get("crc32")) if isinstance(entry, dict) else (None, None)
        if not (is_file_name(file) and is_count(size) and isinstance(crc32, str) and len(crc32) == 8):
            raise CheckpointError(f"{path}: lists {shown(file)} without a length and a checksum; {_REMEDY}")
        sums[file] = Summed(size, crc32)
    return sums


def compare(folder: Path, sums: Mapping[str, Summed]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it; empty if nothing is) of every file in ``sums``, as the disk gives it."""
    for name, expected in sums.items():
        path = folder / name
        try:
            _forget_cached(path)
            found = sum_file(path)
        except FileNotFoundError:
            yield name, "missing"
        except OSError as error:
            yield name, f"cannot be read ({error.strerror})"
        else:
            if found.num_bytes != expected.num_bytes:
                yield name, f"has {found.num_bytes:,} of {expected.num_bytes:,} bytes"
            elif found != expected:
                yield name, f"has CRC-32 {found.crc32}, not {expected.crc32}"
            else:
                yield name, ""


def check_share(folder: Path, rank: int, world_size: int) -> str:
    """What is wrong with this rank's share of the files of ``folder``; empty if nothing is wrong.

    Raises:
        CheckpointError: it has no checksums.
    """
    sums = require_sums(folder)
    # the largest files first, distributed to the ranks in turn
    names = sorted(sums, key=lambda name: -sums[name].num_bytes)[rank::world_size]
    problems = [f"{name} {wrong}" for name, wrong in compare(folder, {n: sums[n] for n in names}) if wrong]
    return "; ".join(problems)


def require_sums(folder: Path) -> dict[str, Summed]:
    """The checksums of a checkpoint, or of the large files of a converted folder.

    Raises:
        CheckpointError: it has none, or none of a file that a load may read.
    """
    if (folder / SUMS).exists():
        sums = read_sums(folder)
        there = sorted(path.name for path in folder.iterdir())
        unlisted = [n for n in there if n not in sums and (n.endswith(_LOADED) or n in _ALWAYS_LOADED)]
        if unlisted:
            raise CheckpointError(
                f"{folder / SUMS}: has no checksum of {', '.join(unlisted[:3])}, which a load may read; copy the "
                "checkpoint again, or remove what was added"
            )
        return sums
    if (folder / MANIFEST).exists():
        return read_sums(folder, MANIFEST)
    raise CheckpointError(
        f"{folder}: has no {SUMS} to compare with: an older version or another program wrote it; a run that is to "
        "load it leaves --verify-checkpoint-integrity out"
    )


def _forget_cached(path: Path) -> None:
    """Drop a file from the page cache, so that what is summed is what the disk gives back."""
    with open_plain(path) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
