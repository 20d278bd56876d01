"""Which files a conversion writes, and what is in each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megatron_ring.checkpoint.convert.files import TensorInfo
from megatron_ring.checkpoint.convert.stream import BUFFER_BYTES, OutputFile, group_into_files
from megatron_ring.checkpoint.convert.tensor_map import Box
from megatron_ring.checkpoint.convert.torch_dist_io import EXTRA_STATE

_LINEARS = tuple(f"{n}.weight" for n in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "eh_proj"))


def torch_dist_files(tensors: dict[str, TensorInfo], max_file_bytes: int) -> tuple[OutputFile, ...]:
    """``.distcp`` files of small chunks: one per expert matrix, other tensors by rows, so that a reader at
    any layout reads little more than its share. The first file also has the empty objects that Megatron keeps
    beside linear layers.
    """

    def boxes() -> Iterator[tuple[str, Box]]:
        for key, info in tensors.items():
            # stacked experts have three or more dimensions
            stacked = info.shape[:-2] if len(info.shape) > 2 else ()
            for index in itertools.product(*(range(n) for n in stacked)):
                matrix = Box.whole(info.shape[len(stacked) :])
                for box in matrix.rows(BUFFER_BYTES // info.dtype.itemsize) if not stacked else (matrix,):
                    yield key, Box((*index, *box.offset), (*(1 for _ in index), *box.shape))

    objects = tuple(
        key.removesuffix(".weight") + EXTRA_STATE
        for key in tensors
        if key.endswith(_LINEARS) and not key.startswith("optimizer.")
    )
    groups = group_into_files(boxes(), tensors, max_file_bytes)
    return tuple(
        OutputFile(name=f"__{i}_0.distcp", boxes=group, num_bytes=size, objects=() if i else objects)
        for i, (group, size) in enumerate(groups)
    )


def safetensors_files(tensors: dict[str, TensorInfo], max_file_bytes: int) -> tuple[OutputFile, ...]:
    """``model-00001-of-00007.safetensors`` and so on, whole tensors in the order given."""
    whole = ((name, Box.whole(info.shape)) for name, info in tensors.items())
    groups = group_into_files(whole, tensors, max_file_bytes)
    return tuple(
        OutputFile(name=f"model-{i:05d}-of-{len(groups):05d}.safetensors", boxes=group, num_bytes=size)
        for i, (group, size) in enumerate(groups, start=1)
    )
