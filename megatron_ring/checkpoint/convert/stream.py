"""Write a set of output files box by box from a source: bounded memory, several processes, resumable.

Every output file is written under a temporary name, made durable, renamed, and then noted in ``.done/``. A
run that finds such notes for the same plan continues after them; with another plan it starts over. The folder
as a whole is ``NAME.incomplete`` until the caller has added what makes it a checkpoint and renames it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.files import Source, SummedFile, TensorInfo
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder, SafetensorsWriter
from megatron_ring.checkpoint.convert.tensor_map import Box, TensorCopy
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder, TorchDistWriter
from megatron_ring.errors import CheckpointError

Format = Literal["safetensors", "torch_dist"]
BUFFER_BYTES = 32_000_000
"""Largest block that is assembled at once; a process holds a few of them."""
SETTLE_BYTES = 128_000_000
"""fsync and drop the page cache after this many bytes, so that dirty pages stay bounded."""
_DONE = ".done"
_PLAN = "plan.json"
_OPEN = {"safetensors": SafetensorsFolder, "torch_dist": TorchDistFolder}
_WRITERS = {"safetensors": SafetensorsWriter, "torch_dist": TorchDistWriter}


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file to write: boxes of tensors in the order they are written, then empty objects.

    Example: ``OutputFile(name="__0_0.distcp", boxes=(("output_layer.weight", Box((0, 0), (250, 64))),),
    num_bytes=32000)``.
    """

    name: str
    boxes: tuple[tuple[str, Box], ...]
    num_bytes: int
    objects: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole conversion, as a worker process needs it."""

    source: Path
    source_format: Format
    target_format: Format
    copies: dict[str, list[TensorCopy]]
    """Per target tensor, where its numbers come from."""
    tensors: dict[str, TensorInfo]
    """The target tensors."""
    files: tuple[OutputFile, ...]
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Factor per column of target tensors that are not written as they are (NormHead applied)."""


@dataclass(frozen=True)
class Written:
    """The record of one written output file. ``places`` are (tensor, box, byte offset, length); empty for
    safetensors.
    """

    num_bytes: int
    crc32: str
    places: list[tuple[str, Box | None, int, int]]


def fill(source: Source, copies: list[TensorCopy], box: Box, dtype: torch.dtype) -> Tensor:
    """``box`` of the tensor that ``copies`` describe, read from ``source``; zero where no copy lands.

    Do not write to it: it may be the source's own memory.
    """
    parts = [part for part in (copy.within(box) for copy in copies) if part is not None]
    if len(parts) == 1 and parts[0].target_box == box:
        views = list(source.views(parts[0].source, parts[0].source_box))
        if len(views) == 1 and views[0][1].dtype == dtype and views[0][1].is_contiguous():
            # most bytes of a model go from the source's pages to the target without a copy in between
            return views[0][1].view(box.shape)
    covered = sum(part.target_box.size for part in parts)
    out = torch.empty(box.shape, dtype=dtype) if covered == box.size else torch.zeros(box.shape, dtype=dtype)
    for part in parts:
        room = out[part.target_box.relative_to(box).slices()]
        extra = len(box.shape) - len(part.source_box.shape)
        room = room[(0,) * extra] if extra > 0 else room[(None,) * -extra]
        for place, view in source.views(part.source, part.source_box):
            room[place.relative_to(part.source_box).slices()].copy_(view)
    return out


def group_into_files(
    boxes: Iterator[tuple[str, Box]], tensors: dict[str, TensorInfo], max_file_bytes: int
) -> list[tuple[tuple[tuple[str, Box], ...], int]]:
    """Boxes in order, cut into runs of at most ``max_file_bytes`` (or a single larger tensor), with their
    bytes.
    """
    groups: list[tuple[tuple[tuple[str, Box], ...], int]] = []
    current: list[tuple[str, Box]] = []
    size = 0
    for name, box in boxes:
        num_bytes = box.size * tensors[name].dtype.itemsize
        if current and size + num_bytes > max_file_bytes:
            groups.append((tuple(current), size))
            current, size = [], 0
        current.append((name, box))
        size += num_bytes
    if current:
        groups.append((tuple(current), size))
    return groups


