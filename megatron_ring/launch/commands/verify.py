"""Compute the checksums of a checkpoint's files again and compare them with those that were written with it.

    ring verify runs/tiny                  # a run's folder: its latest checkpoint
    ring verify runs/tiny/iter_0000100     # one checkpoint, and its critic
    ring verify models/mine                # what ring convert wrote

Prints a line for each file; exit code 0 if all are as written, 1 if not, 2 if there is nothing to compare with.
Needs no torch. A checksum shows damage, not who wrote a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_ring.checkpoint.checksums import MANIFEST, SUMS, Summed, compare, require_sums
from megatron_ring.checkpoint.folder import CRITIC, TRACKER, latest, parts_of
from megatron_ring.checkpoint.format import RUN_CONFIG
from megatron_ring.config.load import OneLineParser, named_path, read_toml
from megatron_ring.errors import CheckpointError


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folder", type=named_path, metavar="FOLDER", help="a checkpoint, or the folder of a run"
    )
    parts = parts_of(_checkpoint_of(parser.parse_args().folder))
    sums = {part: require_sums(part) for part in parts}
    bad = sum(_compare(part, listed) for part, listed in sums.items())
    if not bad and len(parts) == 1 and _had_a_critic(parts[0]):
        bad += 1
        print(
            f"missing  {parts[0].absolute().parent / CRITIC / parts[0].name}: the policy's run has a critic"
        )
    sys.exit(1 if bad else 0)


def _compare(folder: Path, sums: Mapping[str, Summed]) -> int:
    """Print a line for each file of one folder; returns how many are not as written."""
    bad = 0
    for name, wrong in compare(folder, dict(sorted(sums.items()))):
        bad += bool(wrong)
        print(f"{'missing' if wrong == 'missing' else 'bad    ' if wrong else 'ok     '}  {name}", end="")
        print(f": {wrong}" if wrong not in ("", "missing") else "", flush=True)
    others = sorted(p.name for p in folder.iterdir() if p.name not in {*sums, SUMS, MANIFEST})
    for name in others:
        print(f"unknown  {name}: no checksum was written for it")
    print(f"{folder}: {len(sums) - bad} of {len(sums)} files are as written")
    return bad


def _had_a_critic(folder: Path) -> bool:
    """Is it the policy's checkpoint of a run that also trains a critic?"""
    if folder.absolute().parent.name == CRITIC or not (folder / RUN_CONFIG).exists():
        return False
    return read_toml(folder / RUN_CONFIG)[1].get("critic") is True


def _checkpoint_of(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a checkpoint or the folder of a run")
    if not (folder / TRACKER).exists():
        return folder
    found = latest(folder)
    assert found is not None
    return found
