"""Tensors that start as NaN between margins: shows what a kernel leaves unwritten or writes outside its
output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MARGIN = 64
"""Elements; a multiple of 16 bytes, so that kernels are compiled as for a separate tensor."""


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Tensors allocated empty inside start as NaN (integers: a canary), between margins that must stay
    untouched."""
    plain_empty, plain_like, plain_new = torch.empty, torch.empty_like, Tensor.new_empty
    buffers: list[tuple[Tensor, Tensor]] = []

    def guard(shape, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        shape = torch.Size(shape)
        size = shape.numel()
        canary = torch.nan if dtype.is_floating_point else 0x5A5A5A
        buffer = torch.full((size + 2 * _MARGIN,), canary, dtype=dtype, device=device)
        buffers.append((buffer, torch.cat([buffer[:_MARGIN], buffer[_MARGIN + size :]]).clone()))
        return buffer[_MARGIN : _MARGIN + size].view(shape)

    def flat(shape: tuple) -> tuple:
        return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape

    torch.empty = lambda *shape, dtype=torch.float32, device=None, **_: guard(flat(shape), dtype, device)
    torch.empty_like = lambda like, **_: guard(like.shape, like.dtype, like.device)
    Tensor.new_empty = lambda like, *shape, dtype=None, **_: guard(
        flat(shape), dtype or like.dtype, like.device
    )
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = plain_empty, plain_like, plain_new
    for buffer, margins in buffers:
        now = torch.cat([buffer[:_MARGIN], buffer[-_MARGIN:]])
        assert torch.equal(now.nan_to_num(), margins.nan_to_num()), "a kernel wrote outside its output"