@contextmanager
def working_folder(working: Path) -> Iterator[Path]:
    """``working``, made if needed, and locked against a second conversion until the block ends.

    A block that fails before it has written anything leaves no trace.

    Raises:
        CheckpointError: it cannot be made, another process holds it, or the disk failed.
    """
    lock = working.with_name(working.name + ".lock")
    made = [folder for folder in working.parents if not folder.exists()]
    try:
        working.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"{working}: {error.strerror}; name a folder that can be written") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{working}: another conversion is writing it; wait for it or stop it"
            ) from None
        try:
            yield working
        except OSError as error:
            raise _resumable(working, error) from None
        finally:
            wrote_nothing = working.is_dir() and not any(working.iterdir())
            if wrote_nothing:
                working.rmdir()
            if wrote_nothing or not working.exists():
                lock.unlink(missing_ok=True)
            for folder in made if wrote_nothing else ():
                with suppress(OSError):  # it belongs to another conversion now
                    folder.rmdir()
    finally:
        os.close(handle)


def begin(job: Job, working: Path, say: Callable[[str], None]) -> list[OutputFile]:
    """The files still to write: all, or those that an interrupted run of the same plan did not finish.

    Raises:
        CheckpointError: the disk is too small for them; nothing has been written then.
    """
    done = working / _DONE
    fingerprint = _fingerprint(job)
    plan = done / _PLAN
    if plan.exists() and plan.read_text(encoding="utf-8") == fingerprint:
        todo = [file for file in job.files if _note(working, file.name) is None]
        if len(todo) < len(job.files):
            say(f"resuming: {len(job.files) - len(todo)} of {len(job.files)} files are done already")
    else:
        if any(working.iterdir()):
            say(f"{working} is left from another conversion: starting over")
            shutil.rmtree(working)
            working.mkdir()
        todo = list(job.files)
    needed = sum(file.num_bytes for file in todo)
    free = shutil.disk_usage(working).free
    # archive headers, metadata and the file system's own blocks
    needed = int(needed * 1.01) + 2000 * sum(len(file.boxes) for file in todo) + 1_000_000
    if free < needed:
        raise CheckpointError(
            f"{working.parent}: {free / 1e9:.2f} GB free but the conversion writes {needed / 1e9:.2f} GB; "
            "free space or name a folder on another disk"
        )
    done.mkdir(exist_ok=True)
    # half-written files, and those that are copied after the weights: the next run may copy others
    for leftover in working.iterdir():
        if leftover.is_file() and leftover.name not in {file.name for file in job.files}:
            leftover.unlink()
    plan.write_text(fingerprint, encoding="utf-8")
    return todo


def write(
    job: Job, working: Path, todo: list[OutputFile], num_workers: int, on_bytes: Callable[[int], None]
) -> None:
    """Write ``todo`` into ``working``; ``on_bytes`` is called with the number of bytes as they are written.

    Raises:
        CheckpointError: reading or writing failed, or a worker died; what is finished stays for the next run.
    """
    if num_workers <= 1 or len(todo) <= 1:
        _write_files(job, working, todo, on_bytes)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers, pipes = [], []
    for index in range(min(num_workers, len(todo))):
        reader, writer = context.Pipe(duplex=False)
        arguments = (job, working, todo[index::num_workers], counter, writer)
        worker = context.Process(target=_work, args=arguments, daemon=True)
        worker.start()
        writer.close()
        workers.append(worker)
        pipes.append(reader)
    try:
        seen = 0
        running = list(workers)
        while running:
            wait([worker.sentinel for worker in running], timeout=0.2)
            on_bytes(counter.value - seen)
            seen = counter.value
            for worker in [w for w in running if w.exitcode is not None]:
                running.remove(worker)
                if worker.exitcode != 0:
                    raise CheckpointError(_last_words(pipes[workers.index(worker)], worker.exitcode))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def written(job: Job, working: Path) -> dict[str, Written]:
    """The records of all files, once all are written."""
    notes = {file.name: _note(working, file.name) for file in job.files}
    assert all(notes.values()), "a file was not finished"
    return {name: note for name, note in notes.items() if note}


def remove_progress_notes(working: Path) -> None:
    """Remove the notes of a finished conversion."""
    shutil.rmtree(working / _DONE)


def _work(job: Job, working: Path, files: list[OutputFile], counter: Any, pipe: Connection) -> None:
    """A worker process."""

    def count(num_bytes: int) -> None:
        with counter.get_lock():
            counter.value += num_bytes

    try:
        _write_files(job, working, files, count)
    except CheckpointError as error:
        pipe.send(str(error))
        os._exit(CheckpointError.exit_code)


