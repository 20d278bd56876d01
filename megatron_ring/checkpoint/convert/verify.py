"""Read both sides of a conversion back and compare every tensor bit by bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ring.checkpoint.convert.files import Source
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, fill
from megatron_ring.checkpoint.convert.tensor_map import Box, TensorCopy
from megatron_ring.errors import CheckpointError


@dataclass
class Comparison:
    """What was found equal. Example: ``Comparison(num_tensors=291, num_bytes=..., casts={"float32 ->
    bfloat16": 27})``.
    """

    num_tensors: int = 0
    num_bytes: int = 0
    casts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        casts = "".join(f", {n} of them cast {what}" for what, n in self.casts.items())
        return f"{self.num_tensors:,} tensors ({self.num_bytes / 1e9:.2f} GB) equal bit by bit{casts}"


def compare(
    original: Source, result: Source, copies: dict[str, list[TensorCopy]], on_bytes: Callable[[int], None]
) -> Comparison:
    """Compare what ``copies`` bring from ``result`` with the tensors of ``original`` that they are keyed by.

    Rows of the original that no copy covers (vocabulary padding) are not compared.

    Raises:
        CheckpointError: some element differs.
    """
    for path in result.files():
        _read_from_disk(path)
    comparison = Comparison()
    for name, parts in copies.items():
        dtype = original.tensors[name].dtype
        other = result.tensors[parts[0].source].dtype
        if other != dtype:
            comparison.casts[f"{_short(dtype)} -> {_short(other)}"] += 1
        for part in parts:
            for box in part.target_box.rows(BUFFER_BYTES // dtype.itemsize):
                own = _gather(original, name, box).to(other)
                found = fill(result, [part], box, other)
                if not torch.equal(_bits(own), _bits(found)):
                    count = int((_bits(own) != _bits(found)).sum())
                    raise CheckpointError(
                        f"{result.folder}: {count} elements of {part.source} differ from {name} of {original.folder}; "
                        "convert again, and check the disk"
                    )
                comparison.num_bytes += box.size * dtype.itemsize
                on_bytes(box.size * dtype.itemsize)
        comparison.num_tensors += 1
    return comparison


def padding_is_zero(result: Source, copies: dict[str, list[TensorCopy]]) -> bool:
    """True if every element of ``result``'s tensors that no copy writes is zero."""
    for name, parts in copies.items():
        rows = max(part.target_box.offset[0] + part.target_box.shape[0] for part in parts)
        shape = result.tensors[name].shape
        if rows < shape[0]:
            box = Box((rows, *(0 for _ in shape[1:])), (shape[0] - rows, *shape[1:]))
            if any(bool(view.any()) for _, view in result.views(name, box)):
                return False
    return True


def _gather(source: Source, name: str, box: Box) -> Tensor:
    info = source.tensors[name]
    return fill(
        source, [TensorCopy(name, Box.whole(info.shape), name, Box.whole(info.shape))], box, info.dtype
    )


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_from_disk(path: os.PathLike) -> None:
    """Drop a file from the page cache, so that what is compared is what the disk gives back."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
