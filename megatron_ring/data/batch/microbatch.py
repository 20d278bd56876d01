"""The model's only input format: sequences packed end to end into T slots.

Legend: T token slots of a microbatch (static over a run), S segments (packed sequences).

Segments cover all slots: the sequences first, then short segments of padding for the slots that are left. Attention
is causal inside a segment and never crosses a segment's border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

IGNORE = -100
"""Label of a position without a target: :func:`~megatron_ring.kernels.token_logprob` returns 0 for it."""

PADDING_SEGMENT = 64
"""Padding is split into attention segments of at most this many slots."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One microbatch of one data-parallel rank.

    Example: segments of 3 and 2 tokens in T = 6 slots::

        tokens_T      [11, 12, 13, 21, 22, 0]
        labels_T      [12, 13, -100, 22, -100, -100]
        loss_mask_T   [1., 1., 0., 1., 0., 0.]
        positions_T   [0, 1, 2, 0, 1, 0]
        valid_T       [True, True, True, True, True, False]
        segment_lengths (3, 2, 1)     # the last one is padding; num_valid 5
        cu_seqlens    [0, 3, 5, 6]

    ``loss_mask_T`` is the weight of each position's loss. ``valid_T`` is true where a slot holds a token; the router's
    statistics count all valid tokens, with or without loss.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    loss_mask_T: torch.Tensor
    positions_T: torch.Tensor
    valid_T: torch.Tensor
    cu_seqlens: torch.Tensor
    segment_lengths: tuple[int, ...]
    num_valid: int

    @property
    def num_slots(self) -> int:
        return self.tokens_T.numel()

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch with its tensors on ``device``."""
        moved = {
            name: sent(value, device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def shifted(self, row_T: torch.Tensor, fill: int | float, by: int = 1) -> torch.Tensor:
        """``row_T`` shifted left by ``by`` inside every segment; ``fill`` in the last ``by`` slots of a segment.

        These are the inputs and targets of multi-token prediction at depth ``by``.
        """
        out_T = torch.full_like(row_T, fill)
        if by < self.num_slots:
            same_T = self.segment_of_T[:-by] == self.segment_of_T[by:]
            out_T[:-by] = torch.where(same_T, row_T[by:], out_T[:-by])
        return out_T

    @property
    def segment_of_T(self) -> torch.Tensor:
        """Index of the segment each slot belongs to (``int64``)."""
        lengths_S = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        segments_S = torch.arange(lengths_S.numel(), device=lengths_S.device)
        return torch.repeat_interleave(segments_S, lengths_S.long(), output_size=self.num_slots)


def sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``value`` on ``device``. Copies to a GPU use pinned memory, so that the host does not wait for queued kernels."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


Row = Sequence[float] | np.ndarray[Any, Any] | torch.Tensor
"""Numbers of one sequence."""


def pack_microbatch(
    sequences: Sequence[tuple[Row, Row, Row]],
    num_slots: int,
    *,
    segment_lengths: Sequence[Sequence[int]] | None = None,
    pad_id: int = 0,
) -> Microbatch:
    """Pack (tokens, labels, loss mask) triples end to end and pad to ``num_slots``.

    Args:
        sequences: one triple per sequence; its three parts have the same length.
        num_slots: T, the static number of slots.
        segment_lengths: of each sequence, the lengths of its attention segments; ``None``: one segment each.
        pad_id: token id in padding slots.

    Raises:
        ValueError: the sequences do not fit into ``num_slots``.
    """
    used = sum(len(tokens) for tokens, _, _ in sequences)
    if used > num_slots:
        raise ValueError(f"{used} tokens do not fit into a microbatch of {num_slots} slots")
    padding = num_slots - used
    splits = segment_lengths or [(len(tokens),) for tokens, _, _ in sequences]
    # in short segments: attention over one long segment of padding would cost its square
    tail = [PADDING_SEGMENT] * (padding // PADDING_SEGMENT) + [padding % PADDING_SEGMENT]
    lengths = [n for split in splits for n in split if n > 0] + [n for n in tail if n]

    def column(index: int, fill: int | float, dtype: torch.dtype) -> torch.Tensor:
        parts = [torch.as_tensor(sequence[index], dtype=dtype) for sequence in sequences]
        return torch.cat([*parts, torch.full((padding,), fill, dtype=dtype)])

    lengths_S = torch.tensor(lengths, dtype=torch.int64)
    ends_S = lengths_S.cumsum(0)
    starts_T = torch.repeat_interleave(ends_S - lengths_S, lengths_S)
    loss_mask_T = column(2, 0.0, torch.float32)
    return Microbatch(
        tokens_T=column(0, pad_id, torch.int64),
        labels_T=torch.where(loss_mask_T > 0, column(1, IGNORE, torch.int64), IGNORE),
        loss_mask_T=loss_mask_T,
        positions_T=torch.arange(num_slots) - starts_T,
        valid_T=torch.arange(num_slots) < used,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), ends_S.to(torch.int32)]),
        segment_lengths=tuple(lengths),
        num_valid=used,
    )
