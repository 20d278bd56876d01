"""What every conversion does: write its files, compare them with their source, and finish a checkpoint's folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.files import Source, TensorInfo
from megatron_ring.checkpoint.convert.stream import Job, Written
from megatron_ring.checkpoint.convert.tensor_map import TensorCopy
from megatron_ring.checkpoint.convert.torch_dist_io import write_metadata
from megatron_ring.checkpoint.convert.verify import compare, padding_is_zero
from megatron_ring.checkpoint.format import RUN_CONFIG, TrainerState
from megatron_ring.config.dump import dump_toml
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.model.sharding import SHARDING


class Reporter(Protocol):
    """Receives the progress of a conversion."""

    def say(self, line: str) -> None: ...

    def progress(self, title: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert. Example: ``Options(dtype=None, max_file_bytes=2_000_000_000, num_workers=2,
    verify=True)``.
    """

    dtype: torch.dtype | None = None
    """Cast floating-point tensors (all but the expert bias) to this; None keeps each as it is."""
    max_file_bytes: int = 2_000_000_000
    """Largest output file; a single larger tensor gets its own."""
    num_workers: int = 1
    """Processes that convert."""
    verify: bool = False
    """Read both sides back and compare them before the result is renamed into place."""


def run(job: Job, working: Path, options: Options, reporter: Reporter) -> dict[str, Written]:
    """Write all files of ``job``, or those that are still missing."""
    todo = stream.begin(job, working, reporter.say)
    with reporter.progress("converting", sum(file.num_bytes for file in todo)) as on_bytes:
        stream.write(job, working, todo, options.num_workers, on_bytes)
    return stream.written(job, working)


def verify(
    original: Source,
    result: Source,
    copies: dict[str, list[TensorCopy]],
    reporter: Reporter,
    padded: dict[str, list[TensorCopy]] | None = None,
) -> None:
    """Compare, and check that the vocabulary padding of ``padded`` is zero. A conversion that differs is never
    resumed.

    Raises:
        CheckpointError: something differs.
    """
    total = sum(
        copy.target_box.size * original.tensors[name].dtype.itemsize
        for name in copies
        for copy in copies[name]
    )
    try:
        with reporter.progress("verifying", total) as on_bytes:
            comparison = compare(original, result, copies, on_bytes)
        if padded and not padding_is_zero(result, padded):
            raise CheckpointError(f"{result.folder}: vocabulary padding is not zero; convert again")
    except CheckpointError:
        stream.remove_progress_notes(result.folder)
        raise
    reporter.say(f"verified: {comparison}")


def write_torch_dist_metadata(job: Job, working: Path, notes: dict[str, Written]) -> None:
    places = ((file, *place) for file, note in notes.items() for place in note.places)
    write_metadata(working, job.tensors, places, {"content_metadata": SHARDING})


def finish_step(working: Path, state: TrainerState, config: RunConfig) -> None:
    state.write(working)
    (working / RUN_CONFIG).write_text(dump_toml(config), encoding="utf-8")


def common_dtype(infos: dict[str, TensorInfo]) -> str:
    """The dtype that most numbers have, as config files spell it."""
    bytes_of: dict[torch.dtype, int] = {}
    for info in infos.values():
        bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.num_bytes
    return str(max(bytes_of, key=bytes_of.__getitem__)).removeprefix("torch.")