def _last_words(pipe: Connection, exit_code: int | None) -> str:
    try:
        return pipe.recv()
    except EOFError:
        return f"a worker process died (exit code {exit_code}); run the same command again to continue"


def _write_files(job: Job, working: Path, files: list[OutputFile], on_bytes: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    source = _OPEN[job.source_format](job.source)
    try:
        # one thread sums and writes what the main thread assembles, one waits for the disk
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as closing:
            closed: Future[None] | None = None
            for file in files:
                finish = _write_file(job, source, working, file, on_bytes, writing, closing)
                if closed is not None:
                    closed.result()
                closed = closing.submit(finish)
            if closed is not None:
                closed.result()
    except OSError as error:
        raise _resumable(working, error) from None


def _resumable(working: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{working}: {error.strerror or error}; solve that, then run the same command again to continue"
    )


def _write_file(
    job: Job,
    source: Source,
    working: Path,
    file: OutputFile,
    on_bytes: Callable[[int], None],
    writing: ThreadPoolExecutor,
    closing: ThreadPoolExecutor,
) -> Callable[[], None]:
    """Write one file; returns what is left to do: make it durable, give it its name, note it."""
    temporary = working / f"{file.name}.{os.getpid()}.part"
    sink = SummedFile(temporary, on_bytes)
    names = dict.fromkeys(name for name, _ in file.boxes)
    writer = _WRITERS[job.target_format](sink, {name: job.tensors[name] for name in names})
    settled = [0]
    settling: list[Future[None]] = []

    def put(name: str, rows: Box, values: Tensor) -> list[int]:
        place = writer.write(name, rows, values)
        if sink.num_bytes - settled[0] > SETTLE_BYTES:
            source.release()
            settled[0] = sink.num_bytes
            if settling:
                settling.pop().result()
            settling.append(closing.submit(sink.settle))
        return place

    pending: deque[Future[list[int]]] = deque()
    places: list[tuple[str, Box | None, list[int]]] = []
    for name, box in file.boxes:
        dtype = job.tensors[name].dtype
        for rows in (
            box.rows(BUFFER_BYTES // dtype.itemsize) if job.target_format == "safetensors" else (box,)
        ):
            scale = job.scales.get(name)
            # what is scaled is rounded once, behind the scale
            values = fill(source, job.copies[name], rows, dtype if scale is None else torch.float32)
            values = values if scale is None else (values * scale).to(dtype)
            pending.append(writing.submit(put, name, rows, values))
            places.append((name, rows, []))
            if len(pending) > 1:
                places[-len(pending)][2].extend(pending.popleft().result())
    while pending:
        places[-len(pending)][2].extend(pending.popleft().result())
    for name in file.objects:
        places.append((name, None, writer.write_empty_object()))

    def finish() -> None:
        for settle in settling:
            settle.result()
        sink.close(durably=True)
        temporary.replace(working / file.name)
        note = {
            "bytes": sink.num_bytes,
            "crc32": f"{sink.crc32:08x}",
            "places": [[n, b and b.offset, b and b.shape, *at] for n, b, at in places if at],
        }
        path = working / _DONE / f"{file.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(note), encoding="utf-8")
        part.replace(path)

    return finish


def _note(working: Path, name: str) -> Written | None:
    """The note of a finished file; ``None`` if there is none or the file is not what it says."""
    path, file = working / _DONE / f"{name}.json", working / name
    if not path.exists() or not file.exists():
        return None
    note = json.loads(path.read_text(encoding="utf-8"))
    if file.stat().st_size != note["bytes"]:
        return None
    places = [
        (key, None if offset is None else Box(tuple(offset), tuple(shape)), start, length)
        for key, offset, shape, start, length in note["places"]
    ]
    return Written(note["bytes"], note["crc32"], places)


def _fingerprint(job: Job) -> str:
    """A digest of the plan and of the source files' identity (name, size, time of change)."""
    stats = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _OPEN[job.source_format](job.source).files()
    ]
    tensors = {name: (str(info.dtype), info.shape) for name, info in job.tensors.items()}
    text = repr(
        (job.source.resolve(), stats, job.target_format, tensors, job.files, job.copies, sorted(job.scales))
    )
    return hashlib.sha256(text.encode()).hexdigest()
