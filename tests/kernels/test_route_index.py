"""route_index: every backend against a stable sort in Python, bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_ring.kernels import route_index
from tests.helpers.kernels.backends import INTERPRETED, run_in_the_interpreter

# slots per block of the Triton kernel
SLOTS = 4096


def check_index(experts_TK: Tensor, num_experts: int) -> None:
    """Bit-exact against a stable sort in Python."""
    index = route_index(experts_TK, num_experts)
    flat, topk = experts_TK.flatten().tolist(), experts_TK.shape[1]
    order = sorted((i for i, e in enumerate(flat) if 0 <= e < num_experts), key=lambda i: (flat[i], i))
    counts = [0] * num_experts
    position = [-1] * len(flat)
    for row, slot in enumerate(order):
        counts[flat[slot]] += 1
        position[slot] = row
    assert index.offsets_E.dtype == torch.int32
    assert index.offsets_E.tolist() == list(itertools.accumulate(counts))
    assert index.gather_N.tolist() == [i // topk for i in order] + [0] * (len(flat) - len(order))
    assert index.position_TK.flatten().tolist() == position
    assert index.position_TK.shape == experts_TK.shape


@pytest.mark.parametrize("slots", [0, 1, SLOTS - 1, SLOTS, SLOTS + 1])
def test_index_at_block_edges(backend, slots):
    generator = torch.Generator().manual_seed(slots)
    check_index(torch.randint(0, 4, (slots, 1), generator=generator), 3)


@pytest.mark.parametrize("num_experts", [1, 5, 16])
def test_index_with_six_choices_empty_experts_and_dropped_slots(backend, num_experts):
    generator = torch.Generator().manual_seed(num_experts)
    check_index(torch.randint(-1, num_experts + 2, (31, 6), generator=generator), num_experts)
    check_index(torch.full((33, 6), num_experts - 1), num_experts)
    check_index(torch.full((33, 6), num_experts), num_experts)


def test_index_beyond_a_million_rows(backend):
    """A row map of 32-bit floats or 20 bits would lose rows here."""
    slots = 2**20 + 3
    experts_TK = (torch.arange(slots) % 2).view(-1, 1)
    index = route_index(experts_TK, 2)
    assert index.offsets_E.tolist() == [(slots + 1) // 2, slots]
    expected = torch.cat([torch.arange(0, slots, 2), torch.arange(1, slots, 2)])
    assert torch.equal(index.gather_N, expected)
    assert torch.equal(index.position_TK.flatten()[expected], torch.arange(slots))


def test_the_docstring_example_holds(backend):
    index = route_index(torch.tensor([[1, 0], [2, 1]]), 2)
    assert index.offsets_E.tolist() == [1, 3]
    assert index.gather_N.tolist() == [0, 0, 1, 0]
    assert index.position_TK.tolist() == [[1, 0], [-1, 2]]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
