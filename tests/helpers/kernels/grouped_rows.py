"""Rows that belong to experts: how many to each, and their values in the middle of NaNs."""

import torch
from torch import Tensor

from tests.helpers.kernels.backends import INTERPRETED

_MARGIN = 64


# rows per expert, then rows past the last offset; 16 is the interpreter's row block
SHAPES = {
    "no rows at all": ([0, 0, 0], 0),
    "no row of an expert": ([0, 0, 0], 5),
    "one row": ([0, 1, 0], 0),
    "a block less one": ([15, 15], 15),
    "a block": ([16, 16], 16),
    "a block and one": ([17, 17], 17),
    "all to one": ([0, 0, 70, 0], 0),
    "uneven, empty experts": ([3, 0, 33, 0, 18], 2),
}


# whole column blocks of the interpreter's tiles and tails; then widths that only the reference takes
WIDTHS = [(32, 64), (40, 24)] if INTERPRETED else [(40, 24), (7, 3)]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def poisoned(tensor: Tensor) -> Tensor:
    """A leaf with the same values, in the middle of NaNs."""
    buffer = torch.full((tensor.numel() + 2 * _MARGIN,), torch.nan, dtype=tensor.dtype)
    inside = buffer[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor).detach().requires_grad_()
